"""WoodFisher: remove by what the loss rises when one weight is removed and all the others re-optimised.

    min over δ with δ_i = −w_i of  gᵀδ + ½ δᵀHδ   =   (w_i − [H⁻¹g]_i)² / (2 [H⁻¹]_ii) − ½ gᵀH⁻¹g ,

the constant being the same for every i. With g = 0 this is the statistic w_i² / (2 [H⁻¹]_ii) of the optimal
brain surgeon (Hassibi and Stork, 1992), computed for a Fisher matrix by Singh and Alistarh, *WoodFisher*,
NeurIPS 2020. The interaction between removals is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from solvers.problem import Array, SelectionProblem
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, SCORED, Context, Solver


def single_removal_loss(problem: SelectionProblem) -> Array:
    """(w_i − [H⁻¹g]_i)² / (2 [H⁻¹]_ii), float64 (n,); raises SingularHessianError where H has no inverse."""
    parts = []
    for block in problem.blocks:
        target = block.weights
        if block.gradient is not None:
            target = target - block.solve(block.gradient)
        parts.append(target.square() / (2.0 * block.inverse_diagonal))
    return np.asarray(torch.cat(parts).cpu().numpy())


@dataclass(frozen=True)
class WoodFisherSolver(Solver):
    """Global WoodFisher statistic; ties go to the lower index. Needs λ > 0 unless H itself is invertible."""

    name = "woodfisher"
    summary = "remove the weights with the smallest w²/(2[H⁻¹]_ii)"
    reference = "Singh and Alistarh, WoodFisher, NeurIPS 2020"
    capabilities = ANY_PROBLEM
    budgets = SCORED

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Rank by the rise after the single update; raises SingularHessianError where H has no inverse."""
        return Proposal(problem.budget.cheapest_of(single_removal_loss(problem)))
