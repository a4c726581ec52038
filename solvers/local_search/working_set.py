"""Small dense pieces of a large selection problem.

For a set W of weights the table Q_WW = diag(w_W) H_WW diag(w_W) and the forces s_W of the whole problem's current
mask determine every swap within W exactly, whatever is removed outside W: the rest enters through s_W only.
"""

from __future__ import annotations

import numpy as np

from solvers.arrays import Index
from solvers.local_search.state import SwapState
from solvers.moves import selection_swaps
from solvers.problem import Array, Mask
from solvers.solver import Deadline

#: Up to this many weights the whole problem is one table (float64: 128 MB).
DENSE_LIMIT = 4000
#: A swap must gain more than this fraction of the sizes involved, or rounding could make it cycle.
ROUNDING = 1e-13


class WorkingSet:
    """A dense table over `index` (in the common numbering), to be worked on in place and committed.

    Attributes
    ----------
    table : float64 (m, m)
    forces : float64 (m,)
    pruned : numpy bool (m,)
    groups : GroupReach
        Within which swaps stay; the index is in ascending order where there are several.
    """

    def __init__(self, state: SwapState, index: Index, forces: Array) -> None:
        if state.grouped:
            index = np.sort(index)
        self._state, self.index = state, index
        self.groups = state.partition.groups.among(index)
        self._columns = state.columns(index)
        self.table = interaction_table(state, index, self._columns, index, self._columns)
        np.fill_diagonal(self.table, 2.0 * state.curvature[index])
        self.forces = forces[index].copy()
        self.pruned: Mask = state.pruned[index].copy()

    def move(self, target: Mask) -> float:
        """Set the mask of the table to `target`; the change of the objective."""
        moved = target.astype(np.float64) - self.pruned
        pull = moved @ self.table
        change = float(moved @ self.forces + 0.5 * moved @ pull)
        self.forces += pull
        self.pruned[:] = target
        return change

    def commit(self, change: float) -> None:
        """Carry the swaps made on `pruned` over to the state; `change` is their total change of the objective."""
        state = self._state
        moved = self.pruned.astype(np.int8) - state.pruned[self.index].astype(np.int8)
        for position in np.flatnonzero(moved):
            weight = int(self.index[position])
            step = float(moved[position]) * state.weights[weight]
            state.images[state.component_of[weight]] += step * self._columns[position]
        state.pruned[self.index] = self.pruned
        state.value += change


def interaction_table(
    state: SwapState, rows: Index, row_columns: Array, columns: Index, column_columns: Array
) -> Array:
    """γ between two lists of weights, float64 (m, l), from their gathered columns of A; zero across components."""
    table: Array = row_columns @ column_columns.T
    table *= state.weights[rows][:, None]
    table *= state.weights[columns]
    if state.n_components > 1:
        table[state.component_of[rows][:, None] != state.component_of[columns]] = 0.0
    return table


def rounding_gain(state: SwapState) -> float:
    """The smallest gain that rounding cannot fake."""
    removed = state.pruned
    size = float(state.curvature[removed].sum()) + float(np.abs(state.linear[removed]).sum()) + abs(state.value)
    return ROUNDING * size


def settle(piece: WorkingSet, min_gain: float, deadline: Deadline) -> tuple[int, bool]:
    """Steepest descent on a working set, committed; (swaps, whether it ended before the deadline)."""
    total, swaps, few = 0.0, 0, selection_swaps.swaps_between_checks(piece.pruned.size)
    while True:
        made, change = selection_swaps.steepest_descent(
            piece.table, piece.forces, piece.pruned, *piece.groups.reach, min_gain, few
        )
        total, swaps = total + change, swaps + made
        done = made < few
        if done or deadline.expired():
            piece.commit(total)
            return swaps, done


def promising(state: SwapState, forces: Array, size: int) -> Index:
    """About `size` weights that swaps are likeliest to move: the largest α of P, the smallest β of S; sorted."""
    if size >= state.problem.n:
        return np.arange(state.problem.n)
    inside, drops, outside, rises = state.sides(forces)
    return best_of_sides(inside, drops, outside, -rises, size)


def best_of_sides(inside: Index, scores_inside: Array, outside: Index, scores_outside: Array, size: int) -> Index:
    """Those of highest score, half of `size` from each side or all of a smaller one and more of the other; sorted."""
    from_inside = min(inside.shape[0], max(size // 2, size - outside.shape[0]))
    first = inside[np.argsort(-scores_inside, kind="stable")[:from_inside]]
    second = outside[np.argsort(-scores_outside, kind="stable")[: size - from_inside]]
    return np.sort(np.concatenate([first, second]))
