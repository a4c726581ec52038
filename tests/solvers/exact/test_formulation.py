"""The shared model: its values, bounds, fixings and the splitting of H."""

from __future__ import annotations

import math

import numpy as np
import pytest

from solvers import Context, ProblemError, QuadraticBlock, Reason, SelectionProblem, solve
from solvers.exact.completion import complete_square, hessian_root
from solvers.exact.formulation import TARGET, Model, build
from solvers.exact.splitting import optimal_diagonal
from solvers.testing import random_problem


def model_value(model: Model, pruned: np.ndarray) -> float:
    """The model's objective of a mask, minimised over the changes p by dense algebra, in units of the problem."""
    x = pruned[model.free].astype(float)
    value = float(model.linear @ x)
    image = model.columns @ x
    if model.joint:
        kept = np.flatnonzero(~pruned)
        rows = np.vstack([model.changes[:, kept], np.diag(np.sqrt(model.curvature[kept]))])
        change = np.linalg.lstsq(rows, -np.concatenate([image, np.zeros(kept.size)]), rcond=None)[0]
        value += float(model.curvature[kept] @ change**2)
        assert (np.abs(change) <= model.change_limit[kept]).all() or value > TARGET
        image = image + model.changes[:, kept] @ change
    return (value + float(image @ image)) / model.scale + (0.0 if model.square is None else model.square.constant)


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("linear", [False, True])
def test_the_model_has_the_values_of_the_problem(objective: str, linear: bool) -> None:
    problem = random_problem(8, objective, n=9, n_blocks=2, linear=linear, kinds=("heavy_tailed",)).with_n_prune(4)
    model = build(problem, Context())
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(50):
        pruned = np.zeros(problem.n, dtype=bool)
        pruned[rng.choice(model.free, 4, replace=False)] = True
        assert model_value(model, pruned) == pytest.approx(problem.value(pruned), rel=1e-7, abs=1e-9 * problem.scale)
        checked += 1
    assert checked == 50


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_fixing_never_loses_the_optimum(objective: str) -> None:
    fixed = 0
    for seed in range(12):
        problem = random_problem(seed, objective, kinds=("heavy_tailed",), linear=bool(seed % 2))
        model = build(problem, Context())
        best = solve(problem, "brute_force", with_refit=False)
        fixed += problem.n - model.free.size
        inside = np.isin(np.flatnonzero(best.pruned), model.free).all()
        assert inside or model.incumbent_value <= best.objective + 1e-9 * problem.scale
    assert fixed > 0


def test_completing_the_square() -> None:
    problem = random_problem(2, "joint", n=8, linear=True, kinds=("plain",))
    arrays = problem.arrays()
    square = complete_square(arrays)
    assert square is not None
    v = np.random.default_rng(0).normal(size=8)
    step = v - arrays.weights
    direct = arrays.gradient @ step + 0.5 * step @ arrays.hessian @ step
    completed = 0.5 * np.sum((square.root @ v - square.target) ** 2) + square.constant
    assert completed == pytest.approx(direct, rel=1e-9)


def test_the_root_is_a_root() -> None:
    arrays = random_problem(5, n=9, n_blocks=2, kinds=("plain",)).arrays()
    root = hessian_root(arrays)
    np.testing.assert_allclose(root.T @ root, arrays.hessian, atol=1e-12)


def test_an_unbounded_joint_problem_is_refused() -> None:
    block = QuadraticBlock(np.ones(3), np.array([[1.0, 0.0, 0.0]]), 0.0, np.array([0.0, 1.0, 0.0]))
    with pytest.raises(ProblemError, match="unbounded below"):
        solve(SelectionProblem([block], 1, "joint"), "ortools_miqp")


def test_a_bound_is_never_claimed_above_the_best_mask() -> None:
    model = build(random_problem(1, n=8, kinds=("plain",), linear=False), Context())
    assert model.safe_bound(TARGET) < model.incumbent_value
    assert model.safe_bound(-math.inf) == -math.inf
    proposal = model.proposal(None, 10 * TARGET, Reason.COMPLETED, Context())
    assert proposal.bound == model.incumbent_value
    assert model.proposal(None, -math.inf, Reason.TIME_LIMIT, Context()).bound == 0.0


def test_the_mask_of_noisy_values_has_the_right_count() -> None:
    model = build(random_problem(1, n=8, kinds=("plain",)), Context())
    noisy = model.start + np.random.default_rng(0).uniform(-1e-7, 1e-7, model.start.shape)
    np.testing.assert_array_equal(model.mask(noisy), model.incumbent)


@pytest.mark.parametrize("seed", range(5))
def test_the_splitting_leaves_a_semidefinite_rest_and_a_valid_bound(seed: int) -> None:
    problem = random_problem(seed, "joint", n=9, kinds=("plain",), linear=False).with_n_prune(4)
    arrays = problem.arrays()
    optimum = solve(problem, "brute_force").objective
    diagonal, bound = optimal_diagonal(arrays.hessian, arrays.weights, problem.n_kept, optimum)
    assert (diagonal > 0).all()
    assert np.linalg.eigvalsh(arrays.hessian - np.diag(diagonal))[0] > -1e-12
    # The damping alone is the weakest choice; the optimal diagonal must not be weaker.
    assert bound <= optimum * (1 + 1e-9)
    assert bound > 0.0


@pytest.mark.parametrize("backend", ["ortools_miqp", "ortools_cpsat", "cvxpy_miqp"])
def test_of_equally_good_masks_the_deterministic_one_is_returned(backend: str) -> None:
    block = QuadraticBlock(np.ones(9), np.eye(9), 0.5)
    problem = SelectionProblem([block], 4)
    incumbent = build(problem, Context(seed=3)).incumbent
    found = solve(problem, backend, seed=3, time_limit=20.0)
    np.testing.assert_array_equal(found.pruned, incumbent)
