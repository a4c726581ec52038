"""The shared kernels of the joint solvers against dense float64 formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from solvers import QuadraticBlock, SelectionProblem, SingularHessianError
from solvers.curvature import Dense as DenseCurvature
from solvers.curvature import Diagonal
from solvers.joint.kept import KeptSystem, dense_problem, kept_system
from solvers.moves import joint_swaps
from solvers.moves.elimination_path import eliminate_dense
from solvers.moves.reduced import ReducedProblem
from solvers.refit import refit
from solvers.regularise import regularised
from tests.conftest import random_block


class Dense:
    """H, c, the constant and the refit of masks, by the book."""

    def __init__(self, block: QuadraticBlock) -> None:
        arrays = block.arrays()
        self.hessian = arrays.hessian
        self.linear = self.hessian @ arrays.weights - arrays.gradient
        self.constant = 0.5 * arrays.weights @ self.hessian @ arrays.weights - arrays.gradient @ arrays.weights

    def solve(self, kept: np.ndarray) -> tuple[np.ndarray, float]:
        inside = np.flatnonzero(kept)
        v = np.zeros(len(kept))
        if inside.size:
            v[inside] = np.linalg.solve(self.hessian[np.ix_(inside, inside)], self.linear[inside])
        return v, self.constant - 0.5 * self.linear @ v

    def value(self, kept: np.ndarray) -> float:
        return self.solve(kept)[1]


def some_kept(seed: int, n: int, n_kept: int) -> np.ndarray:
    kept = np.zeros(n, dtype=bool)
    kept[np.random.default_rng(seed).permutation(n)[:n_kept]] = True
    return kept


def single(block: QuadraticBlock) -> QuadraticBlock:
    return QuadraticBlock(block.weights, block.factor.float(), block.damping, block.gradient, block.name)


def of_kind(block: QuadraticBlock, kind: str) -> QuadraticBlock:
    """The same block with another kind of curvature."""
    if kind == "low_rank":
        return block
    if kind == "single":
        return single(block)
    hessian = block.curvature.dense()
    curvature = DenseCurvature(hessian) if kind == "dense" else Diagonal(hessian.diagonal())
    return QuadraticBlock(block.weights, curvature=curvature, gradient=block.gradient, name=block.name)


def assert_scores(system: KeptSystem, dense: Dense, kept: np.ndarray, tolerance: float) -> None:
    """Costs and gains are the changes of the objective."""
    base = dense.value(kept)
    assert system.objective() == pytest.approx(base, rel=0.1 * tolerance)
    for (index, scores), sign in ((system.removal_costs(), 1.0), (system.insertion_gains(), -1.0)):
        for i, score in zip(index.tolist(), scores.tolist(), strict=True):
            moved = kept.copy()
            moved[i] = not moved[i]
            assert score == pytest.approx(sign * (dense.value(moved) - base), rel=tolerance, abs=tolerance * abs(base))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("kind", ["low_rank", "single", "dense", "diagonal"])
def test_scores_are_the_changes_of_the_objective(gradient: bool, rows: int, kind: str) -> None:
    block = of_kind(random_block(1, 14, rows, damping=0.05, gradient=gradient), kind)
    kept = some_kept(2, 14, 8)
    system = kept_system(block, torch.from_numpy(kept))
    assert_scores(system, Dense(block), kept, 1e-4 if kind == "single" else 1e-8)


@pytest.mark.parametrize("kind", ["low_rank", "dense", "diagonal"])
def test_scores_have_their_textbook_forms(kind: str) -> None:
    block = of_kind(random_block(3, 12, 5, damping=0.2, gradient=True), kind)
    dense = Dense(block)
    kept = some_kept(4, 12, 7)
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    inverse = np.linalg.inv(dense.hessian[np.ix_(inside, inside)])
    v = inverse @ dense.linear[inside]
    cross = dense.hessian[np.ix_(outside, inside)]
    rho = dense.linear[outside] - cross @ v
    schur = np.diag(dense.hessian)[outside] - np.einsum("ij,jk,ik->i", cross, inverse, cross)
    system = kept_system(block, torch.from_numpy(kept))
    np.testing.assert_allclose(system.removal_costs()[1], v**2 / (2 * np.diag(inverse)), rtol=1e-9)
    np.testing.assert_allclose(system.insertion_gains()[1], rho**2 / (2 * schur), rtol=1e-9)
    np.testing.assert_allclose(
        system.cross(torch.from_numpy(inside), torch.from_numpy(outside)), (cross @ inverse).T, rtol=1e-8, atol=1e-12
    )


def test_an_exchange_across_the_point_of_rebuilding_is_not_half_done() -> None:
    block = random_block(5, 8, 5, damping=0.05, gradient=True)
    system = kept_system(block, torch.tensor([True] * 4 + [False] * 4))
    system.change(removed=torch.tensor([0, 1, 2]), added=torch.tensor([5, 6, 7]))
    fresh = kept_system(block, system.kept)
    torch.testing.assert_close(system.removal_costs()[1], fresh.removal_costs()[1], rtol=1e-9, atol=0.0)
    assert system.objective() == pytest.approx(fresh.objective(), rel=1e-9)


def test_changes_leave_the_same_state_as_a_fresh_system() -> None:
    block = single(random_block(5, 60, 9, damping=0.05, gradient=True))
    kept = torch.ones(60, dtype=torch.bool)
    system = kept_system(block, kept)
    system.change(removed=torch.arange(0, 7))
    system.change(removed=torch.arange(30, 45), added=torch.arange(2, 5))
    system.change(removed=torch.arange(45, 60))
    expected = torch.ones(60, dtype=torch.bool)
    expected[[0, 1, 5, 6, *range(30, 60)]] = False
    assert torch.equal(system.kept, expected)
    assert system.n_kept == int(expected.sum())
    fresh = kept_system(block, expected)
    torch.testing.assert_close(system.removal_costs()[1], fresh.removal_costs()[1], rtol=1e-4, atol=0.0)
    assert system.objective() == pytest.approx(fresh.objective(), rel=1e-5)
    assert bool(kept.all()), "the mask that was given must not change"


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", ["low_rank", "dense", "diagonal"])
def test_a_reduced_problem_has_the_differences_of_the_whole(gradient: bool, kind: str) -> None:
    block = of_kind(random_block(6, 15, 6, damping=0.1, gradient=gradient), kind)
    dense = Dense(block)
    kept = some_kept(7, 15, 9)
    pool = torch.tensor([1, 3, 4, 8, 11, 14])
    reduced = kept_system(block, torch.from_numpy(kept)).reduced(pool)
    hessian, linear = reduced.hessian.numpy(), reduced.linear.numpy()

    def reduced_value(mask: np.ndarray) -> float:
        inside = np.flatnonzero(mask)
        return float(-0.5 * linear[inside] @ np.linalg.solve(hessian[np.ix_(inside, inside)], linear[inside]))

    differences = []
    for bits in itertools.product([False, True], repeat=6):
        whole = kept.copy()
        whole[pool.numpy()] = bits
        differences.append(dense.value(whole) - reduced_value(np.array(bits)))
    np.testing.assert_allclose(differences, differences[0], rtol=1e-9)


def test_a_dense_problem_is_the_reduced_one_of_an_empty_rest() -> None:
    block = random_block(8, 10, 4, damping=0.3, gradient=True)
    pool = torch.tensor([0, 2, 3, 7, 9])
    kept = torch.zeros(10, dtype=torch.bool)
    kept[pool] = True
    reduced = kept_system(block, kept).reduced(pool)
    direct = dense_problem(block, pool)
    torch.testing.assert_close(direct.hessian, reduced.hessian)
    torch.testing.assert_close(direct.linear, reduced.linear)


@pytest.mark.parametrize("n", [9, 130])
def test_elimination_removes_the_cheapest_each_time_at_its_true_cost(n: int) -> None:
    block = random_block(9, n, n // 2, damping=0.05, gradient=True)
    dense = Dense(block)
    count = n - 2
    order, costs = eliminate_dense(dense_problem(block, torch.arange(n)), count, "b")
    kept = np.ones(n, dtype=bool)
    value = dense.value(kept)
    checked = range(count) if n < 20 else (0, 1, 47, 48, 49, 95, 96, 100, count - 1)
    for step, (i, cost) in enumerate(zip(order.tolist(), costs.tolist(), strict=True)):
        if step in checked:
            value = dense.value(kept)
            rises = np.full(n, np.inf)
            for j in np.flatnonzero(kept):
                without = kept.copy()
                without[j] = False
                rises[j] = dense.value(without) - value
            assert cost == pytest.approx(rises.min(), rel=1e-6)
            assert rises[i] == pytest.approx(rises.min(), rel=1e-6)
        kept[i] = False
    assert sorted(set(order.tolist())) == sorted(order.tolist())


def test_elimination_refuses_a_singular_matrix() -> None:
    with pytest.raises(SingularHessianError, match="larger damping"):
        eliminate_dense(ReducedProblem(torch.ones(3, 3).double(), torch.ones(3).double()), 2, "b")


def test_damping_is_repaired_only_where_it_must_be_and_said_so() -> None:
    found, repair = regularised(random_block(10, 9, 5, damping=0.0))
    assert 0.0 < found.damping < 1e-6
    assert "damping 0 with 5 rows for 9 weights" in repair
    damped = random_block(10, 9, 5, damping=0.5)
    assert regularised(damped) == (damped, "")
    nothing = QuadraticBlock(np.ones(3), np.zeros((1, 3)), 0.0)
    with pytest.raises(SingularHessianError, match="all zero"):
        regularised(nothing)


@pytest.mark.parametrize("seed", range(3))
def test_the_tableau_and_its_pivots_follow_the_dense_algebra(seed: int) -> None:
    block = random_block(seed, 11, 6, damping=0.1, gradient=True)
    dense = Dense(block)
    kept = some_kept(seed, 11, 5)
    table, solution = joint_swaps.build(dense.hessian, dense.linear, kept)
    before = dense.value(kept)
    for k in (0, 4, 7, 0):
        change = joint_swaps.pivot(table, solution, k, kept)
        after = dense.value(kept)
        assert change == pytest.approx(after - before, rel=1e-9, abs=1e-12)
        before = after
        fresh_table, fresh_solution = joint_swaps.build(dense.hessian, dense.linear, kept)
        np.testing.assert_allclose(table, fresh_table, atol=1e-9)
        np.testing.assert_allclose(solution, fresh_solution, atol=1e-9)


def test_the_best_swap_is_the_best_of_all_swaps() -> None:
    block = random_block(12, 10, 5, damping=0.1)
    dense = Dense(block)
    kept = some_kept(12, 10, 4)
    table, solution = joint_swaps.build(dense.hessian, dense.linear, kept)
    change, out, into = joint_swaps.best_swap(
        table, solution, np.flatnonzero(kept), np.flatnonzero(~kept), np.zeros(10, np.int64), np.full(10, 10)
    )
    changes = {}
    for i, j in itertools.product(np.flatnonzero(kept), np.flatnonzero(~kept)):
        swapped = kept.copy()
        swapped[i], swapped[j] = False, True
        changes[int(i), int(j)] = dense.value(swapped) - dense.value(kept)
    assert changes[out, into] == pytest.approx(min(changes.values()), rel=1e-9)
    assert change == pytest.approx(changes[out, into], rel=1e-9)


def test_the_dense_oracle_agrees_with_the_refit() -> None:
    block = random_block(13, 8, 4, damping=0.1, gradient=True)
    kept = some_kept(13, 8, 5)
    v, value = Dense(block).solve(kept)
    judged = refit(SelectionProblem([block], 3, "joint"), ~kept)
    assert judged.value == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(judged.weights, v, atol=1e-10)
