"""Speed of `sweep` and `admm` on layers: ``pytest tests/benchmarks/test_layer_speed.py --benchmark-enable -s``.

`sweep` is timed against a plain PyTorch loop of the same method, `admm` against the rate of float32 products measured
in the same run, over the products that its iterations need. Shapes are those of a language model of 135 M weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from solvers import Kronecker, Partitioned, QuadraticBlock, SelectionProblem
from solvers.joint.admm import STRIDE, AdmmSolver
from solvers.joint.sweep import SweepSolver
from solvers.solver import Context

SHAPES = [(1536, 576), (576, 576), (576, 1536)]
SPARSITY = 0.6


def problem_of(rows: int, inputs: int) -> SelectionProblem:
    """A layer with inputs like activations, .6 of every row to go."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs // 6, inputs, generator=draw) * torch.linspace(0, -4, inputs // 6).exp().unsqueeze(1)
    activations = torch.randn(4096, inputs // 6, generator=draw) @ mixing
    activations += 0.3 * torch.randn(4096, inputs, generator=draw)
    activations *= torch.exp(0.7 * torch.randn(inputs, generator=draw))
    moment = activations.T @ activations / 4096
    weights = torch.randn(rows * inputs, generator=draw)
    curvature = Kronecker(torch.ones(rows), moment, 0.01 * float(moment.diagonal().mean()))
    budget = Partitioned.even(rows, inputs, int(SPARSITY * inputs))
    return SelectionProblem(QuadraticBlock(weights, curvature=curvature), budget, "joint")


def plain_sweep(weights: torch.Tensor, hessian: torch.Tensor, width: int = 128) -> torch.Tensor:
    """The published loop: inverse, its factor, then column after column."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    weights = weights.clone()
    for first in range(0, weights.shape[1], width):
        last = min(first + width, weights.shape[1])
        part, inner = weights[:, first:last].clone(), upper[first:last, first:last]
        done, errors = torch.zeros_like(part), torch.zeros_like(part)
        score = part**2 / inner.diagonal().reshape(1, -1) ** 2
        mask = score <= score.flatten().sort().values[int(score.numel() * SPARSITY)]
        for i in range(last - first):
            column = part[:, i]
            left = column.clone()
            left[mask[:, i]] = 0
            done[:, i] = left
            error = (column - left) / inner[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(inner[i, i:].unsqueeze(0))
            errors[:, i] = error
        weights[:, first:last] = done
        weights[:, last:] -= errors.matmul(upper[first:last, last:])
    return weights


def fastest(action: Callable[[], object], times: int = 5) -> float:
    """Least seconds of several runs, which other work on the machine disturbs least."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return min(found)


def fresh(problem: SelectionProblem) -> SelectionProblem:
    """The same layer without anything kept from earlier runs."""
    (block,) = problem.blocks
    curvature = block.curvature
    assert isinstance(curvature, Kronecker)
    again = Kronecker(curvature.row_scale, curvature.inputs.measured_part.to(curvature.dtype), curvature.damping)
    return SelectionProblem(QuadraticBlock(block.weights, curvature=again), problem.budget, "joint")


@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_sweep_against_a_plain_loop(rows: int, inputs: int, benchmark: BenchmarkFixture) -> None:
    problem = problem_of(rows, inputs)
    curvature = problem.blocks[0].curvature
    assert isinstance(curvature, Kronecker)
    weights, hessian = problem.blocks[0].weights.view(rows, inputs).float(), curvature.inputs.matrix.float()
    layers = [fresh(problem) for _ in range(5)]
    plain = fastest(lambda: plain_sweep(weights, hessian))
    ours = fastest(lambda: SweepSolver().run(layers.pop(), Context()))
    benchmark.extra_info["ratio"] = ours / plain
    benchmark.pedantic(SweepSolver().run, (problem, Context()))
    print(f"\n{rows} x {inputs}: sweep {ours:.3f} s, plain loop {plain:.3f} s, ratio {ours / plain:.2f}")
    if benchmark.enabled:
        assert ours <= 1.2 * plain


@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_admm_keeps_half_of_the_rate_of_products(rows: int, inputs: int, benchmark: BenchmarkFixture) -> None:
    problem = problem_of(rows, inputs)
    left, right = torch.randn(rows, inputs), torch.randn(inputs, inputs)
    product = fastest(lambda: left @ right)
    AdmmSolver().run(fresh(problem), Context())
    layers = [fresh(problem) for _ in range(3)]
    iterations: list[float] = []

    def run() -> None:
        iterations.append(AdmmSolver().run(layers.pop(), Context()).statistics["iterations"])

    seconds = fastest(run, 3)
    # One product a step, and half a product of d × d, which is symmetric, whenever the penalty changes.
    needed = product * (iterations[0] + (iterations[0] // STRIDE + 1) * inputs / (2 * rows))
    benchmark.extra_info.update(share=needed / seconds, iterations=iterations[0])
    benchmark.pedantic(AdmmSolver().run, (problem, Context()))
    share = needed / seconds
    print(f"\n{rows} x {inputs}: admm {seconds:.2f} s, {iterations[0]:.0f} steps, {share:.0%} of the product rate")
    if benchmark.enabled:
        assert share >= 0.5
