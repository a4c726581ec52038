"""Optimal brain damage: remove by the diagonal of the quadratic model.

If H were diagonal, removing i would change the selection objective by ½ H_ii w_i² − g_i w_i, and taking the
n_prune smallest of these would be optimal (LeCun, Denker and Solla, *Optimal brain damage*, NIPS 1990).
"""

from __future__ import annotations

from dataclasses import dataclass

from solvers.problem import Array, SelectionProblem
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, SCORED, Context, Solver


def diagonal_saliency(problem: SelectionProblem) -> Array:
    """½ H_ii w_i² − g_i w_i, float64 (n,): what removing each weight alone adds to the selection objective."""
    scores = 0.5 * problem.diagonal * problem.weights**2
    if problem.gradient is not None:
        scores -= problem.gradient * problem.weights
    return scores


@dataclass(frozen=True)
class OptimalBrainDamageSolver(Solver):
    """Global diagonal saliency; ties go to the lower index."""

    name = "obd"
    summary = "remove the weights with the smallest ½ H_ii w² − g·w (without a gradient: H_ii w²)"
    reference = "LeCun, Denker and Solla, Optimal brain damage, NIPS 1990"
    capabilities = ANY_PROBLEM
    budgets = SCORED

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Rank by the diagonal saliency."""
        return Proposal(problem.budget.cheapest_of(diagonal_saliency(problem)))
