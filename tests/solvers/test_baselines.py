"""The one-look rules: their scores against plain formulas, exact budgets, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import ProblemError, QuadraticBlock, SelectionProblem, SingularHessianError
from solvers.baselines.rmp import approximate_selection_values, grouped_magnitude, magnitude_draws
from solvers.baselines.woodfisher import single_removal_loss
from tests.conftest import random_block, random_problem

RULES = ["random", "magnitude", "obd", "woodfisher", "rmp"]


def smallest(scores: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(scores.shape[0], dtype=bool)
    mask[np.argsort(scores, kind="stable")[:count]] = True
    return mask


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("sizes", [(1,), (9,), (7, 1, 12)])
def test_exactly_n_prune_are_removed_for_every_budget(rule: str, objective: str, sizes: tuple[int, ...]) -> None:
    for n_prune in range(sum(sizes) + 1):
        solution = solvers.solve(random_problem(3, sizes, n_prune, objective), rule, seed=1)
        assert solution.n_pruned == n_prune


def test_scores_match_their_formulas() -> None:
    problem = random_problem(0, (11, 6), 8, gradient=True)
    arrays = problem.arrays()
    w, g, hessian = arrays.weights, arrays.gradient, arrays.hessian
    inverse = np.linalg.inv(hessian)
    expected = {
        "magnitude": np.abs(w),
        "gradient_magnitude": np.abs(g * w),
        "obd": 0.5 * np.diag(hessian) * w**2 - g * w,
        "woodfisher": (w - inverse @ g) ** 2 / np.diag(inverse),
    }
    for rule, scores in expected.items():
        assert np.array_equal(solvers.solve(problem, rule).pruned, smallest(scores, 8)), rule


def test_woodfisher_is_the_joint_objective_of_removing_one_weight() -> None:
    problem = random_problem(5, (8,), 1, "joint", gradient=True)
    arrays = problem.arrays()
    constant = 0.5 * arrays.gradient @ np.linalg.solve(arrays.hessian, arrays.gradient)
    for i, score in enumerate(single_removal_loss(problem)):
        mask = np.zeros(8, dtype=bool)
        mask[i] = True
        assert problem.joint_value(mask) == pytest.approx(score - constant, rel=1e-9)


def test_obd_is_optimal_for_a_diagonal_hessian() -> None:
    rng = np.random.default_rng(2)
    block = QuadraticBlock(rng.normal(size=9), np.diag(rng.normal(size=9)), 0.01, rng.normal(size=9))
    problem = SelectionProblem(block, 4)
    best = min(
        problem.value(np.array([bit in chosen for bit in range(9)])) for chosen in itertools.combinations(range(9), 4)
    )
    assert solvers.solve(problem, "obd").objective == pytest.approx(best, rel=1e-12)


def test_gradient_magnitude_refuses_a_problem_without_gradient() -> None:
    with pytest.raises(ProblemError, match=r"random-1.*no gradient.*obd"):
        solvers.solve(random_problem(1, (5,), 2), "gradient_magnitude")


def test_woodfisher_refuses_a_singular_hessian() -> None:
    with pytest.raises(SingularHessianError, match="larger damping"):
        solvers.solve(SelectionProblem(random_block(1, 8, 3, damping=0.0), 2), "woodfisher")


@given(st.integers(1, 400), st.floats(0.0, 1.0), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_grouped_draws_keep_exactly_k_and_never_the_smaller_of_a_group(n: int, fraction: float, seed: int) -> None:
    n_prune = int(fraction * n)
    rank = np.random.default_rng(seed).permutation(n).astype(np.int32)
    pruned = grouped_magnitude(rank, n_prune, np.random.default_rng(seed))
    assert int(pruned.sum()) == n_prune
    # The same stream of random numbers gives the same groups: largest kept within each.
    rng = np.random.default_rng(seed)
    groups = min(int(np.sqrt(n)), 1000)
    bounds = np.arange(groups + 1) * n // groups
    kept = np.diff(bounds) * (n - n_prune) // n
    rng.permutation(np.flatnonzero(kept < np.diff(bounds)))
    order = rng.permutation(n)
    for low, high in itertools.pairwise(bounds):
        members = order[low:high]
        gone, stay = members[pruned[members]], members[~pruned[members]]
        if gone.size and stay.size:
            assert rank[gone].max() < rank[stay].min()


def test_first_draw_is_magnitude_and_rmp_never_loses_to_it() -> None:
    problem = random_problem(7, (60, 40), 70)
    first = next(magnitude_draws(problem, 3, np.random.default_rng(0)))
    assert np.array_equal(first, solvers.solve(problem, "magnitude").pruned)
    assert solvers.solve(problem, "rmp").objective <= problem.value(first)


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_rmp_returns_its_best_draw(objective: str) -> None:
    problem = random_problem(4, (30,), 20, objective, gradient=True)
    draws = list(magnitude_draws(problem, 12, np.random.default_rng(3)))
    solution = solvers.solve(problem, "rmp[draws=12]", seed=3)
    assert solution.objective == pytest.approx(min(problem.value(m) for m in draws), rel=1e-12)
    wanted = draws[5]
    by_loss = solvers.solve(
        problem, "rmp[draws=12]", seed=3, calibration_loss=lambda mask: float((mask != wanted).sum())
    )
    assert np.array_equal(by_loss.pruned, wanted)


def test_values_of_many_masks_at_once() -> None:
    problem = random_problem(4, (13, 9), 10, gradient=True)
    rng = np.random.default_rng(0)
    masks = rng.random((6, 22)) < 0.5
    values = approximate_selection_values(problem, masks)
    assert values == pytest.approx([problem.selection_value(mask) for mask in masks], rel=1e-10)
