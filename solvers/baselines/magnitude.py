"""Magnitude pruning: remove the weights with the smallest |w_i| (Han et al., 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import SelectionProblem
from solvers.ranking import prune_smallest, prune_smallest_magnitudes
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, Context, Solver


@dataclass(frozen=True)
class MagnitudeSolver(Solver):
    """Global magnitude pruning; ties go to the lower index."""

    name = "magnitude"
    summary = "remove the weights with the smallest |w|"
    reference = "Han et al., Learning both weights and connections, NeurIPS 2015"
    capabilities = ANY_PROBLEM
    needs = frozenset()

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Ignores H and g altogether; declared for every problem because it is a baseline for every problem."""
        if problem.measured:
            return Proposal(prune_smallest(np.abs(problem.weights), problem.n_prune))
        return Proposal(prune_smallest_magnitudes([block.weights for block in problem.blocks], problem.n_prune))
