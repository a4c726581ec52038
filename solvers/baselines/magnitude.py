"""Magnitude pruning: remove the weights with the smallest |w_i| (Han et al., 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from solvers.budget import Cardinality
from solvers.problem import SelectionProblem
from solvers.ranking import prune_smallest_magnitudes
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, SCORED, Context, Solver


@dataclass(frozen=True)
class MagnitudeSolver(Solver):
    """Global magnitude pruning; ties go to the lower index."""

    name = "magnitude"
    summary = "remove the weights with the smallest |w|"
    reference = "Han et al., Learning both weights and connections, NeurIPS 2015"
    capabilities = ANY_PROBLEM
    budgets = SCORED
    needs = frozenset()

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Ignores H and g altogether; declared for every problem because it is a baseline for every problem."""
        if problem.measured:
            return Proposal(problem.budget.cheapest_of(np.abs(problem.weights)))
        parts = [block.weights for block in problem.blocks]
        if not isinstance(problem.budget, Cardinality):
            return Proposal(problem.budget.cheapest(torch.cat([part.abs() for part in parts])).cpu().numpy())
        return Proposal(prune_smallest_magnitudes(parts, problem.n_prune))
