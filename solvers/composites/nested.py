"""Running solvers inside a solver: specs, capabilities, shares of the time, bounds."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from solvers.errors import OptionError
from solvers.problem import Mask, SelectionProblem
from solvers.registry import make_solver
from solvers.running import check_capabilities, run_backend
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Deadline, Solver


@dataclass(frozen=True)
class Composite(Solver):
    """A solver around other solvers.

    The class declares what it can do at best; an instance knows its members, and so is refused with a CapabilityError
    before work starts where one of them would be.
    """

    adopted: ClassVar[frozenset[Capability]]
    """What it can do only if all its members can."""
    hands_on_whole: ClassVar[bool] = True
    """Members get the whole problem, which therefore must not be larger than each of them takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The instance's value hides the class's; the dataclass is frozen, hence this way of setting it.
        object.__setattr__(self, "capabilities", type(self).capabilities - self.lacking())
        limits = [member.max_weights for member in self.members if member.max_weights is not None]
        if self.hands_on_whole:
            object.__setattr__(self, "max_weights", min(limits, default=None))

    @property
    @abstractmethod
    def member_specs(self) -> Sequence[str]:
        """The members, as the registry parses them."""

    @cached_property
    def members(self) -> list[Solver]:
        """The solvers inside."""
        return [self.make_inner(spec) for spec in self.member_specs]

    def lacking(self) -> frozenset[Capability]:
        """What is declared by the class and taken back by the instance."""
        return frozenset(c for c in self.adopted if any(c not in member.capabilities for member in self.members))

    def make_inner(self, spec: str) -> Solver:
        """The solver named by an option; raises OptionError where it would nest itself endlessly."""
        inner = make_solver(spec)
        if inner.name == self.name:
            raise OptionError(f"{self.name}: the inner solver {spec!r} is {self.name} again; name another one")
        return inner


def run_inner(
    inner: Solver, problem: SelectionProblem, context: Context, *, seed: int, seconds: float, start: Mask | None = None
) -> Proposal:
    """Run `inner` for at most `seconds` (if it keeps a limit) on a problem whose capabilities are checked first.

    A start is handed over only to solvers that take one. The trace of the inner run is dropped: its times and
    objectives are not the outer problem's.
    """
    warm = start if Capability.WARM_START in inner.capabilities else None
    check_capabilities(inner, problem, None, warm)
    limit = None if math.isinf(seconds) else max(seconds, 1e-3)
    return run_backend(inner, problem, replace(context, seed=seed, deadline=Deadline(limit), start=warm, trace=[]))


def run_parts(
    inner: Solver, parts: Sequence[tuple[SelectionProblem, int, Mask | None]], context: Context
) -> list[Proposal]:
    """Run `inner` on sub-problems, (problem, seed, start) each, in shares of the time.

    The calibration loss is one of masks of the whole problem, and plays no part.
    """
    alone = replace(context, calibration_loss=None)
    return [
        run_inner(inner, part, alone, seed=seed, seconds=seconds, start=start)
        for (part, seed, start), seconds in zip(parts, context.deadline.shares(len(parts)), strict=True)
    ]


def best_of(
    problem: SelectionProblem,
    context: Context,
    runs: Sequence[tuple[Solver, int]],
    start_of: Callable[[int, Mask | None], Mask | None],
) -> Proposal:
    """Run solvers one after another in shares of the time, and keep the best mask.

    It is the one of lowest objective, or of lowest calibration loss where a callback is given; a given start takes
    part. A lower bound proven by any run holds for the problem, so the largest is passed on.

    Parameters
    ----------
    problem : SelectionProblem
    context : Context
    runs : sequence of (solver, seed)
    start_of : callable
        (number of the run, best mask so far) → the mask it starts from.
    """
    judge = context.calibration_loss or problem.value
    best, winner = context.start, -1
    best_score = math.inf if best is None else judge(best)
    proposals: list[Proposal] = []
    for number, seconds in enumerate(context.deadline.shares(len(runs))):
        if best is not None and context.deadline.expired():
            break
        solver, seed = runs[number]
        start = start_of(number, best)
        proposals.append(run_inner(solver, problem, context, seed=seed, seconds=seconds, start=start))
        score = judge(proposals[-1].pruned)
        if best is None or score < best_score:
            best, best_score, winner = proposals[-1].pruned, score, number
            context.record(problem.value(best), proposals[-1].bound)
    assert best is not None
    bound = max((p.bound for p in proposals), default=-math.inf)
    statistics = {"runs": float(len(proposals)), "winner": float(winner)}
    return merged(best, proposals, context, bound=bound, statistics=statistics)


def merged(
    pruned: Mask,
    proposals: Iterable[Proposal],
    context: Context,
    *,
    bound: float = -math.inf,
    statistics: Mapping[str, float] | None = None,
) -> Proposal:
    """A proposal made of several: all their repairs, and the first reason to stop that is not completion."""
    reasons = [p.reason for p in proposals if p.reason is not Reason.COMPLETED]
    return Proposal(
        pruned,
        bound=bound,
        reason=Reason.TIME_LIMIT if context.deadline.expired() else next(iter(reasons), Reason.COMPLETED),
        repairs=tuple(dict.fromkeys(repair for p in proposals for repair in p.repairs)),
        statistics=statistics or {},
    )
