"""Brute force against dense linear algebra, mask by mask."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from solvers import CapabilityError, QuadraticBlock, SelectionProblem, Status, solve
from solvers.exact.enumeration import enumerate_masks
from solvers.testing import KINDS, random_problem


def dense_value(problem: SelectionProblem, removed: tuple[int, ...]) -> float:
    """The objective from the definition, by dense algebra."""
    arrays = problem.arrays()
    hessian, weights, gradient = arrays.hessian, arrays.weights, arrays.gradient
    pruned = np.zeros(problem.n, dtype=bool)
    pruned[list(removed)] = True
    step = np.where(pruned, -weights, 0.0)
    if problem.objective.value == "joint":
        kept = np.flatnonzero(~pruned)
        right = -(hessian @ step + gradient)[kept]
        step[kept] = np.linalg.lstsq(hessian[np.ix_(kept, kept)], right, rcond=1e-13)[0]
    return float(gradient @ step + 0.5 * step @ hessian @ step)


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_has_its_value(kind: str, objective: str) -> None:
    problem = random_problem(11, objective, n=7, kinds=(kind,)).with_n_prune(3)
    codes, values, _ = enumerate_masks(problem.arrays(), problem.objective, problem.budget)
    expected = {
        sum(1 << (6 - i) for i in removed): dense_value(problem, removed) for removed in combinations(range(7), 3)
    }
    assert set(codes.tolist()) == set(expected)
    wanted = np.array([expected[code] for code in codes.tolist()])
    np.testing.assert_allclose(values, wanted, rtol=1e-7, atol=1e-9 * problem.scale)


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_the_optimum_is_the_least_value(objective: str) -> None:
    problem = random_problem(3, objective, n=9, n_blocks=2, linear=True, kinds=("plain",)).with_n_prune(4)
    solution = solve(problem, "brute_force")
    least = min(dense_value(problem, removed) for removed in combinations(range(9), 4))
    assert solution.objective == pytest.approx(least, rel=1e-9)
    assert solution.status is Status.OPTIMAL and solution.bound == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_ties_go_to_the_lexicographically_first_mask(objective: str) -> None:
    block = QuadraticBlock(np.ones(6), np.eye(6), 0.5)
    solution = solve(SelectionProblem([block], 2, objective), "brute_force")
    assert np.flatnonzero(solution.pruned).tolist() == [0, 1]


def test_an_unbounded_joint_objective_is_minus_infinity() -> None:
    block = QuadraticBlock(np.array([1.0, 2.0, 3.0]), np.array([[1.0, 0.0, 0.0]]), 0.0, np.array([0.0, 1.0, 0.0]))
    solution = solve(SelectionProblem([block], 1, "joint"), "brute_force")
    assert solution.objective == -np.inf and not solution.pruned[1]


def test_more_than_twenty_weights_are_refused() -> None:
    problem = random_problem(0, n=21, kinds=("plain",))
    with pytest.raises(CapabilityError, match="at most 20"):
        solve(problem, "brute_force")
