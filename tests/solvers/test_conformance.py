"""Every built-in solver passes the public conformance kit, and the kit notices solvers that lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from solvers import Capability, Context, Proposal, SelectionProblem, Solver, available_solvers, describe, option
from solvers.exact.brute_force import BruteForceSolver
from solvers.ranking import prune_smallest
from solvers.testing import KINDS, check_solver, random_problem


@pytest.mark.parametrize("name", available_solvers())
def test_every_solver_conforms(name: str) -> None:
    if describe(name).missing:
        pytest.skip(f"{name} needs {describe(name).missing}")
    # Each solve of an outside library takes a good part of a second.
    report = check_solver(name, instances=1, largest=5 if describe(name).requires else 8)
    assert report.passed
    assert {r.outcome for r in report.results} <= {"passed", "skipped"}
    assert sum(r.outcome == "passed" for r in report.results) >= 8


@dataclass(frozen=True)
class _Honest(Solver):
    name = "honest"
    summary = "the smallest diagonal costs"
    capabilities = frozenset({Capability.SELECTION, Capability.GLOBAL_BUDGET})

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        return Proposal(prune_smallest(problem.diagonal * problem.weights**2, problem.n_prune))


@dataclass(frozen=True)
class _Miscounting(_Honest):
    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        return Proposal(prune_smallest(problem.weights, problem.n_prune - 1))


@dataclass(frozen=True)
class _Boasting(_Honest):
    capabilities = frozenset({Capability.SELECTION, Capability.GLOBAL_BUDGET, Capability.BOUND, Capability.EXACT})

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        pruned = super().run(problem, context).pruned
        return Proposal(pruned, bound=problem.value(pruned))


@dataclass(frozen=True)
class _Whimsical(_Honest):
    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        return Proposal(prune_smallest(np.random.default_rng().random(problem.n), problem.n_prune))


@dataclass(frozen=True)
class _Meddling(_Honest):
    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        problem.blocks[0].weights.mul_(2.0)
        return super().run(problem, context)


@dataclass(frozen=True)
class _Forgetful(_Honest):
    capabilities = frozenset({Capability.SELECTION, Capability.GLOBAL_BUDGET, Capability.WARM_START})

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        return Proposal(prune_smallest(-np.abs(problem.weights), problem.n_prune))


@dataclass(frozen=True)
class _Undocumented(_Honest):
    depth: int = 3


@dataclass(frozen=True)
class _Crashing(_Honest):
    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        raise ZeroDivisionError("oops")


def test_an_honest_heuristic_passes() -> None:
    report = check_solver(_Honest())
    assert report.passed and "passed  feasibility" in str(report)


@pytest.mark.parametrize(
    ("solver", "check"),
    [
        (_Miscounting(), "feasibility"),
        (_Boasting(), "bounds"),
        (_Whimsical(), "determinism"),
        (_Meddling(), "inputs_untouched"),
        (_Forgetful(), "warm_start"),
        (_Undocumented(), "declaration"),
        (_Crashing(), "feasibility"),
    ],
)
def test_the_kit_notices(solver: Solver, check: str) -> None:
    report = check_solver(solver, raises=False)
    assert check in {failure.name for failure in report.failures}
    with pytest.raises(AssertionError, match=check):
        check_solver(solver)


def test_an_undeclared_bound_is_noticed() -> None:
    @dataclass(frozen=True)
    class Secretive(_Honest):
        tilt: float = option(0.0, "nothing")

        def run(self, problem: SelectionProblem, context: Context) -> Proposal:
            return Proposal(super().run(problem, context).pruned, bound=-1e9)

    assert "bounds" in {failure.name for failure in check_solver(Secretive(), raises=False).failures}


def test_size_limits_are_kept() -> None:
    assert check_solver(BruteForceSolver(), instances=1).passed


@pytest.mark.parametrize("kind", KINDS)
def test_random_problems_are_reproducible(kind: str) -> None:
    first, second = (random_problem(4, "joint", kinds=(kind,)) for _ in range(2))
    assert first.n_prune == second.n_prune and 0 < first.n_prune < first.n
    assert np.array_equal(first.weights, second.weights) and np.array_equal(first.diagonal, second.diagonal)
