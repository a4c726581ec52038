"""Descent to a 1-swap local optimum, on problems of any size.

Up to `DENSE_LIMIT` weights every swap made is the best of all. Beyond, P is cut into tiles in the order of α. A tile
meets S in chunks in the order of β, and a pair is looked at only if it may gain:

1. by Cauchy–Schwarz γ_ij ≤ l_i l_j with l_i = |w_i| ‖a_i‖, so β_j − α_i − l_i l_j < 0 is necessary;
2. of the pairs left, γ_ij = l_i l_j cos_ij is computed from float32 unit columns, whose products err by less than
   (r + 4) 2⁻²⁴, and pairs that do not gain within this error are dropped;
3. the weights of the pairs left become a dense float64 table, which is brought to a local optimum.

Under a partition swaps stay within groups, so that ranges of whole groups are dense tables of their own where groups
are small; of larger ones only the pairs in step 3 are kept that share a group.

The search ends when all tiles in a row have been visited without a swap, so the end is a proven local optimum.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from solvers.arrays import Index
from solvers.local_search.state import SwapState
from solvers.local_search.working_set import DENSE_LIMIT, WorkingSet, rounding_gain, settle
from solvers.problem import Array
from solvers.solver import Deadline

Single = npt.NDArray[np.float32]

_TILE = 512
_CHUNK = 1024
#: Weights of a range of groups.
_RANGE = 1024
#: Unit columns of S that are kept between tiles: at most this many float32 entries (128 MB).
_CACHE_ENTRIES = 1 << 25


def descend(state: SwapState, min_gain: float, deadline: Deadline) -> tuple[int, bool]:
    """Swap until no swap gains more than `min_gain`; in place.

    Returns
    -------
    swaps : int
    settled : bool
        Whether the end is a proven local optimum; False where the deadline came first.
    """
    min_gain = max(min_gain, rounding_gain(state))
    if state.grouped and max(state.partition.sizes) <= _RANGE:
        swaps, settled = _settle_ranges(state, min_gain, deadline)
    elif state.problem.n <= DENSE_LIMIT:
        everything = WorkingSet(state, np.arange(state.problem.n), state.forces())
        swaps, settled = settle(everything, min_gain, deadline)
    else:
        swaps, settled = _TiledDescent(state, min_gain, deadline).run()
    state.refresh()
    return swaps, settled


def _settle_ranges(state: SwapState, min_gain: float, deadline: Deadline) -> tuple[int, bool]:
    """Descend in ranges of whole groups in turn until a round over all of them is clean; (swaps, settled)."""
    starts, swaps = state.partition.starts, 0
    size = DENSE_LIMIT if state.problem.n <= DENSE_LIMIT else _RANGE
    ends = [0]
    while ends[-1] < state.problem.n:
        ends.append(int(starts[np.searchsorted(starts, ends[-1] + size, side="right") - 1]))
    ranges, clean, at = list(pairwise(ends)), 0, 0
    while clean < len(ranges):
        piece = WorkingSet(state, np.arange(*ranges[at]), state.forces())
        made, done = settle(piece, min_gain, deadline)
        swaps, at = swaps + made, (at + 1) % len(ranges)
        clean = 1 if made else clean + 1
        if not done or (deadline.expired() and clean < len(ranges)):
            return swaps, False
    return swaps, True


class _UnitColumns:
    """sign(w_i) a_i / ‖a_i‖ in float32, those of S kept between tiles."""

    def __init__(self, state: SwapState, norms: Array) -> None:
        self._state, self._norms = state, norms
        self._slot: Index = np.full(state.problem.n, -1, dtype=np.int64)
        self._held: Single = np.empty((0, state.rows), dtype=np.float32)
        self._used = 0

    def gather(self, index: Index) -> Single:
        """Rows (m, R) for `index`, read from the factor."""
        columns = self._state.columns(index)
        columns *= (np.sign(self._state.weights[index]) / np.where(self._norms[index] > 0, self._norms[index], 1.0))[
            :, None
        ]
        return columns.astype(np.float32)

    def keep(self, index: Index) -> Single:
        """The same, remembered as far as the cache reaches."""
        missing = index[self._slot[index] < 0]
        if missing.size:
            capacity = min(_CACHE_ENTRIES // self._state.rows, self._state.problem.n)
            if index.size > capacity:
                return self.gather(index)
            if self._used + missing.size > capacity:
                self._slot[:], self._used, missing = -1, 0, index
            if self._used + missing.size > self._held.shape[0]:
                grown = np.empty((min(capacity, 2 * (self._used + missing.size)), self._state.rows), dtype=np.float32)
                grown[: self._used] = self._held[: self._used]
                self._held = grown
            self._held[self._used : self._used + missing.size] = self.gather(missing)
            self._slot[missing] = np.arange(self._used, self._used + missing.size)
            self._used += missing.size
        return self._held[self._slot[index]]


class _TiledDescent:
    """The search beyond `DENSE_LIMIT`; see the module's docstring."""

    def __init__(self, state: SwapState, min_gain: float, deadline: Deadline) -> None:
        self.state, self.min_gain, self.deadline = state, min_gain, deadline
        norms = np.sqrt(np.maximum(state.problem.diagonal - state.ridge, 0.0))
        self.length: Array = np.abs(state.weights) * norms
        self.units = _UnitColumns(state, norms)
        self.error = (state.rows + 4) * 2.0**-24

    def run(self) -> tuple[int, bool]:
        """(swaps made, whether every tile was clean in the end)."""
        swaps = clean = tile = 0
        order = self._order()
        while True:
            tiles = -(-order[0].shape[0] // _TILE)
            made = self._visit(order, tile % tiles)
            if made is None:
                return swaps, False
            swaps += made
            if made:
                # The tile is visited again before the next one.
                order, clean = self._order(), 0
                continue
            clean, tile = clean + 1, (tile + 1) % tiles
            if clean >= tiles:
                return swaps, True

    def _order(self) -> tuple[Index, Array, Index, Array, Array]:
        """(P by α descending, its α, S by β ascending, its β, forces)."""
        state = self.state
        forces = state.forces()
        inside, drops, outside, rises = state.sides(forces)
        by_drop, by_rise = np.argsort(-drops, kind="stable"), np.argsort(rises, kind="stable")
        return inside[by_drop], drops[by_drop], outside[by_rise], rises[by_rise], forces

    def _visit(self, order: tuple[Index, Array, Index, Array, Array], tile: int) -> int | None:
        """Swaps made by the first chunk of S that gains with the tile, 0 if none does, None at the deadline."""
        inside, drops, outside, rises, forces = order
        where = slice(tile * _TILE, (tile + 1) * _TILE)
        rows, row_drops = inside[where], drops[where]
        lengths = self.length[rows]
        longest = float(lengths.max())
        units: Single | None = None
        for start in range(0, outside.shape[0], _CHUNK):
            if self.deadline.expired():
                return None
            columns, column_rises = outside[start : start + _CHUNK], rises[start : start + _CHUNK]
            reach = column_rises - row_drops[0] - longest * self.length[columns] < -self.min_gain
            if not reach.any():
                continue
            columns, column_rises = columns[reach], column_rises[reach]
            product = lengths[:, None] * self.length[columns]
            change = column_rises - row_drops[:, None]
            if not (change - product < -self.min_gain).any():
                continue
            if units is None:
                units = self.units.gather(rows)
            cosines = (units @ self.units.keep(columns).T).astype(np.float64)
            if self.state.n_components > 1:
                cosines[self.state.component_of[rows][:, None] != self.state.component_of[columns]] = -self.error
            suspects = change - product * (cosines + self.error) < -self.min_gain
            if self.state.grouped:
                group = self.state.partition.group_of
                suspects &= group[rows][:, None] == group[columns]
            if suspects.any():
                index = np.concatenate([rows[suspects.any(1)], columns[suspects.any(0)]])
                made, _ = settle(WorkingSet(self.state, index, forces), self.min_gain, self.deadline)
                if made:
                    return made
        return 0
