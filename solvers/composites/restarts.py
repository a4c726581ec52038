"""Restarts: run one randomised solver with the seeds seed, seed + 1, … and keep the best mask."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.composites.nested import Composite, best_of
from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, ANYTIME, Capability, Context, option


@dataclass(frozen=True)
class RestartsSolver(Composite):
    """Best of several seeds. A given start mask is used by the first run only."""

    name = "restarts"
    summary = "one solver from several seeds, the best mask kept"
    adopted = ANY_PROBLEM | {Capability.WARM_START, Capability.BOUND, Capability.EXACT}
    capabilities = adopted | ANYTIME | {Capability.RANDOMISED, Capability.CALIBRATION}

    solver: str = option("best_swap[start=rmp]", "the solver to restart, with its options")
    runs: int = option(10, "number of seeds", minimum=1, maximum=1_000_000)

    @property
    def member_specs(self) -> list[str]:
        """The one that is restarted."""
        return [self.solver]

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Run, compare, keep the best."""
        member = self.members[0]
        runs = [(member, context.seed + number) for number in range(self.runs)]
        return best_of(problem, context, runs, lambda number, _: context.start if number == 0 else None)
