"""A solver under test, the problems it is tested on, and what its results are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from solvers.errors import CapabilityError, CBSError, ProblemError, SingularHessianError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.solution import Solution
from solvers.solver import CalibrationLoss, Capability, Solver
from solvers.solving import solve
from solvers.testing.instances import KINDS, random_problem
from solvers.verify import rounding_of

#: Relative to the objective, where an optimum must be met.
RELATIVE = 1e-6
#: A claimed bound may exceed the optimum by rounding only.
BOUND_ROUNDING = 1e-9


class NotApplicable(Exception):
    """The check has nothing to check for this solver."""


@dataclass(frozen=True)
class Subject:
    """A solver under test, and how hard to test it."""

    solver: Solver
    seed: int
    instances: int
    largest: int
    time_limit: float

    def can(self, capability: Capability) -> bool:
        """Whether the solver declares it."""
        return capability in self.solver.capabilities

    @property
    def objectives(self) -> list[Objective]:
        """Those it declares."""
        return [o for o in Objective if self.can(Capability(o.value))]

    @cached_property
    def needs_gradient(self) -> bool:
        """Whether it refuses problems without one, as a first-order rule has to."""
        problem = random_problem(self.seed, self.objectives[0], n=self.size(4), linear=False, kinds=("plain",))
        try:
            self.solve(problem)
        except NotApplicable:
            return True
        except (CBSError, AssertionError):
            # Whatever else is wrong with it is for the checks to find.
            return False
        return False

    def linear(self, wanted: bool | None) -> bool | None:
        """Whether a problem has a gradient, given what the solver declares and needs; None lets chance decide."""
        if not self.can(Capability.LINEAR_TERM):
            return False
        return True if self.needs_gradient else wanted

    def size(self, wanted: int) -> int:
        """`wanted` weights, or as many as the solver takes."""
        limit = self.solver.max_weights
        return wanted if limit is None else min(wanted, limit)

    def solve(
        self,
        problem: SelectionProblem,
        *,
        seed: int = 0,
        start: Mask | None = None,
        time_limit: float | None = None,
        calibration_loss: CalibrationLoss | None = None,
    ) -> Solution:
        """Solve within the limit for small problems; feasibility is asserted."""
        limit = self.time_limit if time_limit is None else time_limit
        try:
            solution = solve(
                problem,
                self.solver,
                seed=seed,
                start=start,
                calibration_loss=calibration_loss,
                time_limit=limit if self.can(Capability.TIME_LIMIT) else None,
            )
        except SingularHessianError:
            if any(block.damping == 0.0 for block in problem.blocks):
                raise NotApplicable("it refuses a singular H, as it may") from None
            raise
        except ProblemError as error:
            if self.can(Capability.LINEAR_TERM) and not problem.has_gradient and "gradient" in str(error):
                raise NotApplicable("it refuses problems without a gradient, as it may") from None
            raise
        violation = problem.budget.violation(solution.pruned)
        assert not violation, f"on {told(problem)} the budget is not kept: {violation}"
        return solution

    def problems(self, objective: Objective, kinds: tuple[str, ...] = KINDS) -> Iterator[SelectionProblem]:
        """Random problems of every kind that the solver declares to take."""
        linear = self.linear(None)
        for at, kind in enumerate(kinds):
            for index in range(self.instances):
                yield random_problem(
                    1000 * self.seed + 17 * at + index,
                    objective,
                    kinds=(kind,),
                    linear=linear,
                    largest=self.size(self.largest),
                )


def told(problem: SelectionProblem) -> str:
    """A problem in words, for messages."""
    names = ", ".join(block.name for block in problem.blocks)
    return f"random problem {names!r} ({problem!r})"


def optimum_of(problem: SelectionProblem) -> float:
    """By brute force."""
    return solve(problem, "brute_force", with_refit=False).objective


def ignore(solution: Solution) -> None:
    """Solving was the check."""
    del solution


def tolerance_of(problem: SelectionProblem, value: float) -> float:
    """Within which an optimum must be met."""
    return RELATIVE * abs(value) + rounding_of(problem, np.ones(problem.n, dtype=bool), None)


def refused(subject: Subject, problem: SelectionProblem, what: str) -> None:
    """Assert that the solver refuses a problem for what it does not declare."""
    try:
        subject.solve(problem)
    except CapabilityError:
        return
    raise AssertionError(f"{what} is not among the capabilities, yet {told(problem)} was accepted")


def same_value(subject: Subject, one: SelectionProblem, other: SelectionProblem, factor: float) -> None:
    """Assert that an EXACT solver finds the same optimum, times `factor`, for both problems."""
    first, second = subject.solve(one).objective * factor, subject.solve(other).objective
    if subject.can(Capability.EXACT):
        assert abs(first - second) <= 2 * tolerance_of(other, second), (
            f"{told(other)} has the objective {second!r} where {first!r} was expected from {told(one)}"
        )


def each(subject: Subject, judge: Callable[[SelectionProblem], None]) -> None:
    """Apply `judge` to every problem; singular ones that the solver refuses are left out."""
    for objective in subject.objectives:
        for problem in subject.problems(objective):
            try:
                judge(problem)
            except NotApplicable:
                continue
            except CBSError as error:
                raise AssertionError(f"{type(error).__name__} on {told(problem)}: {error}") from error
