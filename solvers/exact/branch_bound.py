"""The package's own branch and bound, for both objectives, without a licence.

Selection: quadratic relaxations with an optimal diagonal shift, searched by compiled active-set kernels; see
`solvers.exact.selection_tree`. Joint: perspective relaxations with an optimal diagonal; see `solvers.exact.joint_tree`.
Both are anytime: on a limit the incumbent comes back with the lowest bound of the open nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import Objective, SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Capability, Context, Solver, option


@dataclass(frozen=True)
class BranchBoundSolver(Solver):
    """Branch and bound on convex relaxations."""

    name = "branch_bound"
    summary = "our own branch and bound: proves optimality, or returns the best mask with a valid bound"
    reference = (
        "Billionnet, Elloumi and Plateau, The QCR method, 2009; Hazimeh, Mazumder and Saab, Sparse regression at "
        "scale, 2022"
    )
    capabilities = frozenset(
        {
            Capability.SELECTION,
            Capability.JOINT,
            Capability.GLOBAL_BUDGET,
            Capability.LINEAR_TERM,
            Capability.BOUND,
            Capability.EXACT,
            Capability.WARM_START,
            Capability.TIME_LIMIT,
        }
    )
    max_weights = 2000

    threads: int = option(2, "worker threads", minimum=1)
    node_limit: int | None = option(None, "stop after this many nodes", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The best mask found and the bound proven."""
        arrays = problem.arrays()
        if problem.objective is Objective.JOINT:
            from solvers.exact.joint_tree import solve_joint_tree

            joint = solve_joint_tree(
                arrays.weights,
                arrays.factor,
                arrays.damping,
                problem.gradient,
                problem.n_prune,
                deadline=context.deadline,
                seed=context.seed,
                incumbent=context.start,
                n_threads=self.threads,
                node_limit=self.node_limit,
            )
            context.record(problem.value(joint.pruned), joint.bound)
            return Proposal(joint.pruned, joint.bound, joint.reason, statistics=joint.statistics)
        from solvers.exact.selection_tree import solve_selection_tree

        scaled = arrays.factor * arrays.weights
        quadratic = scaled.T @ scaled
        quadratic[np.diag_indices(problem.n)] += arrays.damping * arrays.weights**2
        result = solve_selection_tree(
            quadratic,
            None if problem.gradient is None else problem.gradient * arrays.weights,
            problem.n_prune,
            deadline=context.deadline,
            seed=context.seed,
            incumbent=context.start,
            n_threads=self.threads,
            node_limit=self.node_limit,
        )
        context.record(problem.value(result.pruned), result.bound)
        return Proposal(result.pruned, result.bound, result.reason, statistics=result.statistics)
