"""Random pruning: every mask with n_prune removed weights is equally likely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, SCORED, Capability, Context, Solver


@dataclass(frozen=True)
class RandomSolver(Solver):
    """A uniformly random mask: the floor under every comparison."""

    name = "random"
    summary = "remove weights at random"
    capabilities = ANY_PROBLEM | {Capability.RANDOMISED}
    budgets = SCORED

    needs = frozenset()

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Ignores everything but the budget and the seed."""
        place = np.empty(problem.n)
        place[context.rng().permutation(problem.n)] = np.arange(problem.n)
        return Proposal(problem.budget.cheapest_of(place))
