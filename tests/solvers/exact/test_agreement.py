"""Every exact backend finds brute force's optimum, with a bound that is never above it.

The default run takes a sample of the 500 problems; ``pytest -m slow`` takes them all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import solvers
from solvers import Capability, SelectionProblem, SingularHessianError, Status, make_solver, solve
from solvers.exact.completion import complete_square
from solvers.testing import random_problem

BACKENDS = ["branch_bound", "ortools_miqp", "ortools_cpsat", "cvxpy_miqp"]
COUNT = 500
SAMPLE = 8
CHUNK = 25


def _check(backend: str, problem: SelectionProblem) -> bool:
    """Whether it was proven; asserts the rest."""
    reference = solve(problem, "brute_force", with_refit=False)
    try:
        solution = solve(problem, backend, time_limit=30.0, with_refit=False)
    except SingularHessianError:
        # CVXPY has no indicator constraints, and says so.
        assert backend == "cvxpy_miqp" and problem.objective.value == "joint"
        return True
    assert solution.objective <= reference.objective + 1e-6 * abs(reference.objective)
    assert solution.bound <= reference.objective + 1e-9 * abs(reference.objective)
    # How far a bound may lie below is relative to the problem's scale where the optimum vanishes by cancellation, and
    # for the joint objective to the unconstrained minimum, which a gradient in a weak direction of H moves far away.
    square = complete_square(problem.arrays())
    largest = abs(reference.objective) + (0.0 if square is None else abs(square.constant))
    assert reference.objective - solution.bound <= 1e-6 * problem.scale + 1e-5 * largest
    return solution.status is Status.OPTIMAL


def _problems(backend: str, seeds: range) -> list[SelectionProblem]:
    objectives = [o for o in solvers.Objective if Capability(o.value) in make_solver(backend).capabilities]
    return [random_problem(seed, o, n_blocks=1 + (seed % 5 == 0)) for seed in seeds for o in objectives]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_agrees_with_brute_force(backend: str) -> None:
    proven = [_check(backend, problem) for problem in _problems(backend, range(7, 7 + SAMPLE))]
    assert sum(proven) >= 0.75 * len(proven)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_agree_with_brute_force(backend: str, first: int) -> None:
    for problem in _problems(backend, range(first, first + CHUNK)):
        _check(backend, problem)


def _stored(shared: Path, most: int) -> list[tuple[SelectionProblem, dict[str, object]]]:
    entries = json.loads((shared / "blocks" / "optima.json").read_text())
    return [
        (
            solvers.load_problem(
                shared / "blocks" / f"{e['block']}.npz", e["n_prune"], e["objective"], use_gradient=False
            ),
            e,
        )
        for e in entries
        if e["n"] <= most
    ]


@pytest.mark.parametrize("backend", ["ortools_miqp", "ortools_cpsat", "cvxpy_miqp"])
def test_small_stored_optima(shared: Path, backend: str) -> None:
    for problem, entry in _stored(shared, 20):
        if Capability(str(entry["objective"])) not in make_solver(backend).capabilities:
            continue
        solution = solve(problem, backend, time_limit=120.0)
        assert solution.objective == pytest.approx(entry["best"], rel=1e-6)
        assert solution.bound <= solution.objective


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ortools_miqp", "cvxpy_miqp"])
def test_stored_optima_of_forty_weights(shared: Path, backend: str) -> None:
    for problem, entry in _stored(shared, 40):
        solution = solve(problem, backend, time_limit=240.0)
        assert solution.objective <= float(str(entry["best"])) * (1 + 1e-6)
        assert solution.bound <= float(str(entry["best"])) * (1 + 1e-6)
