"""Every kind of curvature against its dense float64 twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import CapabilityError, Dense, Diagonal, Kronecker, LowRank, ProblemError, QuadraticBlock, SelectionProblem
from solvers.curvature import Curvature, Unmeasured
from solvers.ranking import prune_smallest, prune_smallest_magnitudes, smallest
from solvers.testing import check_curvature


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def low_rank(seed: int, n: int, rows: int, damping: float) -> tuple[Curvature, np.ndarray]:
    factor = normal(seed, rows, n)
    return LowRank(factor, damping), (factor.T @ factor).numpy() + damping * np.eye(n)


def dense(seed: int, n: int, rows: int, damping: float) -> tuple[Curvature, np.ndarray]:
    factor = normal(seed, rows, n)
    return Dense(factor.T @ factor, damping), (factor.T @ factor).numpy() + damping * np.eye(n)


def diagonal(seed: int, n: int, rows: int, damping: float) -> tuple[Curvature, np.ndarray]:
    entries = normal(seed, n).square()
    return Diagonal(entries, damping), np.diag(entries.numpy()) + damping * np.eye(n)


def kronecker(seed: int, n: int, rows: int, damping: float) -> tuple[Curvature, np.ndarray]:
    outputs, inputs = 1 + n % 5, max(1, n // 5)
    factor, scale = normal(seed, rows, inputs), 0.1 + normal(seed + 1, outputs).square()
    moment = factor.T @ factor
    twin = np.kron(np.diag(scale.numpy()), moment.numpy() + damping * np.eye(inputs))
    return Kronecker(scale, moment, damping), twin


KINDS = {"low_rank": low_rank, "dense": dense, "diagonal": diagonal, "kronecker": kronecker}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), rows=st.integers(1, 50), damped=st.booleans())
def test_every_operation_matches_the_dense_twin(kind: str, seed: int, n: int, rows: int, damped: bool) -> None:
    curvature, twin = KINDS[kind](seed, n, rows, 0.3 if damped else 0.0)
    check_curvature(curvature, twin, seed=seed, tolerance=1e-7)


def test_the_kit_finds_a_wrong_operation() -> None:
    class Wrong(LowRank):
        def columns(self, index: object) -> torch.Tensor:
            return 2.0 * super().columns(index)  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match="columns"):
        check_curvature(Wrong(normal(0, 4, 6), 0.1))


def test_a_badly_scaled_column_is_not_taken_for_a_singular_matrix() -> None:
    factor = normal(3, 9, 6)
    factor[:, 2] *= 1e7
    block = QuadraticBlock(normal(4, 6), curvature=Dense(factor.T @ factor, 1e-4))
    result = SelectionProblem(block, 2).refit(np.array([True, False, False, False, False, True]))
    assert not result.repairs


@pytest.mark.parametrize("kind", ["kronecker", "low_rank"])
def test_masks_and_dampings_share_what_is_expensive(kind: str) -> None:
    curvature, _ = KINDS[kind](0, 30, 12, 0.1)
    if isinstance(curvature, LowRank):
        gram = curvature.gram
        assert curvature.with_damping(0.4).gram is gram
    else:
        assert isinstance(curvature, Kronecker)
        root = curvature.inputs.root
        assert curvature.with_damping(0.4).inputs.root is root


def test_rows_of_a_kronecker_curvature_are_blocks_of_their_own() -> None:
    curvature, _ = kronecker(5, 23, 9, 0.2)
    assert isinstance(curvature, Kronecker)
    weights = normal(6, curvature.n)
    whole = SelectionProblem(QuadraticBlock(weights, curvature=curvature), 7, "joint")
    d = curvature.n_inputs
    matrix = curvature.inputs.matrix
    rows = [
        QuadraticBlock(weights[r * d : (r + 1) * d], curvature=Dense(scale * matrix))
        for r, scale in enumerate(curvature.row_scale.tolist())
    ]
    apart = SelectionProblem(rows, 7, "joint")
    pruned = np.random.default_rng(7).random(whole.n) < 0.4
    assert whole.selection_value(pruned) == pytest.approx(apart.selection_value(pruned), rel=1e-12)
    assert whole.joint_value(pruned) == pytest.approx(apart.joint_value(pruned), rel=1e-9)
    for name in ("obd", "greedy_ls[start=obd]", "best_swap"):
        one, other = (solvers.solve(p.with_objective("selection"), name) for p in (whole, apart))
        assert one.objective == pytest.approx(other.objective, rel=1e-9), name
    for name in ("iht[metric=obs]", "admm", "obs", "joint_ls", "joint_ls[dense_limit=1]"):
        one, other = solvers.solve(whole, name), solvers.solve(apart, name)
        assert one.objective == pytest.approx(other.objective, rel=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_kind_are_saved_and_read(kind: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    curvature, _ = KINDS[kind](8, 12, 5, 0.25)
    block = QuadraticBlock(normal(9, curvature.n), curvature=curvature, gradient=normal(10, curvature.n))
    solvers.save_block(tmp_path / "b.npz", block)
    again = solvers.load_block(tmp_path / "b.npz")
    assert type(again.curvature) is type(curvature) and again.damping == 0.25
    assert torch.equal(again.gradient, block.gradient)
    assert torch.equal(again.curvature.dense(), curvature.dense())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(torch.ones(2, 3)), "square"),
        (lambda: Dense(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "symmetric"),
        (lambda: Dense(-torch.eye(3)).root, "negative"),
        (lambda: Diagonal(torch.tensor([1.0, -1.0])), "entry 1 is -1.0"),
        (lambda: Kronecker(torch.tensor([1.0, -2.0]), torch.eye(2)), "entry 1 is -2.0"),
        (lambda: QuadraticBlock(torch.ones(3), curvature=Diagonal(torch.ones(4))), "4 weights, but there are 3"),
        (lambda: QuadraticBlock(torch.ones(3)), "either a factor or a curvature"),
        (lambda: QuadraticBlock(torch.ones(3), curvature=Diagonal(torch.tensor([1.0, float("nan"), 2.0]))), "nan"),
    ],
)
def test_what_is_no_curvature_is_refused(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ProblemError, match=message):
        make()


def test_without_a_curvature_only_rules_that_need_none_run() -> None:
    weights = normal(11, 9).float()
    problem = SelectionProblem(QuadraticBlock(weights, curvature=Unmeasured(9)), 4)
    assert problem.blocks[0].weights.dtype == torch.float32
    solution = solvers.solve(problem, "magnitude")
    assert np.isnan(solution.objective) and solution.n_pruned == 4
    with pytest.raises(CapabilityError, match="needs a curvature"):
        solvers.solve(problem, "obd")
    with pytest.raises(CapabilityError, match="no curvature was measured"):
        problem.selection_value(solution.pruned)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1e-40, 0.5, -0.5, 3.0, -7.25, 1e30]), min_size=1, max_size=40),
    cut=st.floats(0, 1),
    share=st.floats(0, 1),
    single=st.booleans(),
)
def test_selections_by_counting_are_those_by_sorting(values, cut, share, single) -> None:  # type: ignore[no-untyped-def]
    weights = torch.tensor(values, dtype=torch.float32 if single else torch.float64)
    count, split = round(share * len(values)), int(cut * len(values))
    expected = prune_smallest(weights.abs().double().numpy(), count)
    found = prune_smallest_magnitudes([part for part in (weights[:split], weights[split:]) if part.numel()], count)
    assert np.array_equal(found, expected)
    assert np.array_equal(smallest(weights.abs(), count).numpy(), expected)
