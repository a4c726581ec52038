"""The single checks of the conformance kit. Each raises AssertionError, or NotApplicable where nothing applies."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from solvers.block import QuadraticBlock
from solvers.budget import Budget
from solvers.curvature import Unmeasured
from solvers.errors import CapabilityError, CBSError, ProblemError, SingularHessianError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.solution import Solution, Status
from solvers.solver import CalibrationLoss, Capability, Need, Solver
from solvers.solving import solve
from solvers.testing.instances import CURVATURES, KINDS, random_problem, with_curvature

#: Relative to the objective, and absolute relative to the problem's scale, where an optimum must be met.
RELATIVE = 1e-6
ABSOLUTE = 1e-11
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
        count = int(solution.pruned.sum())
        assert count == problem.n_prune, f"removed {count} of {problem.n_prune} weights on {_told(problem)}"
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


def _told(problem: SelectionProblem) -> str:
    names = ", ".join(block.name for block in problem.blocks)
    return f"random problem {names!r} (n={problem.n}, n_prune={problem.n_prune}, {problem.objective.value})"


def _optimum(problem: SelectionProblem) -> float:
    return solve(problem, "brute_force", with_refit=False).objective


def _ignore(solution: Solution) -> None:
    """Solving was the check."""
    del solution


def _tolerance(problem: SelectionProblem, value: float) -> float:
    return RELATIVE * abs(value) + ABSOLUTE * problem.scale


def check_declaration(subject: Subject) -> None:
    """Name, summary, capabilities and options are there and make sense together."""
    solver = subject.solver
    assert isinstance(solver.name, str) and solver.name.isidentifier(), f"name {solver.name!r} must be an identifier"
    assert isinstance(solver.summary, str) and solver.summary.strip(), "summary must say what the solver does"
    stray = [c for c in solver.capabilities if not isinstance(c, Capability)]
    assert not stray, f"capabilities must be members of solvers.Capability, not {stray}"
    assert subject.objectives, "capabilities must contain SELECTION or JOINT"
    if subject.can(Capability.EXACT):
        assert subject.can(Capability.BOUND), "an EXACT solver proves optimality through a bound: declare BOUND too"
    for field in dataclasses.fields(solver):
        assert field.metadata.get("help"), f"option {field.name!r} has no help; declare it with solvers.option(...)"
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        assert not missing, f"option {field.name!r} has no default; name[...] must work without naming every option"
    assert dataclasses.is_dataclass(solver) and solver.__dataclass_params__.frozen, (  # type: ignore[attr-defined]
        "a solver must be a frozen dataclass: decorate the class with @dataclass(frozen=True)"
    )


def check_feasibility(subject: Subject) -> None:
    """Exactly n_prune weights are removed, whatever the problem looks like."""
    _each(subject, lambda problem: _ignore(subject.solve(problem)))


def check_inputs_untouched(subject: Subject) -> None:
    """The arrays of the problem are not modified."""
    for objective in subject.objectives:
        problem = next(subject.problems(objective, ("plain",)))
        before = [(b.weights.clone(), *(a.clone() for a in b.curvature.digest_arrays())) for b in problem.blocks]
        subject.solve(problem)
        for block, arrays in zip(problem.blocks, before, strict=True):
            after = (block.weights, *block.curvature.digest_arrays())
            same = all(torch.equal(one, other) for one, other in zip(after, arrays, strict=True))
            assert same, f"the arrays of {_told(problem)} were changed; work on copies"


def check_determinism(subject: Subject) -> None:
    """The same seed gives the same mask."""
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain", "ties")):
            first, second = subject.solve(problem, seed=3), subject.solve(problem, seed=3)
            same = np.array_equal(first.pruned, second.pruned)
            assert same, f"two runs with seed 3 differ on {_told(problem)}; draw only from context.rng()"


def check_bounds(subject: Subject) -> None:
    """bound ≤ optimum ≤ objective, against brute force."""

    def judge(problem: SelectionProblem) -> None:
        solution, optimum = subject.solve(problem), _optimum(problem)
        slack = _tolerance(problem, optimum)
        assert solution.objective >= optimum - slack, (
            f"objective {solution.objective!r} is below the optimum {optimum!r} on {_told(problem)}; "
            "please report this: the framework computes it"
        )
        limit = optimum + BOUND_ROUNDING * abs(optimum) + ABSOLUTE * problem.scale
        assert solution.bound <= limit, f"bound {solution.bound!r} exceeds the optimum {optimum!r} on {_told(problem)}"
        if not subject.can(Capability.BOUND):
            assert solution.bound == -math.inf, "it returns a bound without declaring Capability.BOUND"

    _each(subject, judge)


def check_exactness(subject: Subject) -> None:
    """An EXACT solver finds the optimum, and says so on problems that are not degenerate."""
    if not subject.can(Capability.EXACT):
        raise NotApplicable("EXACT is not declared")

    def judge(problem: SelectionProblem) -> None:
        solution, optimum = subject.solve(problem), _optimum(problem)
        assert abs(solution.objective - optimum) <= _tolerance(problem, optimum), (
            f"objective {solution.objective!r}, but the optimum is {optimum!r} on {_told(problem)}"
        )

    _each(subject, judge)
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain",)):
            solution = subject.solve(problem)
            assert solution.status is Status.OPTIMAL, (
                f"optimality of {_told(problem)} was not proven: bound {solution.bound!r}, "
                f"objective {solution.objective!r}, {solution.reason.value}"
            )


def check_permutation(subject: Subject) -> None:
    """Renumbering the weights changes nothing (required of EXACT solvers; heuristics must stay feasible)."""
    for objective in subject.objectives:
        for at, problem in enumerate(subject.problems(objective, ("plain", "duplicate_columns"))):
            order = np.random.default_rng(at).permutation(problem.n)
            block = problem.blocks[0]
            turned = QuadraticBlock(
                block.weights[order],
                block.factor[:, order],
                block.damping,
                None if block.gradient is None else block.gradient[order],
                f"{block.name} permuted",
            )
            _same_value(subject, problem, SelectionProblem([turned], problem.n_prune, objective), 1.0)


def check_scaling(subject: Subject) -> None:
    """Multiplying H and g by 2²⁰ or 2⁻²⁰ multiplies the optimum (required of EXACT solvers, as above)."""
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain",)):
            for power in (-10, 10):
                unit = 2.0**power
                block = problem.blocks[0]
                scaled = QuadraticBlock(
                    block.weights,
                    block.factor * unit,
                    block.damping * unit**2,
                    None if block.gradient is None else block.gradient * unit**2,
                    f"{block.name} times {unit:g}",
                )
                _same_value(subject, problem, SelectionProblem([scaled], problem.n_prune, objective), unit**2)


def _same_value(subject: Subject, one: SelectionProblem, other: SelectionProblem, factor: float) -> None:
    first, second = subject.solve(one).objective * factor, subject.solve(other).objective
    if subject.can(Capability.EXACT):
        assert abs(first - second) <= 2 * _tolerance(other, second), (
            f"{_told(other)} has the objective {second!r} where {first!r} was expected from {_told(one)}"
        )


def check_trivial_budgets(subject: Subject) -> None:
    """n_prune = 0, n_prune = n, and problems of one weight."""
    for objective in subject.objectives:
        for n in (1, 4):
            problem = random_problem(subject.seed, objective, n=n, linear=False, kinds=("plain",))
            for n_prune in (0, n):
                solution = subject.solve(problem.with_n_prune(n_prune))
                proven = solution.status is Status.OPTIMAL
                assert proven, f"n={n}, n_prune={n_prune} has one mask only, which must be called optimal"


def check_linear_term(subject: Subject) -> None:
    """With LINEAR_TERM the gradient matters; without it a problem with a gradient is refused."""
    for objective in subject.objectives:
        problem = random_problem(subject.seed + 5, objective, n=subject.size(8), linear=True, kinds=("plain",))
        if subject.can(Capability.LINEAR_TERM):
            solution, optimum = subject.solve(problem), _optimum(problem)
            assert solution.bound <= optimum + _tolerance(problem, optimum), (
                f"bound {solution.bound!r} exceeds the optimum {optimum!r} with a gradient: {_told(problem)}"
            )
            if subject.can(Capability.EXACT):
                assert abs(solution.objective - optimum) <= _tolerance(problem, optimum), (
                    f"objective {solution.objective!r} is not the optimum {optimum!r} with a gradient: {_told(problem)}"
                )
        else:
            _refused(subject, problem, "a gradient")


def check_several_blocks(subject: Subject) -> None:
    """With GLOBAL_BUDGET blocks share n_prune; without it several blocks are refused."""
    for objective in subject.objectives:
        linear = subject.linear(None)
        for index in range(subject.instances):
            n = subject.size(min(subject.largest, 9))
            problem = random_problem(
                subject.seed + 31 + index, objective, n=n, n_blocks=min(3, n), kinds=("plain",), linear=linear
            )
            if not subject.can(Capability.GLOBAL_BUDGET):
                _refused(subject, problem, "several blocks")
                continue
            solution, optimum = subject.solve(problem), _optimum(problem)
            limit = optimum + _tolerance(problem, optimum)
            assert solution.bound <= limit, f"bound {solution.bound!r} exceeds {optimum!r} on {_told(problem)}"
            if subject.can(Capability.EXACT):
                assert solution.objective <= limit, f"{solution.objective!r} is not {optimum!r} on {_told(problem)}"


def check_undeclared_objective(subject: Subject) -> None:
    """An objective that is not declared is refused."""
    missing = [o for o in Objective if o not in subject.objectives]
    if not missing:
        raise NotApplicable("both objectives are declared")
    problem = random_problem(subject.seed, missing[0], n=subject.size(6), kinds=("plain",), linear=False)
    _refused(subject, problem, f"the {missing[0].value} objective")


def _refused(subject: Subject, problem: SelectionProblem, what: str) -> None:
    try:
        subject.solve(problem)
    except CapabilityError:
        return
    raise AssertionError(f"{what} is not among the capabilities, yet {_told(problem)} was accepted")


def check_curvatures(subject: Subject) -> None:
    """It runs on every kind of curvature it declares, correctly, and refuses the others."""
    for objective in subject.objectives:
        for kind in CURVATURES:
            for index in range(subject.instances):
                n, linear = subject.size(min(subject.largest, 9)), subject.linear(None)
                drawn = random_problem(subject.seed + 61 + index, objective, n=n, kinds=("plain",), linear=linear)
                problem = with_curvature(drawn, kind)
                if not issubclass(kind, subject.solver.curvatures):
                    _refused(subject, problem, f"a {kind.__name__} curvature")
                    continue
                solution, optimum = subject.solve(problem), _optimum(problem)
                limit = optimum + _tolerance(problem, optimum)
                told = f"{_told(problem)} with a {kind.__name__} curvature"
                assert solution.objective >= optimum - _tolerance(problem, optimum), f"below the optimum on {told}"
                assert solution.bound <= limit, f"bound {solution.bound!r} exceeds {optimum!r} on {told}"
                if subject.can(Capability.EXACT):
                    assert solution.objective <= limit, f"{solution.objective!r} is not {optimum!r} on {told}"


def check_needs(subject: Subject) -> None:
    """Without a curvature it works if it needs none, and is refused otherwise."""
    for objective in subject.objectives:
        drawn = random_problem(
            subject.seed, objective, n=subject.size(6), linear=subject.linear(None), kinds=("plain",)
        )
        blocks = [
            QuadraticBlock(b.weights, curvature=Unmeasured(b.n), gradient=b.gradient, name=b.name) for b in drawn.blocks
        ]
        problem = SelectionProblem(blocks, drawn.n_prune, objective)
        if Need.CURVATURE in subject.solver.needs:
            _refused(subject, problem, "a problem without curvature")
        else:
            value = subject.solve(problem).objective
            assert math.isnan(value), f"without a curvature the objective must be nan, not {value!r}"


@dataclass(frozen=True)
class _OtherBudget(Budget):
    """A budget that no solver knows."""

    k: int

    @property
    def n_prune(self) -> int:
        return self.k

    def check(self, n: int) -> None:
        """Every number fits."""

    def violation(self, pruned: Mask) -> str:
        return "" if int(pruned.sum()) == self.k else "another number is removed"


def check_budgets(subject: Subject) -> None:
    """A kind of budget that is not declared is refused."""
    problem = random_problem(subject.seed, subject.objectives[0], n=subject.size(6), linear=subject.linear(None))
    assert subject.solver.budgets, "budgets must name at least one kind"
    unheard = SelectionProblem(problem.blocks, _OtherBudget(problem.n_prune), problem.objective)
    if any(issubclass(_OtherBudget, kind) for kind in subject.solver.budgets):
        raise NotApplicable("it declares every budget")
    _refused(subject, unheard, "a budget of another kind")


def check_warm_start(subject: Subject) -> None:
    """A solver with WARM_START never returns a mask worse than its start."""
    if not subject.can(Capability.WARM_START):
        raise NotApplicable("WARM_START is not declared")
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain", "heavy_tailed")):
            best = solve(problem, "brute_force", with_refit=False)
            solution = subject.solve(problem, start=best.pruned.copy())
            assert solution.objective <= best.objective + _tolerance(problem, best.objective), (
                f"started from a mask of objective {best.objective!r} it returned {solution.objective!r} "
                f"on {_told(problem)}"
            )


def check_calibration(subject: Subject) -> None:
    """A solver with CALIBRATION calls the loss with feasible masks only, and survives one that is constant."""
    if not subject.can(Capability.CALIBRATION):
        raise NotApplicable("CALIBRATION is not declared")
    for objective in subject.objectives:
        problem = next(subject.problems(objective, ("plain",)))
        counts: list[int] = []

        def loss(pruned: Mask, counts: list[int] = counts) -> float:
            counts.append(int(pruned.sum()))
            return 1.0

        subject.solve(problem, calibration_loss=loss)
        wrong = [count for count in counts if count != problem.n_prune]
        assert not wrong, f"the calibration loss was called with {wrong[0]} weights removed, not {problem.n_prune}"


def check_time_limit(subject: Subject) -> None:
    """A solver with TIME_LIMIT comes back, with a feasible mask, soon after a limit it cannot work within."""
    if not subject.can(Capability.TIME_LIMIT):
        raise NotApplicable("TIME_LIMIT is not declared")
    for objective in subject.objectives:
        n = subject.size(60)
        linear = subject.linear(False)
        problem = random_problem(subject.seed + 7, objective, n=n, kinds=("heavy_tailed",), linear=linear)
        problem = problem.with_n_prune(n // 2)
        # Compilation and imports are paid once and are not what is checked.
        subject.solve(problem, time_limit=0.01)
        began = time.monotonic()
        subject.solve(problem, time_limit=0.5)
        seconds = time.monotonic() - began
        # Far above the limit on purpose: a busy machine must not fail this, a solver that ignores its deadline should.
        assert seconds < 30.0, f"a limit of 0.5 s took {seconds:.1f} s on n={n}; check context.deadline more often"


def check_trace(subject: Subject) -> None:
    """Recorded points are in order of time, and their bounds never exceed the optimum."""
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain",)):
            solution, optimum = subject.solve(problem), _optimum(problem)
            times = [point.seconds for point in solution.trace]
            assert times == sorted(times), f"the trace runs backwards in time on {_told(problem)}"
            limit = optimum + BOUND_ROUNDING * abs(optimum) + ABSOLUTE * problem.scale
            worst = max((point.bound for point in solution.trace), default=-math.inf)
            assert worst <= limit, f"the trace has a bound {worst!r} above the optimum {optimum!r} on {_told(problem)}"


def _each(subject: Subject, judge: Callable[[SelectionProblem], None]) -> None:
    """Apply `judge` to every problem; singular ones that the solver refuses are left out."""
    for objective in subject.objectives:
        for problem in subject.problems(objective):
            try:
                judge(problem)
            except NotApplicable:
                continue
            except CBSError as error:
                raise AssertionError(f"{type(error).__name__} on {_told(problem)}: {error}") from error


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_declaration,
    check_feasibility,
    check_inputs_untouched,
    check_determinism,
    check_bounds,
    check_exactness,
    check_permutation,
    check_scaling,
    check_trivial_budgets,
    check_linear_term,
    check_several_blocks,
    check_undeclared_objective,
    check_curvatures,
    check_needs,
    check_budgets,
    check_warm_start,
    check_calibration,
    check_time_limit,
    check_trace,
)
