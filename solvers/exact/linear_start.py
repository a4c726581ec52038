"""A good mask under linear rows: flips and exchanges of items, then a tabu walk.

A move that the rows allow is a flip of one item, or the exchange of one that goes and one that stays. The best move is
made, improving or not; what moved rests for a few moves unless it leads below the best mask met.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from solvers.arrays import Array, Mask
from solvers.budget import Budget, LinearRows
from solvers.errors import ProblemError
from solvers.exact.best_first import Incumbent
from solvers.exact.linear_items import ItemObjective
from solvers.solver import Deadline

_STALL = 150


def _open_moves(rows: LinearRows, gone: Mask, activity: Array) -> tuple[Mask, Mask]:
    """(flips (G,), exchanges (|P|, |S|)) that the rows allow."""
    sign = np.where(gone, -1.0, 1.0)
    flips = rows.fits(activity[:, None] + sign * rows.matrix)
    out, back = rows.matrix[:, gone], rows.matrix[:, ~gone]
    return flips, rows.fits(activity[:, None, None] - out[:, :, None] + back[:, None, :])


def _best(
    objective: ItemObjective, rows: LinearRows, gone: Mask, value: float, rests: Mask, below: float
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


def descend(objective: ItemObjective, rows: LinearRows, gone: Mask, deadline: Deadline) -> Incumbent:
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
    return Incumbent(gone, value)


def greedy(objective: ItemObjective, rows: LinearRows) -> Mask | None:
    """One item after another goes, the cheapest for what the rows still ask; None where that leads nowhere."""
    gone = np.zeros(rows.items, dtype=bool)
    while True:
        activity = rows.matrix @ gone
        missing = np.maximum(rows.low - activity, 0.0)
        if not missing.any():
            return gone if rows.holds(gone) else None
        asked = missing > 0.0
        progress = np.minimum(rows.matrix[asked] / missing[asked, None], 1.0).sum(0)
        fits = ((activity[:, None] + rows.matrix) <= rows.high[:, None]).all(0) & ~gone & (progress > 0.0)
        if not fits.any():
            return None
        flips, _ = objective.moves(gone, exchanges=False)
        gone[np.argmin(np.where(fits, flips / np.maximum(progress, 1e-300), np.inf))] = True


def search(
    objective: ItemObjective,
    rows: LinearRows,
    starts: Sequence[Mask],
    moves: int,
    rng: np.random.Generator,
    deadline: Deadline,
) -> Incumbent:
    """Descents from every start, then up to `moves` tabu moves from the best."""
    best = descend(objective, rows, starts[0], deadline)
    for start in starts[1:]:
        if deadline.expired():
            return best
        best = min(best, descend(objective, rows, start, deadline), key=lambda found: found.value)
    gone, value = best.pruned.copy(), best.value
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
                best, last = Incumbent(gone.copy(), exact), clock
            value = exact
    return descend(objective, rows, best.pruned, deadline)


def find_incumbent(
    objective: ItemObjective,
    rows: LinearRows,
    budget: Budget,
    start: Mask | None,
    seed: int,
    deadline: Deadline,
) -> Incumbent:
    """The best of a given start, of masks by what single items cost, and of a greedy one, after a tabu walk.

    `budget` is that of the items (`Budget.over_items`).
    """
    rng = np.random.default_rng(seed)
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
    return search(objective, rows, starts, int(min(400, 2e7 / rows.items**2)), rng, deadline)
