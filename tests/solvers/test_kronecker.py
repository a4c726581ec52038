"""Layers whose rows share an input moment: refits of all rows at once, and the order of the published rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import solvers
from solvers import CapabilityError, Kronecker, Partitioned, QuadraticBlock, SelectionProblem
from solvers.curvature import kronecker_restricted
from solvers.linalg import triangular_inverse


def layer(
    seed: int, rows: int, inputs: int, dtype: torch.dtype = torch.float64, damping: float = 0.01
) -> QuadraticBlock:
    """Inputs like activations: few strong directions, noise, scales over two decades, half of them rectified."""
    rng = np.random.default_rng(seed)
    rank, samples = max(2, inputs // 6), 8 * inputs
    mixing = rng.standard_normal((rank, inputs)) * np.exp(np.linspace(0, -4, rank))[:, None]
    activations = (rng.standard_normal((samples, rank)) * (1 + 2 * rng.random((samples, 1)))) @ mixing
    activations += 0.3 * rng.standard_normal((samples, inputs))
    activations *= np.exp(0.7 * rng.standard_normal(inputs))
    activations[:, : inputs // 2] = np.maximum(activations[:, : inputs // 2], 0.0)
    moment = torch.from_numpy(activations.T @ activations / samples)
    curvature = Kronecker(torch.ones(rows), moment.to(dtype), damping * float(moment.diagonal().mean()))
    return QuadraticBlock(rng.standard_normal(rows * inputs), curvature=curvature)


def exact(block: QuadraticBlock, kept: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """H_SS x = b row by row."""
    curvature = block.curvature
    assert isinstance(curvature, Kronecker)
    out = torch.zeros_like(right)
    for row in range(curvature.n_rows):
        index = kept[row].nonzero().squeeze(1)
        system = curvature.row_scale[row] * curvature.inputs.matrix[index][:, index]
        out[row, index] = torch.linalg.solve(system, right[row, index])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("long", [False, True])
def test_all_rows_are_solved_at_once(dtype: torch.dtype, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_restricted, "_STEPS", 0.0 if long else np.inf)
    block = layer(0, 9, 40, dtype)
    rng = np.random.default_rng(1)
    kept = torch.from_numpy(rng.random((9, 40)) < np.linspace(0.0, 1.0, 9)[:, None])
    right = torch.where(kept, torch.from_numpy(rng.standard_normal((9, 40)) * 10.0 ** rng.uniform(-9, 9, (9, 1))), 0.0)
    right[4] = 0.0
    solved = block.curvature.restrict(kept.reshape(-1)).solve(right[kept])
    assert solved.x is not None and not solved.repair
    assert solved.method == ("conjugate gradients" if long else "batched")
    assert solved.residual <= (kronecker_restricted.RESIDUAL if long else 1e-10)
    found, expected = torch.zeros_like(right), exact(block, kept, right)
    found[kept] = solved.x
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)
    assert float(error.max()) <= (2e-4 if long else 1e-9)


def test_the_objective_is_right_to_the_square_of_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SelectionProblem(layer(2, 12, 60, torch.float32), Partitioned.even(12, 60, 36), "joint")
    mask = solvers.solve(problem, "obd").pruned
    direct = problem.refit(mask)
    monkeypatch.setattr(kronecker_restricted, "_STEPS", 0.0)
    iterated = problem.refit(mask)
    assert (*direct.methods, *iterated.methods) == ("batched", "conjugate gradients")
    assert iterated.value == pytest.approx(direct.value, rel=1e-8)
    assert iterated.value >= direct.value * (1 - 1e-12)


def test_rows_that_are_done_sooner_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one kept input take a step, full ones many: each ends at the residual, none waits for another."""
    monkeypatch.setattr(kronecker_restricted, "_STEPS", 0.0)
    block, sizes = layer(8, 30, 50, torch.float32), []
    kept = torch.arange(50) < torch.linspace(1, 45, 30).long().unsqueeze(1)
    product = torch.addcmul
    monkeypatch.setattr(torch, "addcmul", lambda *args: (sizes.append(len(args[0])), product(*args))[1])
    right = torch.where(kept, block.multiply(block.weights).view(30, 50), 0.0)
    found = torch.zeros_like(right)
    solved = block.curvature.restrict(kept.reshape(-1)).solve(right[kept])
    found[kept] = solved.x
    curvature = block.curvature
    assert isinstance(curvature, Kronecker) and sizes[0] == 30 and min(sizes) < 24
    left = ((curvature.row_scale.unsqueeze(1) * found) @ curvature.inputs.matrix) * kept - right
    assert float((left.norm(dim=1) / right.norm(dim=1)).max()) <= kronecker_restricted.RESIDUAL


def test_what_does_not_converge_is_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_restricted, "_STEPS", 0.0)
    monkeypatch.setattr(kronecker_restricted, "_MAX_STEPS", 1)
    problem = SelectionProblem(layer(3, 4, 30), Partitioned.even(4, 30, 18), "joint")
    refit = problem.refit(solvers.solve(problem, "obd").pruned)
    assert refit.methods == ("batched",) and refit.residual < 1e-10


def test_a_singular_moment_is_not_iterated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_restricted, "_STEPS", 0.0)
    moment = torch.ones((3, 3), dtype=torch.float64)
    block = QuadraticBlock([1.0, 2.0, 4.0, 1.0, 2.0, 4.0], curvature=Kronecker(torch.ones(2), moment))
    refit = SelectionProblem(block, 2, "joint").refit(np.array([False, False, True, False, False, True]))
    assert refit.methods == ("batched",) and "in 2 rows" in refit.repairs[0]
    assert refit.value == pytest.approx(0.0, abs=1e-12)


def test_published_rules_come_in_the_order_of_the_literature() -> None:
    block = layer(4, 48, 96, torch.float32)
    problem = SelectionProblem(block, Partitioned.even(48, 96, 58), "joint")
    magnitude, wanda = (problem.selection_value(solvers.solve(problem, rule).pruned) for rule in ("magnitude", "obd"))
    sweep, admm = solvers.solve(problem, "sweep"), solvers.solve(problem, "admm")
    assert magnitude > wanda > sweep.own_objective > sweep.refit_objective > admm.refit_objective


@pytest.mark.parametrize("metric", ["obs", "diagonal", "identity"])
def test_alternating_in_single_precision_changes_little(metric: str) -> None:
    values = []
    for dtype in (torch.float32, torch.float64):
        problem = SelectionProblem(layer(5, 24, 48, dtype), Partitioned.even(24, 48, 29), "joint")
        values.append(solvers.solve(problem, f"admm[metric={metric}]").objective)
    assert values[0] == pytest.approx(values[1], rel=0.02)


def test_rows_that_the_loss_does_not_see_are_removed_first_by_alternation_too() -> None:
    seen = layer(6, 4, 10)
    assert isinstance(seen.curvature, Kronecker)
    scale = torch.tensor([1.0, 0.0, 3.0, 1.0])
    block = QuadraticBlock(seen.weights, curvature=Kronecker(scale, seen.curvature.inputs.measured_part, 0.1))
    pruned = solvers.solve(SelectionProblem(block, 15, "joint"), "admm").pruned.reshape(4, 10)
    assert pruned[1].all()


def test_a_metric_of_several_profiles_is_refused() -> None:
    curvature = layer(7, 3, 5).curvature
    with pytest.raises(CapabilityError, match="one profile"):
        curvature.penalised(torch.rand(15, dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("size", [1, 7, 129, 300])
def test_triangular_inverses(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    factor = torch.randn(size, size, dtype=torch.float64, generator=draw).tril() / size + torch.eye(size)
    assert torch.allclose(triangular_inverse(factor) @ factor, torch.eye(size, dtype=torch.float64), atol=1e-12)
