"""Portfolio: run several solvers one after another and keep the best mask.

``portfolio[solvers=obd+tabu[iterations=20000]+annealing]``: names are joined by plus signs, and brackets may nest.
A solver that takes a start is given the best mask so far.
"""

from __future__ import annotations

from dataclasses import dataclass

from solvers.composites.nested import Composite, best_of
from solvers.errors import OptionError
from solvers.problem import SelectionProblem
from solvers.registry import split_outside_brackets
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, ANYTIME, Capability, Context, option


@dataclass(frozen=True)
class PortfolioSolver(Composite):
    """Best of several solvers."""

    name = "portfolio"
    summary = "several solvers one after another, the best mask kept and handed on"
    capabilities = ANY_PROBLEM | ANYTIME | {Capability.RANDOMISED, Capability.CALIBRATION, Capability.BOUND}
    adopted = ANY_PROBLEM

    solvers: str = option("obd+rmp+best_swap+tabu+annealing", "the members, joined by plus signs")
    chain: bool = option(True, "hand the best mask so far to members that take a start")

    @property
    def member_specs(self) -> list[str]:
        """Between the plus signs; raises OptionError for an empty name."""
        names = list(split_outside_brackets(self.solvers, "+"))
        if not all(names):
            raise OptionError(f"portfolio: solvers={self.solvers!r} must be names joined by '+', such as obd+tabu")
        return names

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Run every member, keep the best."""
        runs = [(member, context.seed) for member in self.members]
        return best_of(problem, context, runs, lambda _, best: best if self.chain else context.start)
