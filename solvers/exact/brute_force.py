"""Brute force: look at every mask. The oracle the other exact backends are tested against.

The values are those of `solvers.exact.enumeration`, in double-double arithmetic and, where that cannot decide, in
rational arithmetic; the bound is the least value less what it may be off.
"""

from __future__ import annotations

from dataclasses import dataclass

from solvers.budget import Bounded, Groups, Knapsack
from solvers.exact.enumeration import MOST_WEIGHTS, best_mask
from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, PROVING, RANKED, Context, Solver


@dataclass(frozen=True)
class BruteForceSolver(Solver):
    """Every mask of at most 20 weights."""

    name = "brute_force"
    summary = "look at every mask (at most 20 weights): the oracle"
    reference = ""
    capabilities = ANY_PROBLEM | PROVING
    budgets = (*RANKED, Bounded, Groups, Knapsack)
    apart = True
    max_weights = MOST_WEIGHTS

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The best of all masks; of masks that tie, the lexicographically first."""
        found = best_mask(problem.arrays(), problem.objective, problem.budget)
        context.record(found.value, found.bound)
        statistics = {"masks": float(found.masks), "rational": float(found.exact)}
        return Proposal(found.pruned, bound=found.bound, statistics=statistics)
