"""No certificate is false: every exact backend against rational arithmetic, on problems made to mislead float64.

Columns, weights or both are scaled by 10^±8, tie, vanish, are copied or depend on one another. What a backend calls
optimal must be the optimum to 1e-6 of the optimum itself, and no bound may lie above it. ``pytest -m slow`` looks at
10,000 problems (CBS_CERTIFICATES=N for another number).
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from solvers import Capability, QuadraticBlock, SelectionProblem, SingularHessianError, Status, make_solver, solve
from solvers.errors import BackendError, ProblemError
from solvers.exact.enumeration import enumerate_masks
from solvers.rational import ExactProblem, exact_value

BACKENDS = ("brute_force", "branch_bound", "by_component", "lns", "ortools_miqp", "ortools_cpsat", "cvxpy_miqp")
KINDS = (
    "plain",
    "columns",
    "weights",
    "one column",
    "ties",
    "zeros",
    "duplicates",
    "opposites",
    "rank one",
    "singular",
)
MANY = int(os.environ.get("CBS_CERTIFICATES", "10000"))
CHUNK = 100


def problem_of(seed: int, largest: int) -> SelectionProblem:
    """A small problem of a random kind, objective, damping and budget."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    n = int(rng.integers(3, largest + 1))
    weights, factor = rng.standard_normal(n), rng.standard_normal((int(rng.integers(1, n + 3)), n))
    damping = float(10.0 ** rng.integers(-6, 1))
    if kind in ("columns", "zeros"):
        factor *= 10.0 ** rng.uniform(-8, 8, n)
    if kind == "weights":
        weights *= 10.0 ** rng.uniform(-8, 8, n)
    if kind == "one column":
        factor[:, rng.integers(n)] *= 10.0 ** rng.integers(4, 9)
    if kind == "ties":
        weights, factor = np.sign(weights), np.round(factor)
    if kind == "zeros":
        weights[rng.random(n) < 0.5] = 0.0
        factor[:, rng.random(n) < 0.2] = 0.0
    if kind in ("duplicates", "opposites"):
        half, sign = n // 2, 1.0 if kind == "duplicates" else -1.0
        factor[:, n - half :], weights[n - half :] = factor[:, :half], sign * weights[:half]
        factor *= 10.0 ** rng.integers(0, 9)
    if kind == "rank one":
        factor = np.outer(rng.standard_normal(factor.shape[0]), rng.standard_normal(n)) * 10.0 ** rng.integers(0, 5)
    if kind == "singular":
        damping = 0.0
    gradient = None
    if rng.random() < 0.3:
        gradient = factor.T @ rng.standard_normal(factor.shape[0]) * 0.1
    objective = "joint" if rng.random() < 0.5 else "selection"
    return SelectionProblem(QuadraticBlock(weights, factor, damping, gradient), int(rng.integers(1, n)), objective)


def optimum_of(problem: SelectionProblem) -> Fraction | None:
    """The least value over all masks, exactly; None where there is none."""
    exact = ExactProblem(problem.arrays(), problem.objective)
    values = []
    for removed in combinations(range(problem.n), problem.n_prune):
        values.append(exact.value(np.isin(np.arange(problem.n), removed)))
    return None if None in values else min(values)


def check(problem: SelectionProblem, backend: str, optimum: Fraction, limit: float = 300.0) -> Status | None:
    """Assert that what users are told is true; the status, None where the backend refuses the problem or gives up."""
    try:
        # The limit counts compilation on a busy machine, too.
        found = solve(problem, backend, time_limit=None if backend == "brute_force" else limit, with_refit=False)
    except (SingularHessianError, ProblemError):
        return None
    except BackendError as error:
        # Where SCIP's linear programs break down it says so.
        assert backend.endswith("miqp") and "does not keep the budget" not in str(error)
        return None
    size = abs(float(optimum))
    value = exact_value(problem, found.pruned)
    assert value is not None
    assert Fraction(found.bound) <= optimum + Fraction(1e-9 * size) if math.isfinite(found.bound) else found.bound < 0
    off = float(value - optimum)
    assert off >= 0.0
    if found.status is Status.OPTIMAL:
        assert off <= 1e-6 * size
    return found.status


def verify(seed: int, largest: int, backends: tuple[str, ...], limit: float = 300.0) -> dict[str, Status | None]:
    """Check all backends on one problem."""
    problem = problem_of(seed, largest)
    optimum = optimum_of(problem)
    statuses: dict[str, Status | None] = {}
    for backend in backends:
        if optimum is None or Capability(problem.objective.value) not in make_solver(backend).capabilities:
            continue
        statuses[backend] = check(problem, backend, optimum, limit)
    return statuses


@pytest.mark.parametrize("seed", range(3 * len(KINDS)))
def test_no_certificate_is_false(seed: int) -> None:
    fast = ("brute_force", "branch_bound", "by_component", "lns")
    statuses = verify(seed, 10, BACKENDS if seed < len(KINDS) else fast)
    for backend in ("brute_force", "branch_bound"):
        assert statuses.get(backend, Status.OPTIMAL) is Status.OPTIMAL


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, MANY, CHUNK))
def test_no_certificate_is_false_in_many_problems(first: int) -> None:
    for seed in range(1000 + first, 1000 + min(first + CHUNK, MANY)):
        # What a general solver does not prove in seconds it may leave open.
        assert verify(seed, 14, BACKENDS, limit=5.0) is not None


def test_one_column_a_hundred_million_times_the_others() -> None:
    rng = np.random.default_rng(0)
    for objective, size in (("joint", 1e7), ("selection", 1e8)):
        factor = rng.standard_normal((8, 12))
        factor[:, 5] *= size
        problem = SelectionProblem(QuadraticBlock(rng.standard_normal(12), factor, 1e-4), 6, objective)
        optimum = optimum_of(problem)
        assert optimum is not None
        for backend in ("brute_force", "branch_bound", "by_component", "lns"):
            assert check(problem, backend, optimum) is Status.OPTIMAL


def test_a_leaf_that_rounding_leaves_with_the_wrong_number_is_no_mask() -> None:
    problem = problem_of(8908, 14)
    optimum = optimum_of(problem)
    assert optimum is not None
    for backend in ("branch_bound", "by_component", "lns"):
        assert check(problem, backend, optimum) is Status.OPTIMAL


def test_rational_values_of_a_problem_worked_by_hand() -> None:
    block = QuadraticBlock(np.array([1.0, 3.0]), np.array([[2.0, 1.0]]), 1.0, np.array([0.5, 0.0]))
    selection, joint = (SelectionProblem(block, 1, objective) for objective in ("selection", "joint"))
    first = np.array([True, False])
    # H = [[5, 2], [2, 2]]; removing the first: ½·5 − ½, and less ½ (0 − 2)²/2 when the second makes up for it.
    assert exact_value(selection, first) == 2
    assert exact_value(joint, first) == 1
    flat = QuadraticBlock(np.ones(2), np.array([[1.0, 0.0]]), 0.0, np.array([0.0, 1.0]))
    assert exact_value(SelectionProblem(flat, 1, "joint"), first) is None


def test_enumeration_knows_what_it_does_not_know() -> None:
    rng = np.random.default_rng(3)
    for seed in range(20):
        problem = problem_of(seed, 8)
        exact = ExactProblem(problem.arrays(), problem.objective)
        found = enumerate_masks(problem.arrays(), problem.objective, problem.budget)
        for at in rng.permutation(found.codes.size)[:10]:
            mask = np.array([bool(found.codes[at] >> (problem.n - 1 - i) & 1) for i in range(problem.n)])
            value = exact.value(mask)
            if value is not None and math.isfinite(found.errors[at]):
                assert abs(float(value) - found.values[at]) <= found.errors[at] + 1e-15 * abs(float(value))
