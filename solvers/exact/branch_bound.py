"""The package's own branch and bound, for both objectives, without a licence.

Selection: quadratic relaxations with an optimal diagonal shift, searched by compiled active-set kernels; see
`solvers.exact.selection_tree`. Joint: perspective relaxations with an optimal diagonal; see `solvers.exact.joint_tree`.
Any other budget is linear rows over weights or groups of them, for both objectives; see `solvers.exact.linear_tree`.
All are anytime: on a limit the incumbent comes back with the lowest bound of the open nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.arrays import ProblemArrays
from solvers.budget import Bounded, Groups, Knapsack, Partitioned, as_partition
from solvers.exact.enumeration import MOST_WEIGHTS, best_mask
from solvers.exact.linear_roots import solve_with_rows
from solvers.problem import Objective, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, ANYTIME, PROVING, RANKED, Context, Deadline, Solver, option

#: A bound this close to its mask's value, relative to it, proves it.
_PROVEN = 5e-7


@dataclass(frozen=True)
class BranchBoundSolver(Solver):
    """Branch and bound on convex relaxations."""

    name = "branch_bound"
    summary = "our own branch and bound: proves optimality, or returns the best mask with a valid bound"
    reference = (
        "Billionnet, Elloumi and Plateau, The QCR method, 2009; Hazimeh, Mazumder and Saab, Sparse regression at "
        "scale, 2022"
    )
    capabilities = ANY_PROBLEM | ANYTIME | PROVING
    budgets = (*RANKED, Bounded, Groups, Knapsack)
    apart = True
    max_weights = 2000

    threads: int = option(2, "worker threads", minimum=1)
    node_limit: int | None = option(None, "stop after this many nodes", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The best mask found and the bound proven; few weights are enumerated where float64 proves nothing."""
        arrays = problem.arrays()
        result = self._grow(problem, arrays, context)
        value = problem.value(result.pruned)
        proven = result.bound >= value - _PROVEN * abs(value)
        if problem.n <= MOST_WEIGHTS and not proven and result.reason is Reason.COMPLETED:
            # Scales too far apart, or too much cancellation: double-double and rational arithmetic decide.
            best = best_mask(arrays, problem.objective, problem.budget)
            result = Proposal(best.pruned, best.bound, statistics={**result.statistics, "rational": float(best.exact)})
        context.record(problem.value(result.pruned), result.bound)
        return result

    def _grow(self, problem: SelectionProblem, arrays: ProblemArrays, context: Context) -> Proposal:
        if isinstance(problem.budget, Bounded):
            return self._floored(problem, problem.budget, arrays, context)
        if not isinstance(problem.budget, RANKED):
            return solve_with_rows(problem, arrays, context, self.threads, self.node_limit)
        grow = _joint if problem.objective is Objective.JOINT else _selection
        return grow(self, arrays, as_partition(problem.budget, problem.n), context)

    def _floored(self, problem: SelectionProblem, budget: Bounded, arrays: ProblemArrays, context: Context) -> Proposal:
        """The tree of numbers, which is the stronger one, where its mask keeps the floors; else the tree of rows."""
        remaining = context.deadline.remaining()
        half = replace(context, deadline=Deadline(None if math.isinf(remaining) else 0.5 * remaining))
        free = self._grow(problem.with_budget(budget.relaxed), arrays, half)
        if not budget.violation(free.pruned):
            return free
        found = solve_with_rows(problem, arrays, context, self.threads, self.node_limit)
        return replace(found, bound=max(found.bound, free.bound))


def _joint(solver: BranchBoundSolver, arrays: ProblemArrays, partition: Partitioned, context: Context) -> Proposal:
    from solvers.exact.joint_tree import solve_joint_tree

    found = solve_joint_tree(
        arrays.weights,
        arrays.factor,
        arrays.damping,
        arrays.gradient,
        partition,
        deadline=context.deadline,
        seed=context.seed,
        incumbent=context.start,
        n_threads=solver.threads,
        node_limit=solver.node_limit,
    )
    return Proposal(found.pruned, found.bound, found.reason, statistics=found.statistics)


def _selection(solver: BranchBoundSolver, arrays: ProblemArrays, partition: Partitioned, context: Context) -> Proposal:
    from solvers.exact.selection_tree import solve_selection_tree

    scaled = arrays.factor * arrays.weights
    quadratic = scaled.T @ scaled
    quadratic[np.diag_indices(arrays.weights.size)] += arrays.damping * arrays.weights**2
    found = solve_selection_tree(
        quadratic,
        arrays.gradient * arrays.weights,
        partition,
        deadline=context.deadline,
        seed=context.seed,
        incumbent=context.start,
        n_threads=solver.threads,
        node_limit=solver.node_limit,
    )
    return Proposal(found.pruned, found.bound, found.reason, statistics=found.statistics)
