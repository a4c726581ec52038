"""Checks of the conformance kit that hold a solver to what it declares: what it does not, it must refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from solvers.block import QuadraticBlock
from solvers.budget import Budget, Groups, Knapsack, Partitioned
from solvers.curvature import Unmeasured
from solvers.errors import CapabilityError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.solution import Status
from solvers.solver import Capability, Need
from solvers.testing.instances import CURVATURES, random_problem, with_curvature
from solvers.testing.subject import NotApplicable, Subject, optimum_of, refused, told, tolerance_of


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


def check_linear_term(subject: Subject) -> None:
    """With LINEAR_TERM the gradient matters; without it a problem with a gradient is refused."""
    for objective in subject.objectives:
        problem = random_problem(subject.seed + 5, objective, n=subject.size(8), linear=True, kinds=("plain",))
        if subject.can(Capability.LINEAR_TERM):
            solution, optimum = subject.solve(problem), optimum_of(problem)
            assert solution.bound <= optimum + tolerance_of(problem, optimum), (
                f"bound {solution.bound!r} exceeds the optimum {optimum!r} with a gradient: {told(problem)}"
            )
            if subject.can(Capability.EXACT):
                assert abs(solution.objective - optimum) <= tolerance_of(problem, optimum), (
                    f"objective {solution.objective!r} is not the optimum {optimum!r} with a gradient: {told(problem)}"
                )
        else:
            refused(subject, problem, "a gradient")


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
                refused(subject, problem, "several blocks")
                continue
            solution, optimum = subject.solve(problem), optimum_of(problem)
            limit = optimum + tolerance_of(problem, optimum)
            assert solution.bound <= limit, f"bound {solution.bound!r} exceeds {optimum!r} on {told(problem)}"
            if subject.can(Capability.EXACT):
                assert solution.objective <= limit, f"{solution.objective!r} is not {optimum!r} on {told(problem)}"


def check_undeclared_objective(subject: Subject) -> None:
    """An objective that is not declared is refused."""
    missing = [o for o in Objective if o not in subject.objectives]
    if not missing:
        raise NotApplicable("both objectives are declared")
    problem = random_problem(subject.seed, missing[0], n=subject.size(6), kinds=("plain",), linear=False)
    refused(subject, problem, f"the {missing[0].value} objective")


def check_curvatures(subject: Subject) -> None:
    """It runs on every kind of curvature it declares, correctly, and refuses the others."""
    for objective in subject.objectives:
        for kind in CURVATURES:
            for index in range(subject.instances):
                n, linear = subject.size(min(subject.largest, 9)), subject.linear(None)
                drawn = random_problem(subject.seed + 61 + index, objective, n=n, kinds=("plain",), linear=linear)
                problem = with_curvature(drawn, kind)
                if not issubclass(kind, subject.solver.curvatures):
                    refused(subject, problem, f"a {kind.__name__} curvature")
                    continue
                solution, optimum = subject.solve(problem), optimum_of(problem)
                limit = optimum + tolerance_of(problem, optimum)
                where = f"{told(problem)} with a {kind.__name__} curvature"
                assert solution.objective >= optimum - tolerance_of(problem, optimum), f"below the optimum on {where}"
                assert solution.bound <= limit, f"bound {solution.bound!r} exceeds {optimum!r} on {where}"
                if subject.can(Capability.EXACT):
                    assert solution.objective <= limit, f"{solution.objective!r} is not {optimum!r} on {where}"


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
            refused(subject, problem, "a problem without curvature")
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


def check_partitions(subject: Subject) -> None:
    """With Partitioned among its budgets it keeps the count of every group, also of groups that interact."""
    if not issubclass(Partitioned, subject.solver.budgets):
        raise NotApplicable("it does not declare Partitioned")
    for objective in subject.objectives:
        for index in range(3 * subject.instances):
            n, linear = subject.size(min(subject.largest, 9)), subject.linear(None)
            drawn = random_problem(
                subject.seed + 91 + index, objective, n=n, n_blocks=1 + index % 2, kinds=("plain",), linear=linear
            )
            sizes = [n // 2, n - n // 2] if index else [2] * (n // 2) + [1] * (n % 2)
            problem = drawn.with_budget(Partitioned(tuple(sizes), tuple((size + 1) // 2 for size in sizes)))
            # Groups of whole rows, say, are not found in every block.
            with contextlib.suppress(CapabilityError):
                against_optimum(subject, problem, f"groups of {sizes}")


def check_groups(subject: Subject) -> None:
    """Groups that go whole do so, natively or by way of a problem over them; what it does not take it refuses."""
    for objective in subject.objectives:
        for index in range(2 * subject.instances):
            n, linear = subject.size(min(subject.largest, 9)), subject.linear(None)
            drawn = random_problem(
                subject.seed + 121 + index, objective, n=n, n_blocks=1 + index % 2, kinds=("plain",), linear=linear
            )
            labels = np.random.default_rng(index).permutation(np.arange(n) % ((n + 1) // 2))
            problem = drawn.with_budget(Groups(labels, max(1, n // 4)))
            try:
                against_optimum(subject, problem, "groups")
            except CapabilityError:
                assert not issubclass(Groups, subject.solver.budgets), f"Groups are declared, refused {told(problem)}"


def check_knapsacks(subject: Subject) -> None:
    """What stays keeps the limit on its cost, whether costs are taken natively or turned into counts, or is refused."""
    for objective in subject.objectives:
        for index in range(3 * subject.instances):
            n, linear = subject.size(min(subject.largest, 9)), subject.linear(None)
            drawn = random_problem(
                subject.seed + 151 + index, objective, n=n, n_blocks=1 + index % 2, kinds=("plain",), linear=linear
            )
            rng = np.random.default_rng(index)
            # Of each weight its own, of ranges of weights, of groups, and two at once.
            costs = rng.integers(1, 5, (1 + (index % 5 == 4), n)).astype(np.float64)
            labels = None
            if index % 3 == 1:
                costs = np.sort(np.minimum(costs, 2.0), axis=1)
            elif index % 3 == 2:
                labels = np.arange(n) // 2
                costs = costs[:, : (n + 1) // 2]
            problem = drawn.with_budget(Knapsack(costs, costs.sum(1) * rng.uniform(0.2, 0.8), labels))
            try:
                against_optimum(subject, problem, "costs")
            except CapabilityError:
                assert not issubclass(Knapsack, subject.solver.budgets) or labels is not None, (
                    f"Knapsack is declared, refused {told(problem)}"
                )


def against_optimum(subject: Subject, problem: SelectionProblem, what: str) -> None:
    """Hold a solution to brute force: no better, bounded below the optimum, equal to it where the solver is exact."""
    solution, optimum = subject.solve(problem), optimum_of(problem)
    limit, where = optimum + tolerance_of(problem, optimum), f"{told(problem)} with {what}"
    assert solution.objective >= optimum - tolerance_of(problem, optimum), f"below the optimum on {where}"
    assert solution.bound <= limit, f"bound {solution.bound!r} exceeds {optimum!r} on {where}"
    if subject.can(Capability.EXACT):
        assert solution.objective <= limit, f"{solution.objective!r} is not {optimum!r} on {where}"
        # Programs of others compute to tolerances of their own, so that a bound of theirs may stay a little below.
        near = bool(subject.solver.requires) and solution.bound >= optimum - 1e-3 * max(1.0, abs(optimum))
        assert near or solution.status is Status.OPTIMAL, f"optimality was not proven on {where}"


def check_budgets(subject: Subject) -> None:
    """A kind of budget that is not declared is refused."""
    problem = random_problem(subject.seed, subject.objectives[0], n=subject.size(6), linear=subject.linear(None))
    assert subject.solver.budgets, "budgets must name at least one kind"
    unheard = SelectionProblem(problem.blocks, _OtherBudget(problem.n_prune), problem.objective)
    if any(issubclass(_OtherBudget, kind) for kind in subject.solver.budgets):
        raise NotApplicable("it declares every budget")
    refused(subject, unheard, "a budget of another kind")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_declaration,
    check_linear_term,
    check_several_blocks,
    check_undeclared_objective,
    check_curvatures,
    check_needs,
    check_budgets,
    check_partitions,
    check_groups,
    check_knapsacks,
)
