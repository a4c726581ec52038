"""`sweep` against a literal transcription of SparseGPT, and what it promises about its own weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import solvers
from solvers import (
    NM,
    BackendError,
    CapabilityError,
    Cardinality,
    Dense,
    Kronecker,
    Partitioned,
    QuadraticBlock,
    SelectionProblem,
)
from solvers.joint.sweep import SweepSolver
from solvers.solution import Proposal
from solvers.solver import Context
from solvers.testing import check_solver

ROWS, INPUTS, DAMPING = 6, 20, 0.05


def layer(seed: int, dtype: torch.dtype = torch.float64, gradient: bool = False) -> QuadraticBlock:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((60, INPUTS)) @ rng.standard_normal((INPUTS, INPUTS)) / 8
    moment = torch.from_numpy(samples.T @ samples / 60).to(dtype)
    weights = torch.from_numpy(rng.standard_normal(ROWS * INPUTS))
    slope = torch.from_numpy(0.1 * rng.standard_normal(ROWS * INPUTS)) if gradient else None
    return QuadraticBlock(weights, curvature=Kronecker(torch.ones(ROWS), moment, DAMPING), gradient=slope)


def sparse_gpt(weights: torch.Tensor, hessian: torch.Tensor, width: int, counts: list[list[int]]) -> torch.Tensor:
    """Algorithm 1 of the paper as its authors wrote it; the weights left (R, d).

    `counts[b]` is how many entries of column block b go in each row, or one number for all rows together: the authors
    take a quantile, which does not keep an exact number.
    """
    weights = weights.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for number, first in enumerate(range(0, weights.shape[1], width)):
        last = min(first + width, weights.shape[1])
        part, inner = weights[:, first:last].clone(), upper[first:last, first:last]
        done, errors = torch.zeros_like(part), torch.zeros_like(part)
        score = part**2 / inner.diagonal().reshape(1, -1) ** 2
        mask = torch.zeros_like(part, dtype=torch.bool)
        if len(counts[number]) == 1:
            mask.view(-1)[score.flatten().argsort()[: counts[number][0]]] = True
        else:
            for row, count in enumerate(counts[number]):
                mask[row, score[row].argsort()[:count]] = True
        for i in range(last - first):
            column, pivot = part[:, i], inner[i, i]
            left = column.clone()
            left[mask[:, i]] = 0
            done[:, i] = left
            error = (column - left) / pivot
            part[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            errors[:, i] = error
        weights[:, first:last] = done
        weights[:, last:] -= errors.matmul(upper[first:last, last:])
    return weights


def shares(count: int, width: int) -> list[int]:
    """What each block of columns loses of `count` in all."""
    edges = [min(at, INPUTS) for at in range(0, INPUTS + width, width)]
    return [count * stop // INPUTS - count * start // INPUTS for start, stop in itertools.pairwise(edges)]


@pytest.mark.parametrize("width", [1, 7, 17, 128])
@pytest.mark.parametrize("by_rows", [False, True])
def test_it_is_sparse_gpt(width: int, by_rows: bool) -> None:
    block = layer(width)
    counts = [11, 0, 7, 20, 12, 13] if by_rows else [70]
    budget = Partitioned([INPUTS] * ROWS, counts) if by_rows else Cardinality(70)
    solution = solvers.solve(SelectionProblem(block, budget, "joint"), f"sweep[columns={width}]")
    assert isinstance(block.curvature, Kronecker)
    hessian = block.curvature.inputs.matrix
    blocks = [list(group) for group in zip(*(shares(count, width) for count in counts), strict=True)]
    expected = sparse_gpt(block.weights.view(ROWS, INPUTS), hessian, width, blocks)
    np.testing.assert_allclose(solution.own_weights, expected.reshape(-1).numpy(), atol=1e-12)
    assert np.array_equal(solution.pruned, (expected == 0).reshape(-1).numpy())


def sparse_gpt_n_of_m(weights: torch.Tensor, hessian: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    """The authors' N:M branch, with ranges of columns [start, stop, how many go] for groups."""
    weights = weights.clone()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    starts = {start: (stop, count) for start, stop, count in groups}
    for i in range(weights.shape[1]):
        if i in starts:
            stop, count = starts[i]
            score = weights[:, i:stop] ** 2 / upper.diagonal()[i:stop].reshape(1, -1) ** 2
            mask.scatter_(1, i + torch.topk(score, count, dim=1, largest=False).indices, True)
        left = weights[:, i].clone()
        left[mask[:, i]] = 0
        error = (weights[:, i] - left) / upper[i, i]
        weights[:, i:] -= error.unsqueeze(1).matmul(upper[i, i:].unsqueeze(0))
        weights[:, i] = left
    return weights


@pytest.mark.parametrize("width", [1, 6, 128])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 2), NM(4, 10), NM(3, 8, None, True), NM(1, 6, None, True)])
def test_of_every_m_columns_n_stay_as_sparse_gpt_has_it(width: int, pattern: NM) -> None:
    block, m = layer(width), pattern.m
    assert isinstance(block.curvature, Kronecker)
    groups = [[a, min(a + m, INPUTS), m - pattern.n if a + m <= INPUTS else 0] for a in range(0, INPUTS, m)]
    solution = solvers.solve(SelectionProblem(block, pattern, "joint"), f"sweep[columns={width}]")
    expected = sparse_gpt_n_of_m(block.weights.view(ROWS, INPUTS), block.curvature.inputs.matrix, groups)
    np.testing.assert_allclose(solution.own_weights, expected.reshape(-1).numpy(), atol=1e-12)
    assert np.array_equal(solution.pruned, (expected == 0).reshape(-1).numpy())


def test_its_own_weights_are_judged_and_never_better_than_the_refit() -> None:
    problem = SelectionProblem(layer(3), 60, "joint")
    solution = solvers.solve(problem, "sweep")
    assert solution.own_weights is not None and not solution.own_weights[solution.pruned].any()
    step = solution.own_weights - problem.weights
    assert solution.own_objective == pytest.approx(0.5 * step @ problem.multiply(step), rel=1e-12)
    assert solution.refit_objective <= solution.own_objective
    quick = solvers.solve(problem, "sweep", with_refit=False)
    assert quick.objective == quick.own_objective == solution.own_objective
    assert quick.refit_weights is None


def test_a_mask_is_judged_as_it_is_without_solving_a_system(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SelectionProblem(layer(3), 60, "joint")
    exact = solvers.solve(problem, "admm")
    monkeypatch.setattr(SelectionProblem, "refit", None)
    plain = solvers.solve(problem, "admm", with_refit=False, as_is=True)
    np.testing.assert_array_equal(plain.pruned, exact.pruned)
    step = np.where(plain.pruned, -problem.weights, 0.0)
    assert plain.objective == pytest.approx(0.5 * step @ problem.multiply(step), rel=1e-12)
    assert plain.objective >= exact.objective and np.isnan(plain.refit_objective)
    with pytest.raises(solvers.errors.OptionError, match="with_refit=False"):
        solvers.solve(problem, "admm", as_is=True)


def test_a_gradient_moves_the_target() -> None:
    block = layer(4, gradient=True)
    centre = block.weights - block.solve(block.gradient)
    moved = QuadraticBlock(centre, curvature=block.curvature)
    with_gradient = solvers.solve(SelectionProblem(block, 60, "joint"), "sweep")
    without = solvers.solve(SelectionProblem(moved, 60, "joint"), "sweep")
    np.testing.assert_allclose(with_gradient.own_weights, without.own_weights, atol=1e-12)


def test_single_precision_moments_are_swept_in_single_precision() -> None:
    exact = solvers.solve(SelectionProblem(layer(5), 60, "joint"), "sweep")
    single = solvers.solve(SelectionProblem(layer(5, torch.float32), 60, "joint"), "sweep")
    assert single.own_objective == pytest.approx(exact.own_objective, rel=1e-3)


def test_one_row_is_a_dense_block_and_the_problem_stays_as_it_was() -> None:
    layer_block = layer(6)
    assert isinstance(layer_block.curvature, Kronecker)
    row = layer_block.weights[:INPUTS].clone()
    dense = QuadraticBlock(row.clone(), curvature=Dense(layer_block.curvature.inputs.measured_part, DAMPING))
    first = solvers.solve(SelectionProblem(dense, 12, "joint"), "sweep")
    second = solvers.solve(SelectionProblem(layer_block.split()[0], 12, "joint"), "sweep")
    np.testing.assert_allclose(first.own_weights, second.own_weights, atol=1e-12)
    assert torch.equal(dense.weights, row)


def test_rows_without_loss_go_first_and_dead_inputs_too() -> None:
    moment = torch.eye(4, dtype=torch.float64)
    moment[1, 1] = 0.0
    block = QuadraticBlock(torch.full((12,), 2.0), curvature=Kronecker(torch.tensor([1.0, 0.0, 1.0]), moment))
    pruned = solvers.solve(SelectionProblem(block, 6, "joint"), "sweep").pruned.reshape(3, 4)
    assert pruned[1].all() and pruned[:, 1].all()


def test_several_blocks_share_no_budget() -> None:
    with pytest.raises(CapabilityError, match="cannot share one budget"):
        solvers.solve(SelectionProblem([layer(0), layer(1)], 60, "joint"), "sweep")
    solution = solvers.solve(SelectionProblem([layer(0), layer(1)], 60, "joint"), "sweep", allocation="uniform")
    assert solution.own_weights is not None and solution.refit_objective <= solution.own_objective


@pytest.mark.parametrize("spoil", ["alive", "infinite", "short"])
def test_weights_that_do_not_fit_the_mask_are_refused(spoil: str) -> None:
    class Wrong(SweepSolver):
        def run(self, problem: SelectionProblem, context: Context) -> Proposal:
            good = super().run(problem, context)
            assert good.weights is not None
            weights = good.weights.copy()
            weights[np.flatnonzero(good.pruned if spoil == "alive" else ~good.pruned)[0]] = (
                np.inf if spoil == "infinite" else 1
            )
            return Proposal(good.pruned, weights=weights[:-1] if spoil == "short" else weights)

    with pytest.raises(BackendError, match="returned weights that are not"):
        solvers.solve(SelectionProblem(layer(0), 60, "joint"), Wrong())


def test_it_conforms() -> None:
    assert check_solver("sweep").passed
