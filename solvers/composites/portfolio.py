"""Portfolio: run several solvers one after another and keep the best mask.

``portfolio[solvers=obd+tabu[iterations=20000]+annealing]``: names are joined by plus signs, and brackets may nest.
A solver that takes a start is given the best mask so far. A lower bound proven by any member holds for the
problem, so the largest is passed on.
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
    split_plus,
)
from solvers.errors import OptionError
from solvers.problem import Mask, SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Capability, Context, Solver, option


@dataclass(frozen=True)
class PortfolioSolver(Solver):
    """Best of several solvers, by objective, or by calibration loss where a callback is given.

    What it can do beyond that is what all its members can do. A time limit is shared evenly over
    the members that are left, so that what a quick one leaves goes to the others.
    """

    name = "portfolio"
    summary = "several solvers one after another, the best mask kept and handed on"
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
        }
    )

    solvers: str = option("obd+rmp+best_swap+tabu+annealing", "the members, joined by plus signs")
    chain: bool = option(True, "hand the best mask so far to members that take a start")

    def __post_init__(self) -> None:
        super().__post_init__()
        members = self._members()
        adopt(self, members, PROBLEM_CAPABILITIES)
        adopt_limit(self, members)

    def _members(self) -> list[Solver]:
        names = list(split_plus(self.solvers))
        if not all(names):
            raise OptionError(f"portfolio: solvers={self.solvers!r} must be names joined by '+', such as obd+tabu")
        return [make_inner(spec, self.name) for spec in names]

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Run every member, keep the best."""
        members = self._members()
        judge = context.calibration_loss or problem.value
        best: Mask | None = context.start
        best_score = math.inf if best is None else judge(best)
        winner = -1
        proposals: list[Proposal] = []
        for number, member in enumerate(members):
            if best is not None and context.deadline.expired():
                break
            share = context.deadline.remaining() / (len(members) - number)
            start = best if self.chain or number == 0 else context.start
            proposal = run_inner(member, problem, context, seed=context.seed, seconds=share, start=start)
            proposals.append(proposal)
            score = judge(proposal.pruned)
            if best is None or score < best_score:
                best, best_score, winner = proposal.pruned, score, number
                context.record(problem.value(best), proposal.bound)
        assert best is not None
        return Proposal(
            best,
            bound=max((p.bound for p in proposals), default=-math.inf),
            reason=combined_reason(proposals, context.deadline.expired()),
            repairs=tuple(repair for p in proposals for repair in p.repairs),
            statistics={"members": float(len(proposals)), "winner": float(winner)},
        )
