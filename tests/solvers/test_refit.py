"""CBS-U against a dense float64 solve, through every one of its equivalent forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import ProblemError, QuadraticBlock, SelectionProblem
from solvers.curvature import low_rank
from solvers.refit import refit
from tests.conftest import random_block


def dense_refit(block: QuadraticBlock, pruned: np.ndarray) -> tuple[np.ndarray, float]:
    """The textbook solution with dense matrices."""
    arrays = block.arrays()
    hessian, w, g = arrays.hessian, arrays.weights, arrays.gradient
    kept = ~pruned
    step = -w * pruned
    if kept.any():
        right = hessian[np.ix_(kept, pruned)] @ w[pruned] - g[kept]
        step[kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], right)
    return w + step, float(g @ step + 0.5 * step @ hessian @ step)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 40),
    rows=st.integers(1, 50),
    fraction=st.floats(0, 1),
    gradient=st.booleans(),
    log_damping=st.floats(-6, 1),
)
def test_matches_dense_solve(seed, n, rows, fraction, gradient, log_damping):
    block = random_block(seed, n, rows, damping=10.0**log_damping, gradient=gradient)
    pruned = np.random.default_rng(seed).random(n) < fraction
    result = refit(SelectionProblem([block], 0), pruned)
    weights, value = dense_refit(block, pruned)
    size = np.abs(weights).max() + np.abs(block.arrays().weights).max()
    assert np.abs(result.weights - weights).max() <= 1e-8 * size
    assert result.value == pytest.approx(value, rel=1e-8, abs=1e-10 * SelectionProblem([block], 0).scale)
    assert (result.weights[pruned] == 0).all()
    assert not result.repairs


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"), [(100, 0.5, "primal"), (8, 0.5, "woodbury"), (30, 0.1, "dual")]
)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_agrees(rows, fraction, expected, gradient, dtype):
    block = random_block(3, 60, rows, damping=1e-3, gradient=gradient)
    block = QuadraticBlock(block.weights, block.factor.to(dtype), 1e-3, block.gradient)
    pruned = np.random.default_rng(0).permutation(60) < int(60 * fraction)
    result = refit(SelectionProblem([block], 0), pruned)
    weights, value = dense_refit(block, pruned)
    assert result.methods == (expected,)
    assert np.abs(result.weights - weights).max() <= 1e-8 * np.abs(weights).max()
    assert result.value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("rows", "n_kept", "expected"), [(80, 60, "primal"), (40, 60, "woodbury")])
def test_single_precision_preconditioner_reaches_double_accuracy(monkeypatch, rows, n_kept, expected):
    monkeypatch.setattr(low_rank, "DOUBLE_LIMIT", 10)
    block = random_block(5, 100, rows, damping=1e-2, gradient=True)
    pruned = np.arange(100) >= n_kept
    result = refit(SelectionProblem([block], 0), pruned)
    weights, value = dense_refit(block, pruned)
    assert result.methods == (f"cg (float32 {expected})",)
    assert np.abs(result.weights - weights).max() <= 1e-8 * np.abs(weights).max()
    assert result.value == pytest.approx(value, rel=1e-10)


def test_blocks_are_refitted_independently():
    blocks = [random_block(i, 10 + i, 6, gradient=i == 1) for i in range(3)]
    problem = SelectionProblem(blocks, 0)
    pruned = np.random.default_rng(1).random(problem.n) < 0.5
    result = refit(problem, pruned)
    expected = [dense_refit(b, pruned[where]) for b, where in zip(blocks, problem.slices, strict=True)]
    assert np.allclose(result.weights, np.concatenate([v for v, _ in expected]), rtol=1e-9, atol=1e-12)
    assert result.value == pytest.approx(sum(value for _, value in expected))


def test_singular_hessian_takes_the_minimum_norm_update_and_says_so():
    rng = np.random.default_rng(0)
    block = QuadraticBlock(rng.normal(size=12), rng.normal(size=(4, 12)), damping=0.0)
    pruned = np.arange(12) < 5
    result = refit(SelectionProblem([block], 0), pruned)
    hessian = block.arrays().hessian
    kept = ~pruned
    right = hessian[np.ix_(kept, pruned)] @ block.arrays().weights[pruned]
    step = np.linalg.pinv(hessian[np.ix_(kept, kept)]) @ right
    assert np.allclose(result.weights[kept] - block.arrays().weights[kept], step, atol=1e-8)
    assert "minimum-norm" in result.repairs[0]


def test_unbounded_below_is_minus_infinity_and_recorded():
    block = QuadraticBlock(np.ones(4), np.array([[1.0, 0.0, 0.0, 0.0]]), 0.0, gradient=np.array([0.0, 1.0, 0.0, 0.0]))
    result = refit(SelectionProblem([block], 0), np.array([True, False, False, False]))
    assert result.value == -math.inf
    assert "unbounded" in result.repairs[0]


def test_tiny_and_huge_scales():
    for scale in (1e-12, 1e12):
        rng = np.random.default_rng(2)
        block = QuadraticBlock(rng.normal(size=15) * scale, rng.normal(size=(8, 15)) / scale, 1e-4 / scale**2)
        pruned = np.arange(15) < 7
        weights, value = dense_refit(block, pruned)
        result = refit(SelectionProblem([block], 0), pruned)
        assert np.abs(result.weights - weights).max() <= 1e-8 * np.abs(weights).max()
        assert result.value == pytest.approx(value, rel=1e-8)


def test_mask_that_does_not_fit_is_refused():
    problem = SelectionProblem([random_block(0, 5, 3)], 2)
    with pytest.raises(ProblemError, match="bool of shape"):
        refit(problem, np.zeros(4, dtype=bool))
