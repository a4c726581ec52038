"""Branch and bound over items under any linear rows: knapsacks, floors and ceilings, groups under both objectives.

A node decides what rows leave no choice about, is bounded by a plane (`solvers.exact.linear_items`) over the rows' dual
(`solvers.exact.linear_kernels`), decides by reduced costs what would exceed the incumbent, and branches on the open
item whose relaxed value and slope say least. Prices are handed down and bettered at every node. The search is
`solvers.exact.best_first`, started from `solvers.moves.item_search`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from solvers.arrays import Array, Mask
from solvers.budget import LinearRows
from solvers.exact import linear_kernels as kernels
from solvers.exact.best_first import SECONDS_OF_CUBE, Expansion, Fate, Fates, Incumbent, Node, Relaxation, best_first
from solvers.exact.linear_items import ItemObjective, OpenRows
from solvers.solution import Reason
from solvers.solver import Deadline

#: Nodes are dropped when they cannot improve the objective by this fraction of it.
RELATIVE_TOLERANCE = 1e-7
#: Rounds of bounding and fixing at one node.
_ROUNDS = 4


class LinearTreeResult(NamedTuple):
    """The best mask of items (G,), a lower bound on all, and how the search ended."""

    gone: Mask
    bound: float
    reason: Reason
    statistics: dict[str, float]


@dataclass(frozen=True)
class _State:
    """Decisions, relaxed point (G,), prices (m,), and what the objective hands down."""

    fates: Fates
    point: Array
    prices: Array
    inner: Any = None


class _LinearRelaxation(Relaxation[_State]):
    """Planes over linear rows."""

    def __init__(
        self, objective: ItemObjective, rows: LinearRows, feasible: Callable[[Mask], bool], fates: Fates
    ) -> None:
        self.objective, self.rows, self.feasible, self.fates = objective, rows, feasible, fates
        self.floor = objective.floor
        slack = 1e-13 * rows.matrix.sum(1)
        self.low, self.high = rows.low - slack, rows.high + slack

    def cutoff(self, value: float) -> float:
        return value - RELATIVE_TOLERANCE * abs(value)

    def least_seconds(self, node: Node[_State]) -> float:
        free = int((node.state.fates == Fate.OPEN).sum())
        return 10.0 * SECONDS_OF_CUBE * free**3 if free > 200 else 0.0

    def root(self, incumbent: Incumbent) -> Expansion[_State]:
        prices = np.zeros(self.rows.low.size)
        return self.expand(Node(-math.inf, _State(self.fates, incumbent.pruned.astype(np.float64), prices)), incumbent)

    def expand(self, node: Node[_State], incumbent: Incumbent) -> Expansion[_State]:
        state, cutoff, bound = node.state, self.cutoff(incumbent.value), node.bound
        fates, prices, inner, point = state.fates.copy(), state.prices.copy(), state.inner, state.point.copy()
        closed, weight = math.inf, np.ones(fates.size)
        for _ in range(_ROUNDS):
            if not kernels.propagate(fates, self.rows.matrix, self.low, self.high):
                return Expansion(closed=closed)
            free = np.flatnonzero(fates == Fate.OPEN)
            if not free.size:
                return self._leaf(fates, bound, closed)
            done = self.rows.matrix @ (fates == Fate.PRUNED)
            rows = OpenRows(np.ascontiguousarray(self.rows.matrix[:, free]), self.low - done, self.high - done, prices)
            plane = self.objective.plane(fates, rows, inner, point)
            inner, reduced = plane.state, np.empty(free.size)
            least = kernels.least(plane.slope, rows.matrix, rows.low, rows.high, prices, reduced)
            bound = max(bound, plane.base + least)
            point[free], weight[free] = plane.point, plane.weight
            if bound >= cutoff:
                return Expansion(closed=min(closed, bound))
            # What goes against its reduced cost adds it to the bound.
            stays, goes = bound + reduced >= cutoff, bound - reduced >= cutoff
            stays, goes = stays & (reduced > 0.0), goes & (reduced < 0.0)
            fates[free[stays]], fates[free[goes]] = Fate.KEPT, Fate.PRUNED
            point[free[stays]], point[free[goes]] = 0.0, 1.0
            decided = int(stays.sum() + goes.sum())
            closed = min(closed, cutoff) if decided else closed
            if decided <= 0.15 * free.size:
                break
        return self._branch(_State(fates, point, prices, inner), weight, bound, closed)

    def _leaf(self, fates: Fates, bound: float, closed: float) -> Expansion[_State]:
        gone = fates == Fate.PRUNED
        if not self.feasible(gone):
            return Expansion(closed=closed)
        value = self.objective.value(gone)
        return Expansion(closed=min(closed, max(value, bound)), found=Incumbent(gone, value))

    def _branch(self, state: _State, weight: Array, bound: float, closed: float) -> Expansion[_State]:
        free = np.flatnonzero(state.fates == Fate.OPEN)
        if not free.size:
            return Expansion([Node(bound, state)], closed)
        point = state.point[free]
        item = free[np.argmax(weight[free] * (np.minimum(point, 1.0 - point) + 1e-3))]
        children = []
        for fate in (Fate.KEPT, Fate.PRUNED):
            fates = state.fates.copy()
            fates[item] = fate
            children.append(Node(bound, _State(fates, state.point, state.prices, state.inner)))
        return Expansion(children, closed)


def solve_linear_tree(
    objective: ItemObjective,
    rows: LinearRows,
    feasible: Callable[[Mask], bool],
    incumbent: Incumbent,
    stays: Mask,
    *,
    deadline: Deadline | None = None,
    n_threads: int = 1,
    node_limit: int | None = None,
) -> LinearTreeResult:
    """The best mask of items under the rows.

    Parameters
    ----------
    objective : ItemObjective
    rows : LinearRows
    feasible : callable
        Whether a mask of items is allowed, to the last digit.
    incumbent : Incumbent
        A feasible mask of items and its value.
    stays : bool (G,)
        Items that no mask better than the incumbent removes.
    deadline, n_threads, node_limit
        As in `solvers.exact.best_first.best_first`.
    """
    fates = np.where(stays, Fate.KEPT, Fate.OPEN).astype(np.int8)
    deadline = deadline or Deadline()
    with threadpool_limits(1):
        relaxation = _LinearRelaxation(objective, rows, feasible, fates)
        search = best_first(relaxation, incumbent, deadline, n_threads=n_threads, node_limit=node_limit)
    bound = max(search.bound - objective.rounding(~stays), objective.floor)
    return LinearTreeResult(search.incumbent.pruned, bound, search.reason, search.statistics)
