"""Bounds against brute force, their certificates against tampering, and the methods against one another."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers.bounds.certificate import relative_gap
from solvers.bounds.diagonal import DiagonalCertificate
from solvers.bounds.frank_wolfe import ResidualCertificate, frank_wolfe_bound, project_capped_simplex
from solvers.bounds.lagrangian import LagrangianCertificate
from solvers.bounds.perspective import PerspectiveCertificate
from solvers.bounds.qcr import ShiftCertificate
from solvers.bounds.shift import best_shift, safe_shift


def make_problem(seed: int, *, objective: str = "selection", n: int = 9, blocks: int = 2) -> solvers.SelectionProblem:
    rng = np.random.default_rng(seed)
    members = []
    for index in range(blocks):
        size = n // blocks + (index < n % blocks)
        rows = int(rng.integers(1, size + 3))
        factor = rng.standard_normal((rows, size))
        if seed % 3 == 1:
            factor = factor.astype(np.float32)
        gradient = rng.standard_normal(size) * 0.3 if seed % 2 else None
        members.append(
            solvers.QuadraticBlock(rng.standard_normal(size), factor, float(rng.choice([1e-3, 0.1, 1.0])), gradient)
        )
    return solvers.SelectionProblem(members, int(rng.integers(0, n + 1)), objective)


def optimum(problem: solvers.SelectionProblem) -> float:
    return solvers.solve(problem, "brute_force", with_refit=False).objective


@pytest.mark.parametrize("method", ["auto", "frank_wolfe", "qcr", "lagrangian"])
@pytest.mark.parametrize("seed", range(8))
def test_bounds_lie_below_the_optimum_and_verify(method: str, seed: int) -> None:
    problem = make_problem(seed)
    found = solvers.bound(problem, method)
    best = optimum(problem)
    assert found.value <= best + 1e-12 * problem.scale
    assert found.verify(problem) == pytest.approx(found.value, rel=1e-9, abs=1e-11 * problem.scale)
    assert found.verify(problem) <= best + 1e-12 * problem.scale


@pytest.mark.parametrize("method", ["frank_wolfe", "diagonal"])
@pytest.mark.parametrize("seed", range(10))
def test_joint_bound_lies_below_the_optimum(seed: int, method: str) -> None:
    problem = make_problem(seed, objective="joint")
    found = solvers.bound(problem, method)
    assert found.value <= optimum(problem) + 1e-12 * problem.scale
    assert found.verify(problem) == pytest.approx(found.value, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(1e-3, 1e3))
def test_any_certificate_proves_a_valid_bound(seed: int, spread: float) -> None:
    """Certificates with arbitrary entries are weak, never wrong."""
    problem = make_problem(seed, n=7)
    if problem.n_prune in (0, problem.n):
        problem = problem.with_n_prune(3)
    rng = np.random.default_rng(seed)
    best, slack = optimum(problem), 1e-12 * problem.scale
    residuals = tuple(spread * rng.standard_normal(b.curvature.rank) for b in problem.blocks)
    assert ResidualCertificate(residuals).value(problem) <= best + slack
    diagonal, point = spread * rng.standard_normal(problem.n), rng.random(problem.n)
    assert ShiftCertificate(diagonal, point).value(problem) <= best + slack
    parts = [diagonal[s] for s in problem.slices], [point[s] for s in problem.slices]
    certificate = LagrangianCertificate(float(spread * rng.standard_normal()), tuple(parts[0]), tuple(parts[1]))
    assert certificate.value(problem) <= best + slack
    joint = problem.with_objective("joint")
    assert PerspectiveCertificate(residuals).value(joint) <= optimum(joint) + slack
    shares = tuple(np.abs(part) for part in parts[0])
    points = tuple(spread * rng.standard_normal((1, b.n)) for b in problem.blocks)
    assert DiagonalCertificate(shares, points).value(joint) <= optimum(joint) + slack


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_share_inputs_are_bounded_together(seed: int, gradient: bool) -> None:
    """Against brute force on three rows of four inputs, one of which has no curvature where there is no gradient."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((6, 4))
    scale = np.array([1.0, 0.3, 0.5 if gradient else 0.0])
    kronecker = solvers.Kronecker(torch.from_numpy(scale), torch.from_numpy(inputs.T @ inputs / 6), 0.1)
    slope = 0.1 * rng.standard_normal(12) if gradient else None
    block = solvers.QuadraticBlock(rng.standard_normal(12), curvature=kronecker, gradient=slope)
    problem = solvers.SelectionProblem(block, 6, "joint")
    best = min(problem.value(np.isin(np.arange(12), p)) for p in combinations(range(12), 6))
    found = solvers.bound(problem)
    assert found.method == "diagonal" and found.verify(problem) == pytest.approx(found.value)
    assert best - 0.8 * abs(best) <= found.value <= best + 1e-12


def test_the_best_diagonal_beats_the_damping_on_a_layer() -> None:
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((200, 30)) * np.logspace(0, -1, 30)
    kronecker = solvers.Kronecker(torch.ones(10, dtype=torch.float64), torch.from_numpy(inputs.T @ inputs / 200), 1e-3)
    block = solvers.QuadraticBlock(rng.standard_normal(300), curvature=kronecker)
    problem = solvers.SelectionProblem(block, 180, "joint")
    value = solvers.solve(problem, "admm").objective
    gaps = [solvers.bound(problem, method).gap(value) for method in ("diagonal", "frank_wolfe")]
    assert 0.0 <= gaps[0] < 0.6 * gaps[1]


def test_frank_wolfe_reaches_the_optimum_of_the_relaxation() -> None:
    """Against projected gradient run for long on the same relaxation."""
    problem = make_problem(4, n=30, blocks=1).with_n_prune(20)
    found = frank_wolfe_bound(problem, tolerance=1e-7)
    quadratic, linear = problem.arrays().selection_form
    damped = problem.blocks[0].damping * problem.weights**2
    curvature = quadratic - np.diag(damped)
    cost = 0.5 * damped - linear
    z = np.full(problem.n, problem.n_prune / problem.n)
    step = 1.0 / float(np.linalg.eigvalsh(curvature)[-1])
    for _ in range(20_000):
        z = project_capped_simplex(z - step * (curvature @ z + cost), problem.n_prune)
    reference = 0.5 * z @ curvature @ z + cost @ z
    assert found.converged
    assert found.value == pytest.approx(reference, rel=1e-4)


def kronecker_problem(seed: int, n_prune: int) -> solvers.SelectionProblem:
    """A Kronecker block of several components beside one of low rank."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((3, 4))
    curvature = solvers.Kronecker(torch.tensor(rng.uniform(0.1, 3.0, 2)), torch.tensor(root.T @ root), 0.05)
    blocks = [
        solvers.QuadraticBlock(rng.standard_normal(8), curvature=curvature),
        solvers.QuadraticBlock(rng.standard_normal(5), rng.standard_normal((3, 5)), 0.1),
        solvers.QuadraticBlock(rng.standard_normal(2), curvature=solvers.Diagonal(torch.tensor([0.5, 2.0]))),
    ]
    return solvers.SelectionProblem(blocks, n_prune)


@pytest.mark.parametrize("seed", range(6))
def test_curvatures_of_several_components_are_bounded(seed: int) -> None:
    problem = kronecker_problem(seed, 4 + seed)
    found = frank_wolfe_bound(problem, tolerance=1e-6)
    assert found.converged
    assert found.verify(problem) <= optimum(problem)
    # The same relaxation, written with one factor per component.
    hessian = problem.arrays().hessian
    pieces = [np.arange(4), np.arange(4, 8), np.arange(8, 13)]
    ridge = problem.arrays().damping
    blocks = []
    for piece in pieces:
        values, vectors = np.linalg.eigh(hessian[np.ix_(piece, piece)] - np.diag(ridge[piece]))
        factor = (vectors * np.sqrt(values.clip(0.0))).T
        blocks.append(solvers.QuadraticBlock(problem.weights[piece], factor, float(ridge[piece][0])))
    twin = frank_wolfe_bound(solvers.SelectionProblem([*blocks, problem.blocks[2]], problem.n_prune), tolerance=1e-6)
    assert found.value == pytest.approx(twin.value, rel=1e-5, abs=1e-9)


def test_a_gap_is_relative_to_the_objective_itself() -> None:
    assert relative_gap(2.0, 1.5) == 0.25
    assert relative_gap(0.0, 0.0) == 0.0
    assert relative_gap(0.0, -1e-30) == np.inf
    assert relative_gap(-2.0, -3.0) == 0.5


@pytest.mark.parametrize("method", ["frank_wolfe", "qcr", "lagrangian"])
def test_a_bound_without_time_is_valid_and_says_it_has_not_converged(method: str) -> None:
    problem = make_problem(1)
    hurried = solvers.bound(problem, method, time_limit=1e-9)
    assert not hurried.converged
    assert hurried.value <= optimum(problem)


def test_qcr_is_tighter_than_frank_wolfe() -> None:
    for seed in (0, 2, 6, 8):
        problem = make_problem(seed, n=12, blocks=1).with_n_prune(6)
        tight, plain = solvers.bound(problem, "qcr").value, solvers.bound(problem, "frank_wolfe").value
        assert tight >= plain - 1e-4 * abs(plain)


def test_lagrangian_equals_the_best_multiplier() -> None:
    """Against a grid of multipliers with exact blocks: the Lagrangian bound cannot exceed the Lagrangian dual."""
    problem = make_problem(10, n=10, blocks=2).with_n_prune(5)
    found = solvers.bound(problem, "lagrangian")
    values = []
    for block in problem.blocks:
        single = [solvers.SelectionProblem(block, k) for k in range(block.n + 1)]
        values.append(np.array([optimum(p) if p.n_prune > 0 else 0.0 for p in single]))
    grid = np.linspace(-20.0, 20.0, 4001)
    dual = max(
        theta * problem.n_prune + sum(float((v - theta * np.arange(v.size)).min()) for v in values) for theta in grid
    )
    assert found.value <= dual + 1e-2 * abs(dual)


def test_a_bound_that_its_certificate_does_not_prove_is_refused() -> None:
    problem = make_problem(3).with_n_prune(4)
    found = solvers.bound(problem, "qcr")
    with pytest.raises(solvers.BackendError, match="certificate"):
        dataclasses.replace(found, value=found.value + 0.1 * problem.scale).verify(problem)


@pytest.mark.parametrize("n_prune", [0, 9])
def test_trivial_budgets(n_prune: int) -> None:
    for objective in ("selection", "joint"):
        problem = make_problem(1, objective=objective).with_n_prune(n_prune)
        found = solvers.bound(problem)
        assert found.value == pytest.approx(optimum(problem), rel=1e-9, abs=1e-11 * problem.scale)


def test_what_is_refused() -> None:
    problem = make_problem(0).with_n_prune(4)
    with pytest.raises(solvers.UnknownNameError, match="frank_wolfe"):
        solvers.bound(problem, "frank_wolf")
    with pytest.raises(solvers.OptionError, match="time_limit"):
        solvers.bound(problem, time_limit=0.0)
    with pytest.raises(solvers.CapabilityError, match="joint"):
        solvers.bound(problem.with_objective("joint"), "qcr")
    large = solvers.SelectionProblem([solvers.QuadraticBlock(np.ones(1001), np.ones((1, 1001)), 1.0)], 10)
    with pytest.raises(solvers.CapabilityError, match="1001"):
        solvers.bound(large, "qcr")
    with pytest.raises(solvers.CapabilityError, match="blocks of at most"):
        solvers.bound(large, "lagrangian")
    undamped = solvers.SelectionProblem([solvers.QuadraticBlock(np.ones(3), np.eye(3))], 1, "joint")
    with pytest.raises(solvers.CapabilityError, match="damping"):
        solvers.bound(undamped, "frank_wolfe")
    singular = solvers.SelectionProblem([solvers.QuadraticBlock(np.ones(3), np.ones((1, 3)))], 1, "joint")
    with pytest.raises(solvers.CapabilityError, match="singular"):
        solvers.bound(singular, "diagonal")
    with pytest.raises(solvers.CapabilityError, match="joint objective only"):
        solvers.bound(problem, "diagonal")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_projection_onto_the_capped_simplex(n: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, count = scale * rng.standard_normal(n), int(rng.integers(0, n + 1))
    z = project_capped_simplex(x, count)
    assert z.min() >= 0.0
    assert z.max() <= 1.0
    assert z.sum() == pytest.approx(count, abs=1e-9 * n)
    # Optimality: (x − z) is largest where z = 1 and smallest where z = 0.
    rest = x - z
    low = rest[z < 1.0].max(initial=-np.inf)
    high = rest[z > 0.0].min(initial=np.inf)
    assert low <= high + 1e-8 * max(1.0, scale)


@pytest.mark.parametrize("seed", range(6))
def test_the_shift_is_feasible_and_optimal(seed: int) -> None:
    """The shift is feasible, and no worse than smallest-eigenvalue shifts; with k it beats without."""
    rng = np.random.default_rng(seed)
    n, count = 12, 5
    root = rng.standard_normal((n, n)) * rng.uniform(0.1, 2.0, n)
    quadratic = root.T @ root / n
    linear = rng.standard_normal(n) * 0.1
    shift = best_shift(quadratic, linear, count, tolerance=1e-7)
    lowered = safe_shift(quadratic, shift.diagonal)
    basis = np.linalg.svd(np.ones((1, n)))[2][1:].T
    assert np.linalg.eigvalsh(basis.T @ (quadratic - np.diag(lowered)) @ basis)[0] >= 0.0
    assert np.abs(lowered - shift.diagonal).max() < 1e-6
    lowest = float(np.linalg.eigvalsh(basis.T @ quadratic @ basis)[0])
    problem_value = best_shift(quadratic - lowest * np.eye(n), linear - 0.5 * lowest, count, tolerance=1e-7).value
    assert shift.value == pytest.approx(problem_value, rel=1e-4, abs=1e-6)
    assert best_shift(quadratic, linear, None, tolerance=1e-7).value <= shift.value + 1e-6
    assert shift.point.sum() == pytest.approx(count, abs=1e-5)
