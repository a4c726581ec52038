"""Blocks and problems: validation, algebra against dense float64, storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import Objective, ProblemError, QuadraticBlock, SelectionProblem, SingularHessianError, UnknownNameError
from tests.conftest import random_block, random_problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.array([1.0, np.nan])}, r"weights\[1\] is nan"),
        ({"factor": np.array([[1.0, 2.0], [np.inf, 0.0]])}, r"factor\[1, 0\] is inf"),
        ({"gradient": np.array([np.nan, 0.0])}, r"gradient\[0\] is nan"),
        ({"factor": np.ones((3, 3))}, r"\(3, 3\)"),
        ({"weights": np.ones((2, 1))}, "vector"),
        ({"weights": np.ones(0)}, "non-empty"),
        ({"gradient": np.ones(3)}, r"\(3,\)"),
        ({"damping": -1e-3}, "-0.001"),
        ({"damping": float("nan")}, "nan"),
        ({"damping": "much"}, "much"),
        ({"factor": np.ones((2, 2), dtype=complex)}, "complex"),
        ({"factor": [["a", "b"]]}, "numbers"),
    ],
)
def test_bad_blocks_are_refused(change, message):
    arguments = {"weights": np.ones(2), "factor": np.ones((2, 2)), "damping": 0.1, "gradient": None} | change
    with pytest.raises(ProblemError, match=message):
        QuadraticBlock(**arguments)


@pytest.mark.parametrize("n_prune", [-1, 6, 2.5, True, "3"])
def test_bad_budgets_are_refused(n_prune):
    with pytest.raises(ProblemError, match="n_prune"):
        SelectionProblem([random_block(0, 5, 3)], n_prune)


def test_no_blocks_and_unknown_objective_are_refused():
    with pytest.raises(ProblemError, match="at least one block"):
        SelectionProblem([], 0)
    with pytest.raises(UnknownNameError, match="Did you mean 'selection'"):
        SelectionProblem([random_block(0, 5, 3)], 1, "selektion")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_match_dense_float64(dtype):
    rng = np.random.default_rng(0)
    factor = torch.tensor(rng.normal(size=(13, 29)), dtype=dtype)
    block = QuadraticBlock(rng.normal(size=29), factor, 0.3)
    dense = factor.double().numpy()
    x, z = rng.normal(size=29), rng.normal(size=13)
    assert np.allclose(block.curvature.project(torch.tensor(x)), dense @ x, rtol=1e-13)
    assert np.allclose(block.curvature.back_project(torch.tensor(z)), dense.T @ z, rtol=1e-13)
    hessian = dense.T @ dense + 0.3 * np.eye(29)
    assert np.allclose(block.multiply(torch.tensor(x)), hessian @ x, rtol=1e-12)
    assert np.allclose(block.diagonal, np.diag(hessian), rtol=1e-13)
    assert np.allclose(block.low_rank.gram, dense @ dense.T, rtol=1e-12)
    assert np.allclose(block.inverse_diagonal, np.diag(np.linalg.inv(hessian)), rtol=1e-9)
    assert np.array_equal(block.factor.double().numpy(), dense), "no product may change the factor"


def test_products_on_a_slice_of_a_larger_matrix():
    matrix = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    block = QuadraticBlock(torch.ones(10, dtype=torch.float64), matrix[:, 5:15], 0.0)
    assert block.factor.data_ptr() == matrix[:, 5:15].data_ptr(), "contiguous columns are views"
    dense = matrix[:, 5:15].double()
    assert torch.allclose(block.curvature.project(block.weights), dense.sum(1))
    assert torch.allclose(block.curvature.back_project(torch.ones(7, dtype=torch.float64)), dense.sum(0))


@pytest.mark.parametrize("rows", [4, 40])
def test_inverse_needs_damping(rows):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(rows, 20))
    factor[:, 1] = factor[:, 0]
    with pytest.raises(SingularHessianError, match="damping"):
        _ = QuadraticBlock(rng.normal(size=20), factor, 0.0).inverse_diagonal


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), gradient=st.booleans(), fraction=st.floats(0, 1))
def test_selection_value_matches_the_definition(seed, gradient, fraction):
    problem = random_problem(seed, (5, 9), 3, gradient=gradient)
    pruned = np.random.default_rng(seed).random(14) < fraction
    arrays = problem.arrays()
    x = arrays.weights * pruned
    expected = 0.5 * x @ arrays.hessian @ x - arrays.gradient @ x
    assert problem.selection_value(pruned) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert np.allclose(problem.multiply(x), arrays.hessian @ x)
    if pruned.any():
        assert problem.joint_value(pruned) <= problem.selection_value(pruned) + 1e-12


def test_save_and_load_round_trip(tmp_path):
    block = random_block(1, 8, 4, gradient=True)
    solvers.save_block(tmp_path / "b.npz", block)
    problem = solvers.load_problem(tmp_path / "b.npz", n_prune=3, objective="joint", use_gradient=True)
    again = problem.blocks[0]
    assert problem.objective is Objective.JOINT
    assert again.name == "b"
    assert torch.equal(again.factor, block.factor)
    assert torch.equal(again.weights, block.weights)
    assert torch.equal(again.gradient, block.gradient)
    assert again.damping == block.damping
    assert solvers.load_problem(tmp_path / "b.npz", 3, use_gradient=False).gradient is None


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ProblemError, match="no block at"):
        solvers.load_block(tmp_path / "none.npz")
    whole = tmp_path / "whole.npz"
    solvers.save_block(whole, random_block(1, 8, 4))
    data = whole.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 30):
        (tmp_path / "cut.npz").write_bytes(data[:length])
        with pytest.raises(ProblemError, match=r"cut\.npz"):
            solvers.load_block(tmp_path / "cut.npz")
    np.savez(tmp_path / "odd.npz", weights=np.ones(3))
    with pytest.raises(ProblemError, match="factor"):
        solvers.load_block(tmp_path / "odd.npz")
    with pytest.raises(solvers.errors.OutputError):
        solvers.save_block(tmp_path / "missing" / "b.npz", random_block(1, 8, 4))


def test_read_only_arrays_are_accepted():
    weights = np.ones(3)
    weights.flags.writeable = False
    assert QuadraticBlock(weights, np.ones((1, 3))[:, ::-1], 1.0).n == 3
