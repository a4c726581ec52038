"""First-order saliency: remove the weights with the smallest |g_i w_i|.

g_i w_i is the first-order change of the loss when w_i alone is removed (Mozer and Smolensky,
*Skeletonization*, NIPS 1988; Molchanov et al., ICLR 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.errors import ProblemError
from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, SCORED, Context, Need, Solver


@dataclass(frozen=True)
class GradientMagnitudeSolver(Solver):
    """Global first-order saliency; ties go to the lower index. Every block must carry a gradient."""

    name = "gradient_magnitude"
    summary = "remove the weights with the smallest |g·w|"
    reference = "Molchanov et al., Pruning convolutional neural networks for resource efficient inference, ICLR 2017"
    capabilities = ANY_PROBLEM
    budgets = SCORED

    needs = frozenset({Need.GRADIENT})

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Rank by |g_i w_i|; raises ProblemError where a block has no gradient."""
        for block in problem.blocks:
            if block.gradient is None:
                raise ProblemError(
                    f"gradient_magnitude ranks by |g·w| and block {block.name!r} has no gradient; build the problem "
                    "with its mean gradient (QuadraticBlock(..., gradient=g)) or use 'magnitude' or 'obd'"
                )
        assert problem.gradient is not None
        return Proposal(problem.budget.cheapest_of(np.abs(problem.gradient * problem.weights)))
