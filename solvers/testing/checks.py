"""The single checks of the conformance kit. Each raises AssertionError, or NotApplicable where nothing applies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from solvers.block import QuadraticBlock
from solvers.problem import Mask, SelectionProblem
from solvers.solution import Status
from solvers.solver import Capability
from solvers.solving import solve
from solvers.testing.instances import random_problem
from solvers.testing.subject import (
    BOUND_ROUNDING,
    NotApplicable,
    Subject,
    each,
    ignore,
    optimum_of,
    same_value,
    told,
    tolerance_of,
)


def check_feasibility(subject: Subject) -> None:
    """Exactly n_prune weights are removed, whatever the problem looks like."""
    each(subject, lambda problem: ignore(subject.solve(problem)))


def check_inputs_untouched(subject: Subject) -> None:
    """The arrays of the problem are not modified."""
    for objective in subject.objectives:
        problem = next(subject.problems(objective, ("plain",)))
        before = [(b.weights.clone(), *(a.clone() for a in b.curvature.digest_arrays())) for b in problem.blocks]
        subject.solve(problem)
        for block, arrays in zip(problem.blocks, before, strict=True):
            after = (block.weights, *block.curvature.digest_arrays())
            same = all(torch.equal(one, other) for one, other in zip(after, arrays, strict=True))
            assert same, f"the arrays of {told(problem)} were changed; work on copies"


def check_determinism(subject: Subject) -> None:
    """The same seed gives the same mask."""
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain", "ties")):
            first, second = subject.solve(problem, seed=3), subject.solve(problem, seed=3)
            same = np.array_equal(first.pruned, second.pruned)
            assert same, f"two runs with seed 3 differ on {told(problem)}; draw only from context.rng()"


def check_bounds(subject: Subject) -> None:
    """bound ≤ optimum ≤ objective, against brute force."""

    def judge(problem: SelectionProblem) -> None:
        solution, optimum = subject.solve(problem), optimum_of(problem)
        slack = tolerance_of(problem, optimum)
        assert solution.objective >= optimum - slack, (
            f"objective {solution.objective!r} is below the optimum {optimum!r} on {told(problem)}; "
            "please report this: the framework computes it"
        )
        limit = optimum + BOUND_ROUNDING * abs(optimum)
        assert solution.bound <= limit, f"bound {solution.bound!r} exceeds the optimum {optimum!r} on {told(problem)}"
        if not subject.can(Capability.BOUND):
            assert solution.bound == -math.inf, "it returns a bound without declaring Capability.BOUND"

    each(subject, judge)


def check_exactness(subject: Subject) -> None:
    """An EXACT solver finds the optimum, and says so on problems that are not degenerate."""
    if not subject.can(Capability.EXACT):
        raise NotApplicable("EXACT is not declared")

    def judge(problem: SelectionProblem) -> None:
        solution, optimum = subject.solve(problem), optimum_of(problem)
        assert abs(solution.objective - optimum) <= tolerance_of(problem, optimum), (
            f"objective {solution.objective!r}, but the optimum is {optimum!r} on {told(problem)}"
        )

    each(subject, judge)
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain",)):
            solution = subject.solve(problem)
            assert solution.status is Status.OPTIMAL, (
                f"optimality of {told(problem)} was not proven: bound {solution.bound!r}, "
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
            same_value(subject, problem, SelectionProblem([turned], problem.n_prune, objective), 1.0)


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
                same_value(subject, problem, SelectionProblem([scaled], problem.n_prune, objective), unit**2)


def check_trivial_budgets(subject: Subject) -> None:
    """n_prune = 0, n_prune = n, and problems of one weight."""
    for objective in subject.objectives:
        for n in (1, 4):
            problem = random_problem(subject.seed, objective, n=n, linear=False, kinds=("plain",))
            for n_prune in (0, n):
                solution = subject.solve(problem.with_n_prune(n_prune))
                proven = solution.status is Status.OPTIMAL
                assert proven, f"n={n}, n_prune={n_prune} has one mask only, which must be called optimal"


def check_warm_start(subject: Subject) -> None:
    """A solver with WARM_START never returns a mask worse than its start."""
    if not subject.can(Capability.WARM_START):
        raise NotApplicable("WARM_START is not declared")
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain", "heavy_tailed")):
            best = solve(problem, "brute_force", with_refit=False)
            solution = subject.solve(problem, start=best.pruned.copy())
            assert solution.objective <= best.objective + tolerance_of(problem, best.objective), (
                f"started from a mask of objective {best.objective!r} it returned {solution.objective!r} "
                f"on {told(problem)}"
            )


def check_own_weights(subject: Subject) -> None:
    """A solver with OWN_WEIGHTS proposes weights with every mask, no better than the refit; others propose none."""
    declared = subject.can(Capability.OWN_WEIGHTS)
    for objective in subject.objectives:
        for problem in subject.problems(objective, ("plain",)):
            solution = subject.solve(problem)
            assert (solution.own_weights is not None) == declared, f"OWN_WEIGHTS is not as declared on {told(problem)}"
            slack = tolerance_of(problem, solution.refit_objective)
            assert not declared or solution.own_objective >= solution.refit_objective - slack


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
            solution, optimum = subject.solve(problem), optimum_of(problem)
            times = [point.seconds for point in solution.trace]
            assert times == sorted(times), f"the trace runs backwards in time on {told(problem)}"
            limit = optimum + BOUND_ROUNDING * abs(optimum)
            worst = max((point.bound for point in solution.trace), default=-math.inf)
            assert worst <= limit, f"the trace has a bound {worst!r} above the optimum {optimum!r} on {told(problem)}"


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_feasibility,
    check_inputs_untouched,
    check_determinism,
    check_bounds,
    check_exactness,
    check_permutation,
    check_scaling,
    check_trivial_budgets,
    check_warm_start,
    check_calibration,
    check_own_weights,
    check_time_limit,
    check_trace,
)
