"""Problems whose budgets are linear rows over items, made ready for the tree (`solvers.exact.linear_tree`).

Under the selection objective items are weights of a smaller problem: Q_gh = Σ_{i∈g, j∈h} w_i H_ij w_j. Where it is just
a number of them that goes, that is a problem for the tree of numbers. Under the joint objective they stay sets of
weights. Removing weight i costs at least ½ c_i²/(H⁻¹)_ii whatever else goes, which decides what must stay at once.
"""

from __future__ import annotations

import numpy as np

from solvers.arrays import Array, Mask, ProblemArrays
from solvers.budget import Groups, LinearRows
from solvers.exact.best_first import Incumbent
from solvers.exact.completion import complete_square, hessian_root
from solvers.exact.joint_square import Square, prepare
from solvers.exact.linear_items import ItemObjective, JointItems, SelectionItems
from solvers.exact.linear_tree import LinearTreeResult, solve_linear_tree
from solvers.exact.selection_start import unit_of
from solvers.exact.selection_tree import solve_selection_tree
from solvers.moves.item_problem import item_form
from solvers.moves.item_search import find
from solvers.problem import Objective, SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Context


def solve_with_rows(
    problem: SelectionProblem, arrays: ProblemArrays, context: Context, n_threads: int, node_limit: int | None
) -> Proposal:
    """The best mask and the bound proven, for a budget of any kind that is a matter of linear rows."""
    rows = problem.budget.linear(problem.n)
    if problem.objective is Objective.SELECTION:
        quadratic, linear = item_form(arrays, rows)
        if isinstance(problem.budget, Groups):
            start = None if context.start is None else rows.narrow(context.start)
            found = solve_selection_tree(
                quadratic, linear, problem.budget.k, deadline=context.deadline, seed=context.seed, incumbent=start,
                n_threads=n_threads, node_limit=node_limit,
            )  # fmt: skip
            return Proposal(rows.widen(found.pruned), found.bound, found.reason, statistics=found.statistics)
        unit = unit_of(quadratic, linear)
        items = SelectionItems(quadratic / unit, linear / unit)
        found_ = _grown(problem, rows, items, _selection_stays(arrays, rows, unit), context, n_threads, node_limit)
        return Proposal(rows.widen(found_.gone), found_.bound * unit, found_.reason, statistics=found_.statistics)
    square = prepare(arrays.weights, arrays.factor, arrays.damping, arrays.gradient)
    if square.unit == 0.0:
        mask = rows.widen(problem.budget.over_items.cheapest_of(np.zeros(rows.items)))
        return Proposal(mask, square.value(mask), statistics={"nodes": 0.0})
    result = _grown(
        problem, rows, joint_items(square, rows), _joint_stays(square, rows), context, n_threads, node_limit
    )
    mask = rows.widen(result.gone)
    value = square.value(mask)
    height = result.bound * square.unit * (1.0 - square.error)
    return Proposal(
        mask, min(square.safe(height, value - square.constant), value), result.reason, statistics=result.statistics
    )


def local_optimum(problem: SelectionProblem, arrays: ProblemArrays, context: Context) -> Mask:
    """The mask (n,) that the tree would begin with."""
    rows = problem.budget.linear(problem.n)
    start = None if context.start is None else rows.narrow(context.start)
    items: ItemObjective
    if problem.objective is Objective.SELECTION:
        quadratic, linear = item_form(arrays, rows)
        unit = unit_of(quadratic, linear)
        items = SelectionItems(quadratic / unit, linear / unit)
    else:
        square = prepare(arrays.weights, arrays.factor, arrays.damping, arrays.gradient)
        items = joint_items(square, rows)
    budget = problem.budget.over_items
    return rows.widen(find(items, rows, budget, start, context.seed, context.deadline).gone)


def joint_items(square: Square, rows: LinearRows) -> JointItems:
    """The joint objective over the items; about as much stays as the rows' least share of what goes."""
    total = np.maximum(rows.matrix.sum(1), 1e-300)
    share = float(np.clip(np.max(rows.low / total, initial=0.0), 0.0, 1.0))
    return JointItems(square, rows.labels, max(1, round((1.0 - share) * rows.labels.size)))


class _Stays:
    """Which items (G,) cost more than a value when they go, whatever else does."""

    def __init__(self, least: Array, rows: LinearRows) -> None:
        self.least = np.full(rows.items, -np.inf)
        np.maximum.at(self.least, rows.labels, least)

    def above(self, value: float) -> Mask:
        return np.asarray(self.least > value + 1e-6 * abs(value) + 1e-300)


def _selection_stays(arrays: ProblemArrays, rows: LinearRows, unit: float) -> _Stays:
    from solvers.exact.formulation import inverse_diagonal

    square = complete_square(arrays)
    if square is None:
        return _Stays(np.full(rows.labels.size, -np.inf), rows)
    least = 0.5 * square.centre**2 / inverse_diagonal(hessian_root(arrays))
    return _Stays((least * (1.0 - 1e-9) + square.constant * (1.0 + 1e-9)) / unit, rows)


def _joint_stays(square: Square, rows: LinearRows) -> _Stays:
    return _Stays(square.removal_costs(), rows)


def _grown(
    problem: SelectionProblem,
    rows: LinearRows,
    items: ItemObjective,
    stays: _Stays,
    context: Context,
    n_threads: int,
    node_limit: int | None,
) -> LinearTreeResult:
    budget = problem.budget.over_items
    start = None if context.start is None else rows.narrow(context.start)
    incumbent = find(items, rows, budget, start, context.seed, context.deadline)
    found = solve_linear_tree(
        items, rows, lambda gone: not budget.violation(gone), Incumbent(*incumbent), stays.above(incumbent.value),
        deadline=context.deadline, n_threads=n_threads, node_limit=node_limit,
    )  # fmt: skip
    return found._replace(bound=min(found.bound, items.value(found.gone)))
