"""Restarts: run one randomised solver several times with different seeds and keep the best mask.

The runs are seeded seed, seed + 1, …; the best is the one of lowest objective, or of lowest calibration loss where
a callback is given. A lower bound proven in any run holds for the problem, so the largest is passed on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from solvers.composites.nested import (
    PROBLEM_CAPABILITIES,
    adopt,
    adopt_limit,
    combined_reason,
    make_inner,
    run_inner,
)
from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Capability, Context, Solver, option


@dataclass(frozen=True)
class RestartsSolver(Solver):
    """Best of several seeds. What it can do beyond that is what the inner solver can do.

    A given start mask is used by the first run only. A time limit is shared evenly over the runs that are left.
    """

    name = "restarts"
    summary = "one solver from several seeds, the best mask kept"
    capabilities = frozenset(
        {
            Capability.SELECTION,
            Capability.JOINT,
            Capability.GLOBAL_BUDGET,
            Capability.LINEAR_TERM,
            Capability.RANDOMISED,
            Capability.CALIBRATION,
            Capability.WARM_START,
            Capability.TIME_LIMIT,
            Capability.BOUND,
            Capability.EXACT,
        }
    )

    solver: str = option("best_swap[start=rmp]", "the solver to restart, with its options")
    runs: int = option(10, "number of seeds", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = make_inner(self.solver, self.name)
        adopt(self, [inner], [*PROBLEM_CAPABILITIES, Capability.WARM_START, Capability.BOUND, Capability.EXACT])
        adopt_limit(self, [inner])

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Run, compare, keep the best."""
        inner = make_inner(self.solver, self.name)
        judge = context.calibration_loss or problem.value
        proposals: list[Proposal] = []
        scores: list[float] = []
        for number in range(self.runs):
            if proposals and context.deadline.expired():
                break
            share = context.deadline.remaining() / (self.runs - number)
            start = context.start if number == 0 else None
            proposal = run_inner(inner, problem, context, seed=context.seed + number, seconds=share, start=start)
            proposals.append(proposal)
            scores.append(judge(proposal.pruned))
            if scores[-1] == min(scores):
                context.record(problem.value(proposal.pruned), proposal.bound)
        best = min(range(len(scores)), key=scores.__getitem__)
        return Proposal(
            proposals[best].pruned,
            bound=max((p.bound for p in proposals), default=-math.inf),
            reason=combined_reason(proposals, context.deadline.expired()),
            repairs=proposals[best].repairs,
            statistics={"runs": float(len(proposals)), "best_run": float(best)},
        )
