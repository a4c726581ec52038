"""solve(): refusals before work, verification after it, and the registry's grammar."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

import solvers
from solvers import (
    BackendError,
    Capability,
    CapabilityError,
    OptionError,
    Proposal,
    Solver,
    Status,
    UnknownNameError,
    option,
)
from solvers.registry import make_solver, split_outside_brackets
from tests.conftest import random_problem

EVERYTHING = frozenset(Capability)


@dataclass(frozen=True)
class Fixed(Solver):
    """Removes the first weights and claims whatever bound it is told to."""

    name = "fixed"
    summary = "a deliberately silly solver"
    capabilities = EVERYTHING

    bound: float = option(-math.inf, "claimed bound")
    count: int = option(-1, "weights to remove; -1 for the right number", minimum=-1)
    crash: bool = option(False, "raise an error")
    lie: bool = option(False, "claim a bound that is not a number")

    def run(self, problem, context):
        if self.crash:
            raise ZeroDivisionError("on purpose")
        count = problem.n_prune if self.count < 0 else self.count
        return Proposal(np.arange(problem.n) < count, bound=math.nan if self.lie else self.bound)


@dataclass(frozen=True)
class Limited(Fixed):
    """The same, able to do nothing in particular."""

    name = "limited"
    capabilities = frozenset({Capability.SELECTION})
    max_weights = 10


PROBLEM = random_problem(0, (6,), 3)


def test_figures_are_recomputed():
    solution = solvers.solve(PROBLEM, Fixed())
    pruned = np.arange(6) < 3
    assert solution.objective == PROBLEM.selection_value(pruned)
    assert solution.refit_objective == pytest.approx(PROBLEM.joint_value(pruned))
    assert solution.refit_objective < solution.objective
    assert solution.status is Status.FEASIBLE
    assert solution.gap == math.inf
    assert not solution.pruned.flags.writeable


def test_optimal_only_with_a_bound_that_meets_the_objective():
    value = solvers.solve(PROBLEM, Fixed()).objective
    assert solvers.solve(PROBLEM, Fixed(bound=value)).status is Status.OPTIMAL
    assert solvers.solve(PROBLEM, Fixed(bound=value * (1 - 1e-9))).status is Status.OPTIMAL
    loose = solvers.solve(PROBLEM, Fixed(bound=0.9 * value))
    assert loose.status is Status.FEASIBLE
    assert loose.gap == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Fixed(bound=1e9), "the bound is wrong"),
        (Fixed(lie=True), "not a number"),
        (Fixed(count=2), "removes 2 weights"),
        (Fixed(crash=True), "ZeroDivisionError: on purpose"),
    ],
)
def test_a_backend_that_lies_or_crashes_is_caught(solver, message):
    with pytest.raises(BackendError, match=message):
        solvers.solve(PROBLEM, solver)


def test_nan_options_are_refused():
    with pytest.raises(OptionError, match="must be a number"):
        Fixed(bound=math.nan)


@pytest.mark.parametrize(
    ("problem", "arguments", "message"),
    [
        (PROBLEM.with_objective("joint"), {}, "joint objective"),
        (random_problem(0, (3, 3), 2), {}, "allocation='uniform'"),
        (random_problem(0, (6,), 2, gradient=True), {}, "without_gradient"),
        (random_problem(0, (11,), 2), {}, "at most 10 weights"),
        (PROBLEM, {"time_limit": 1.0}, "time limit"),
        (PROBLEM, {"start": np.arange(6) < 3}, "start"),
    ],
)
def test_undeclared_capabilities_are_refused(problem, arguments, message):
    with pytest.raises(CapabilityError, match=message):
        solvers.solve(problem, Limited(), **arguments)


def test_bad_arguments_are_refused():
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(OptionError, match="time_limit"):
            solvers.solve(PROBLEM, Fixed(), time_limit=limit)
    with pytest.raises(solvers.ProblemError, match="exactly 3"):
        solvers.solve(PROBLEM, Fixed(), start=np.arange(6) < 2)


@pytest.mark.parametrize("n_prune", [0, 6])
def test_trivial_budgets_are_proven(n_prune):
    solution = solvers.solve(PROBLEM.with_n_prune(n_prune), Fixed(crash=True))
    assert solution.n_pruned == n_prune
    assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("rule", ["uniform", "magnitude", "saliency"])
@pytest.mark.parametrize("n_prune", [1, 7, 16])
def test_allocation_shares_the_budget_exactly(rule, n_prune):
    problem = random_problem(3, (4, 9, 4), n_prune)
    solution = solvers.solve(problem, Limited(), allocation=rule)
    assert solution.n_pruned == n_prune
    assert solution.solver == f"limited@{rule}"
    assert solution.bound == -math.inf


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'magnitude'"):
        make_solver("magnitud")
    with pytest.raises(UnknownNameError, match="option of random"):
        make_solver("random[sneed=1]")
    with pytest.raises(UnknownNameError, match="allocation"):
        solvers.solve(random_problem(0, (3, 3), 2), "magnitude", allocation="fair")


def test_option_grammar():
    assert list(split_outside_brackets("a=1,b=x[c=2,d=3],e=4", ",")) == ["a=1", "b=x[c=2,d=3]", "e=4"]
    for text in ("magnitude[a=1", "rmp[draws=1]]", "rmp[draws]", "rmp[draws=1,draws=2]", "rmp[draws=many]"):
        with pytest.raises((OptionError, UnknownNameError)):
            make_solver(text)
    assert make_solver("rmp[draws=7]").spec == "rmp[draws=7]"


def test_every_solver_describes_itself():
    for name in solvers.available_solvers():
        description = solvers.describe(name)
        assert description.name == name
        assert description.summary in str(description)
        assert all(o.help for o in description.options), f"{name} has an undocumented option"
