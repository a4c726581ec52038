"""A layer's rows as many small problems that share one matrix, and searches over all of them under one budget.

Under a `Kronecker` curvature diag(s) ⊗ M rows do not interact: a mask is as good as the sum of its rows, each of d
weights, and the only thing that rows share is what the budget lets them lose together. `settle` brings every row to
where its own search ends, then moves removals between rows of a group: weights that gain most by coming back in one row
against those that cost least in another. Rows that were touched are searched again, until no such pair gains.

The moves of one round are judged one by one, as if there were no others in their row. Where that has made a round
worse, it is undone, and from then on a row takes one move a round, for which the judgement is exact: so the result is a
local optimum for single swaps within rows and between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from solvers.arrays import Array, Index, Mask
from solvers.budget import as_partition
from solvers.budget.cardinality import Cardinality
from solvers.budget.partitioned import Partitioned
from solvers.curvature import Kronecker
from solvers.problem import SelectionProblem
from solvers.regularise import regularised
from solvers.solution import Reason
from solvers.solver import Deadline

#: Removals a row takes or gives up in one round at most, until that has made a round worse.
_MOVES = 16


@dataclass(frozen=True, eq=False)
class LayerRow:
    """One row, whose weights v cost ½ s (v − w)ᵀM(v − w) + gᵀ(v − w).

    Attributes
    ----------
    matrix : float64 (d, d)
        M, one array for all rows of a layer.
    scale : float
        s.
    weights : float64 (d,)
        w.
    gradient : float64 (d,)
        g, zero where there is none.
    """

    matrix: Array
    scale: float
    weights: Array
    gradient: Array

    @property
    def n(self) -> int:
        """Its weights."""
        return self.weights.size


@dataclass(frozen=True, eq=False)
class LayerRows:
    """All rows of a problem, those of each group one after the other.

    Attributes
    ----------
    rows : tuple of LayerRow
    starts : int64 (rows + 1,)
        First weight of each row, and the number of weights.
    group_of : int64 (rows,)
    quotas : int64 (groups,)
        What the rows of each group lose together.
    repairs : tuple of str
        Damping that had to be put in place of none.
    """

    rows: tuple[LayerRow, ...]
    starts: Index
    group_of: Index
    quotas: Index
    repairs: tuple[str, ...]

    @classmethod
    def of(cls, problem: SelectionProblem, *, invertible: bool) -> LayerRows | None:
        """The rows; None where there are blocks of other kinds, a single row, or groups that cut rows.

        `invertible`: with enough damping for M to have an inverse (`solvers.regularise`); None also where no damping
        helps, for a row of scale 0.
        """
        if not rowwise(problem):
            return None
        partition = as_partition(problem.budget, problem.n)
        rows: list[LayerRow] = []
        repairs: list[str] = []
        for given in problem.blocks:
            block, repair = regularised(given) if invertible else (given, "")
            repairs += [repair] if repair else []
            curvature = block.curvature
            assert isinstance(curvature, Kronecker)
            shape = curvature.n_rows, curvature.n_inputs
            matrix, weights = _array(curvature.inputs.matrix), _array(block.weights).reshape(shape)
            scale, gradient = _array(curvature.row_scale), np.zeros(shape)
            if invertible and not scale.all():
                return None
            if block.gradient is not None:
                gradient = _array(block.gradient).reshape(shape)
            rows += [LayerRow(matrix, *row) for row in zip(scale.tolist(), weights, gradient, strict=True)]
        starts = np.cumsum([0, *(row.n for row in rows)])
        group_of = partition.group_of[starts[:-1]]
        return cls(tuple(rows), starts, group_of, partition.quotas, tuple(repairs))

    def slice_of(self, row: int) -> slice:
        """Its weights."""
        return slice(int(self.starts[row]), int(self.starts[row + 1]))


def rowwise(problem: SelectionProblem) -> bool:
    """Whether a problem is made of rows of layers, several, under a budget whose groups are made of whole rows."""
    if not all(isinstance(block.curvature, Kronecker) for block in problem.blocks):
        return False
    if not isinstance(problem.budget, Cardinality | Partitioned):
        return False
    ends = np.concatenate(
        [
            where.start + np.arange(1, block.curvature.n_rows + 1) * block.curvature.n_inputs  # type: ignore[attr-defined]
            for where, block in zip(problem.slices, problem.blocks, strict=True)
        ]
    )
    return ends.size > 1 and bool(np.isin(as_partition(problem.budget, problem.n).starts[1:], ends).all())


@dataclass(frozen=True, eq=False)
class Settled:
    """A row at the end of its own search.

    Attributes
    ----------
    pruned : bool (d,)
    value : float
        Its objective.
    swaps : int
    costs : float64 (d,)
        What removing each kept weight alone would cost, inf for removed ones.
    gains : float64 (d,)
        What each removed weight would gain by coming back alone, −inf for kept ones.
    """

    pruned: Mask
    value: float
    swaps: int
    costs: Array
    gains: Array


#: (row, its mask, least gain of a swap) → where its search ends.
Visit = Callable[[LayerRow, Mask, float], Settled]


@dataclass(frozen=True)
class RowsResult:
    """Mask of all weights, objective, swaps within rows, moves between them, rounds, why it stopped."""

    pruned: Mask
    value: float
    swaps: int
    moves: int
    rounds: int
    reason: Reason


def settle(
    layers: LayerRows,
    start: Mask,
    visit: Visit,
    *,
    min_gain: float,
    rounds: int,
    deadline: Deadline,
    record: Callable[[float], None] = lambda _: None,
) -> RowsResult:
    """Search in all rows and between them; see the module's docstring.

    Parameters
    ----------
    layers : LayerRows
    start : bool (n,)
        A feasible mask.
    visit : callable
        The search in one row, which keeps its number of removed weights. Rows are visited by several threads.
    min_gain : float
        Least gain of a move, relative to the objective.
    rounds : int
    deadline : Deadline
    record : callable, optional
        Told the objective after every round.
    """
    pruned = start.copy()
    states: list[Settled | None] = [None] * len(layers.rows)
    value, swaps, moved, most, least = np.inf, 0, 0, _MOVES, 0.0
    touched = range(len(layers.rows))
    before: list[tuple[int, Settled]] = []
    for number in range(rounds):
        found = _visited(layers, pruned, visit, touched, least, deadline)
        finished = all(state is not None for state in found)
        if not finished and number:
            return RowsResult(_restored(layers, pruned, before), value, swaps, moved, number, Reason.TIME_LIMIT)
        for row, state in zip(touched, found, strict=True):
            if state is not None:
                states[row], pruned[layers.slice_of(row)] = state, state.pruned
                swaps += state.swaps
        if not finished:
            return RowsResult(pruned, value, swaps, moved, 1, Reason.TIME_LIMIT)
        total = float(np.sum([state.value for state in states if state is not None]))
        if number and total >= value:
            # The moves of this round were worse together than they looked one by one.
            pruned = _restored(layers, pruned, before)
            for row, old in before:
                states[row] = old
            if most == 1:
                return RowsResult(pruned, value, swaps, moved, number + 1, Reason.COMPLETED)
            most = 1
        else:
            value = total
        record(value)
        least = min_gain * abs(value)
        pairs = _moves(layers, [state for state in states if state is not None], most, least)
        if not pairs:
            return RowsResult(pruned, value, swaps, moved, number + 1, Reason.COMPLETED)
        touched = sorted({row for pair in pairs for row, _ in pair})  # type: ignore[assignment]
        before = [(row, state) for row in touched if (state := states[row]) is not None]
        for (giver, back), (taker, gone) in pairs:
            pruned[layers.starts[giver] + back], pruned[layers.starts[taker] + gone] = False, True
        moved += len(pairs)
    return RowsResult(_restored(layers, pruned, before), value, swaps, moved, rounds, Reason.ITERATION_LIMIT)


def _visited(
    layers: LayerRows, pruned: Mask, visit: Visit, rows: Iterable[int], least: float, deadline: Deadline
) -> list[Settled | None]:
    """The search in some rows, None for those that the deadline has left out."""

    def one(row: int) -> Settled | None:
        if deadline.expired():
            return None
        return visit(layers.rows[row], pruned[layers.slice_of(row)].copy(), least)

    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        return list(pool.map(one, rows))


def _restored(layers: LayerRows, pruned: Mask, before: list[tuple[int, Settled]]) -> Mask:
    """The mask with some rows as they were."""
    for row, state in before:
        pruned[layers.slice_of(row)] = state.pruned
    return pruned


def _moves(
    layers: LayerRows, states: list[Settled], most: int, least: float
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (row, weight that comes back), (another row of its group, weight that goes instead)."""
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for group in range(layers.quotas.size):
        rows = np.flatnonzero(layers.group_of == group)
        if rows.size > 1:
            found += _pairs({int(row): states[row] for row in rows}, most, least)
    return found


def _pairs(states: dict[int, Settled], most: int, least: float) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Those of one group, the most gaining first; a row only takes or only gives, `most` weights at most."""
    backs = _ranked({row: -state.gains for row, state in states.items()}, most)
    goes = _ranked({row: state.costs for row, state in states.items()}, most)
    givers: set[int] = set()
    takers: set[int] = set()
    for gain, row, back in backs:
        if row in takers:
            continue
        at = next((at for at, (_, other, _) in enumerate(goes) if other != row and other not in givers), None)
        if at is None or -gain - goes[at][0] <= least:
            # The next one may be allowed what this row is not: its own cheapest weight.
            if not goes or -gain - goes[0][0] <= least:
                return
            continue
        _, other, gone = goes.pop(at)
        givers.add(row)
        takers.add(other)
        yield (row, back), (other, gone)


def _ranked(scores: dict[int, Array], most: int) -> list[tuple[float, int, int]]:
    """(score, row, weight), ascending: the `most` smallest finite ones of each row."""
    found = []
    for row, values in scores.items():
        first = np.argsort(values, kind="stable")[:most]
        found += [(float(values[i]), row, int(i)) for i in first if np.isfinite(values[i])]
    return sorted(found)


def _array(tensor: torch.Tensor) -> Array:
    """float64, contiguous, on the CPU."""
    return np.ascontiguousarray(tensor.detach().double().cpu().numpy())
