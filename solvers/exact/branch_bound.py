"""The package's own branch and bound, for both objectives, without a licence.

Selection: quadratic relaxations with an optimal diagonal shift, searched by compiled active-set kernels; see
`solvers.exact.selection_tree`. Joint: perspective relaxations with an optimal diagonal; see `solvers.exact.joint_tree`.
Both are anytime: on a limit the incumbent comes back with the lowest bound of the open nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.arrays import ProblemArrays
from solvers.budget import Partitioned, as_partition
from solvers.exact.enumeration import MOST_WEIGHTS, best_mask
from solvers.problem import Objective, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, ANYTIME, PROVING, RANKED, Context, Solver, option

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
    budgets = RANKED
    apart = True
    max_weights = 2000

    threads: int = option(2, "worker threads", minimum=1)
    node_limit: int | None = option(None, "stop after this many nodes", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The best mask found and the bound proven; few weights are enumerated where float64 proves nothing."""
        arrays = problem.arrays()
        grow = _joint if problem.objective is Objective.JOINT else _selection
        result = grow(self, arrays, as_partition(problem.budget, problem.n), context)
        value = problem.value(result.pruned)
        proven = result.bound >= value - _PROVEN * abs(value)
        if problem.n <= MOST_WEIGHTS and not proven and result.reason is Reason.COMPLETED:
            # Scales too far apart, or too much cancellation: double-double and rational arithmetic decide.
            best = best_mask(arrays, problem.objective, problem.budget)
            result = Proposal(best.pruned, best.bound, statistics={**result.statistics, "rational": float(best.exact)})
        context.record(problem.value(result.pruned), result.bound)
        return result


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
