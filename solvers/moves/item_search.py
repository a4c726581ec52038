"""A good mask under linear rows: flips and exchanges of items, then a tabu walk.

A move that the rows allow is a flip of one item, or the exchange of one that goes and one that stays. The best move is
made, improving or not; what moved rests for a few moves unless it leads below the best mask met.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numba
import numpy as np

from solvers.arrays import Array, Mask
from solvers.budget import Budget, LinearRows
from solvers.errors import ProblemError
from solvers.moves.item_moves import ItemMoves, SelectionMoves
from solvers.solver import Deadline

_STALL = 150
#: Proposals of annealing between looks at the time.
_STEPS = 50_000


class Found(NamedTuple):
    """A mask of items (G,) and its value."""

    gone: Mask
    value: float


def _open_moves(rows: LinearRows, gone: Mask, activity: Array) -> tuple[Mask, Mask]:
    """(flips (G,), exchanges (|P|, |S|)) that the rows allow."""
    sign = np.where(gone, -1.0, 1.0)
    flips = rows.fits(activity[:, None] + sign * rows.matrix)
    out, back = rows.matrix[:, gone], rows.matrix[:, ~gone]
    return flips, rows.fits(activity[:, None, None] - out[:, :, None] + back[:, None, :])


def _best(
    objective: ItemMoves, rows: LinearRows, gone: Mask, value: float, rests: Mask, below: float
) -> tuple[list[int], float]:
    """The items of the best allowed move, and what it changes; none where nothing may move."""
    flips, swaps = objective.moves(gone)
    may_flip, may_swap = _open_moves(rows, gone, rows.matrix @ gone)
    inside, outside = np.flatnonzero(gone), np.flatnonzero(~gone)
    resting = rests[inside][:, None] | rests[outside]
    flips = np.where(may_flip & (~rests | (value + flips < below)), flips, np.inf)
    swaps = np.where(may_swap & (~resting | (value + swaps < below)), swaps, np.inf)
    flip = int(np.argmin(flips))
    if swaps.size:
        row, column = divmod(int(np.argmin(swaps)), swaps.shape[1])
        if swaps[row, column] < flips[flip]:
            return [int(inside[row]), int(outside[column])], float(swaps[row, column])
    return ([flip], float(flips[flip])) if np.isfinite(flips[flip]) else ([], 0.0)


def descend(objective: ItemMoves, rows: LinearRows, gone: Mask, deadline: Deadline) -> Found:
    """The local optimum that the best moves lead to from a mask of items (G,)."""
    gone, value, rests = gone.copy(), objective.value(gone), np.zeros(gone.size, dtype=bool)
    while not deadline.expired():
        items, change = _best(objective, rows, gone, value, rests, -np.inf)
        if not items or not change < -1e-10 * abs(value):
            break
        moved = gone.copy()
        moved[items] ^= True
        after = objective.value(moved)
        if not after < value:
            break
        gone, value = moved, after
    return Found(gone, value)


def greedy(objective: ItemMoves, rows: LinearRows) -> Mask | None:
    """One item after another goes, the cheapest for what the rows still ask; None where that leads nowhere."""
    gone = np.zeros(rows.items, dtype=bool)
    while True:
        activity = rows.matrix @ gone
        missing = np.maximum(rows.low - activity, 0.0)
        if not missing.any():
            return _put_back(objective, rows, gone) if rows.holds(gone) else None
        asked = missing > 0.0
        progress = np.minimum(rows.matrix[asked] / missing[asked, None], 1.0).sum(0)
        fits = ((activity[:, None] + rows.matrix) <= rows.high[:, None]).all(0) & ~gone & (progress > 0.0)
        if not fits.any():
            return None
        flips, _ = objective.moves(gone, exchanges=False)
        gone[np.argmin(np.where(fits, flips / np.maximum(progress, 1e-300), np.inf))] = True


def search(
    objective: ItemMoves,
    rows: LinearRows,
    starts: Sequence[Mask],
    moves: int,
    rng: np.random.Generator,
    deadline: Deadline,
) -> Found:
    """Descents from every start, then up to `moves` tabu moves from the best."""
    best = descend(objective, rows, starts[0], deadline)
    for start in starts[1:]:
        if deadline.expired():
            return best
        best = min(best, descend(objective, rows, start, deadline), key=lambda found: found.value)
    gone, value = best.gone.copy(), best.value
    until, last = np.zeros(gone.size, dtype=np.int64), 0
    for clock in range(moves):
        if deadline.expired() or clock - last > _STALL or best.value <= objective.floor:
            break
        items, change = _best(objective, rows, gone, value, until > clock, best.value - 1e-10 * abs(best.value))
        if not items:
            break
        gone[items] ^= True
        value += change
        until[items] = clock + rng.integers(3, 11, len(items))
        if value < best.value - 1e-10 * abs(best.value):
            exact = objective.value(gone)
            if exact < best.value:
                best, last = Found(gone.copy(), exact), clock
            value = exact
    return descend(objective, rows, best.gone, deadline)


def _put_back(objective: ItemMoves, rows: LinearRows, gone: Mask) -> Mask:
    """What more went than the rows ask for comes back, the dearest first, in place."""
    while True:
        flips, _ = objective.moves(gone, exchanges=False)
        fits = gone & rows.fits((rows.matrix @ gone)[:, None] - rows.matrix) & (flips < 0.0)
        if not fits.any():
            return gone
        gone[np.argmin(np.where(fits, flips, np.inf))] = False


def first_masks(
    objective: ItemMoves, rows: LinearRows, budget: Budget, start: Mask | None, rng: np.random.Generator
) -> list[Mask]:
    """A given start, masks by what single items cost, and one from which they went one by one.

    `budget` is that of the items (`Budget.over_items`). Raises ProblemError where none keeps it.
    """
    alone, _ = objective.moves(np.zeros(rows.items, dtype=bool), exchanges=False)
    starts = [] if start is None else [start]
    refused: ProblemError | None = None
    for scale in (np.ones(1), *rng.uniform(0.3, 3.0, (2, alone.size))):
        try:
            starts.append(budget.cheapest_of(alone * scale))
        except ProblemError as error:
            refused = error
    first = greedy(objective, rows)
    starts += [] if first is None else [first]
    if not starts:
        raise refused or ProblemError("no mask that keeps the budget was found")
    return starts


def find(
    objective: ItemMoves, rows: LinearRows, budget: Budget, start: Mask | None, seed: int, deadline: Deadline
) -> Found:
    """The best of the first masks after descents and a tabu walk."""
    rng = np.random.default_rng(seed)
    starts = first_masks(objective, rows, budget, start, rng)
    return search(objective, rows, starts, int(min(400, 2e7 / rows.items**2)), rng, deadline)


@numba.njit(cache=True)
def _anneal(quadratic, linear, matrix, low, high, gone, value, best, hot, cold, random):  # type: ignore[no-untyped-def]
    """Metropolis steps while the temperature falls, in place: flips and exchanges, half of each; the best value."""
    items, rows, steps = linear.size, low.size, len(random)
    forces, activity = -linear.copy(), np.zeros(rows)
    for i in range(items):
        if gone[i]:
            forces += quadratic[i]
            activity += matrix[:, i]
    least, cooling = value, (cold / hot) ** (1.0 / steps)
    heat = hot
    for step in range(steps):
        heat *= cooling
        i = int(random[step, 0] * items)
        j = int(random[step, 1] * items) if random[step, 2] < 0.5 else i
        if i != j and gone[i] == gone[j]:
            continue
        change = (-forces[i] if gone[i] else forces[i]) + 0.5 * quadratic[i, i]
        if i != j:
            change += (-forces[j] if gone[j] else forces[j]) + 0.5 * quadratic[j, j] - quadratic[i, j]
        fits = True
        for k in range(rows):
            after = activity[k] + (-matrix[k, i] if gone[i] else matrix[k, i])
            if i != j:
                after += -matrix[k, j] if gone[j] else matrix[k, j]
            fits = fits and low[k] <= after <= high[k]
        if not fits or (change > 0.0 and random[step, 3] >= np.exp(-change / heat)):
            continue
        for turn in range(1 if i == j else 2):
            at = i if turn == 0 else j
            sign = -1.0 if gone[at] else 1.0
            forces += sign * quadratic[at]
            activity += sign * matrix[:, at]
            gone[at] = not gone[at]
        value += change
        if value < least:
            least = value
            best[:] = gone
    return least


def anneal(
    objective: SelectionMoves, rows: LinearRows, starts: Sequence[Mask], sweeps: int, hot: float, cooling: float,
    rng: np.random.Generator, deadline: Deadline,
) -> Found:  # fmt: skip
    """Simulated annealing from the best of the starts, and a descent from the best mask met.

    The first temperature is `hot` times the mean ½ Q_ii of what goes and falls by the factor `cooling`.
    """
    best = min((descend(objective, rows, start, deadline) for start in starts), key=lambda found: found.value)
    gone = best.gone.copy()
    scale = float(np.diag(objective.quadratic)[gone].mean()) if gone.any() else 0.0
    total = sweeps * rows.items
    fall = 0.5 * scale * hot * cooling ** np.linspace(0.0, 1.0, -(-total // _STEPS) + 1)
    for warm, cold in pairwise(fall) if scale > 0.0 else ():
        if deadline.expired():
            break
        met = gone.copy()
        _anneal(
            objective.quadratic, objective.linear, rows.matrix, rows.low, rows.high, gone, objective.value(gone), met,
            warm, cold, rng.random((_STEPS, 4)),
        )  # fmt: skip
        # Running sums round; masks are compared by their own values.
        best = min(best, Found(met, objective.value(met)), key=lambda found: found.value)
    return min(descend(objective, rows, best.gone, deadline), best, key=lambda found: found.value)
