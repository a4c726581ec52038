"""Rows of layers: elimination and swaps in all rows at once, against dense problems and exhaustive swaps."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag

from solvers import Cardinality, Dense, Kronecker, LowRank, Partitioned, QuadraticBlock, SelectionProblem, solve
from solvers.arrays import Mask
from solvers.joint import row_search as joint
from solvers.joint.row_elimination import eliminate_rows
from solvers.layer_rows import LayerRows, rowwise, settle
from solvers.local_search import row_search as selection
from solvers.moves.elimination_path import eliminate_dense
from solvers.moves.reduced import ReducedProblem
from solvers.solution import Reason
from solvers.solver import Deadline


def layer(seed: int, rows: int, inputs: int, gradient: bool) -> QuadraticBlock:
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((2 * inputs, inputs)) @ rng.standard_normal((inputs, inputs))
    moment = torch.from_numpy(samples.T @ samples / inputs)
    scale = torch.from_numpy(10.0 ** rng.uniform(-2, 2, rows))
    weights = rng.standard_normal(rows * inputs) * rng.uniform(0.1, 3.0, rows).repeat(inputs)
    slope = 0.1 * rng.standard_normal(rows * inputs) if gradient else None
    return QuadraticBlock(weights, curvature=Kronecker(scale, moment, 0.01), gradient=slope, name=f"layer{seed}")


def layers(seed: int, gradient: bool, objective: str, *, grouped: bool) -> SelectionProblem:
    """Two layers of 4 × 5 and 3 × 6 weights."""
    blocks = [layer(seed, 4, 5, gradient), layer(seed + 1, 3, 6, gradient)]
    budget = Partitioned((10, 10, 18), (4, 7, 9)) if grouped else Cardinality(17)
    return SelectionProblem(blocks, budget, objective)


def swaps(problem: SelectionProblem, pruned: Mask) -> list[Mask]:
    """All masks one swap away that the budget allows."""
    found = []
    for i, j in product(np.flatnonzero(pruned), np.flatnonzero(~pruned)):
        other = pruned.copy()
        other[i], other[j] = False, True
        if not problem.budget.violation(other):
            found.append(other)
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from(["joint", "selection"]))
def test_no_swap_betters_what_rows_settle_at(seed: int, gradient: bool, grouped: bool, objective: str) -> None:
    problem = layers(seed, gradient, objective, grouped=grouped)
    start = problem.budget.cheapest_of(np.random.default_rng(seed).random(problem.n))
    rows = LayerRows.of(problem, invertible=objective == "joint")
    assert rows is not None
    visit = joint.settle_row if objective == "joint" else selection.settle_row
    found = settle(rows, start, visit, min_gain=1e-10, rounds=500, deadline=Deadline())
    assert found.reason is Reason.COMPLETED
    assert not problem.budget.violation(found.pruned)
    value = problem.value(found.pruned)
    assert found.value == pytest.approx(value, rel=1e-6, abs=1e-9 * problem.scale)
    assert value <= problem.value(start) + 1e-9 * problem.scale
    slack = 1e-7 * abs(value) + 1e-9 * problem.scale
    assert min(problem.value(other) for other in swaps(problem, found.pruned)) >= value - slack


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.integers(0, 38))
def test_elimination_by_rows_is_greedy_elimination_of_all(seed: int, gradient: bool, count: int) -> None:
    problem = layers(seed, gradient, "joint", grouped=False).with_n_prune(count)
    rows = LayerRows.of(problem, invertible=True)
    assert rows is not None
    hessian = block_diag(*[block.curvature.dense().numpy() for block in problem.blocks])
    linear = hessian @ problem.weights - (problem.gradient if problem.gradient is not None else 0.0)
    order, _ = eliminate_dense(ReducedProblem(torch.from_numpy(hessian), torch.from_numpy(linear)), count, "all")
    expected = np.zeros(problem.n, dtype=np.bool_)
    expected[order.numpy()] = True
    found, completed = eliminate_rows(rows, Deadline())
    assert completed
    # A cheaper removal that waited for a dearer one in its row goes right after it, in either.
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("spec", ["obs", "joint_ls[dense_limit=1]", "joint_ls[dense_limit=1,start=magnitude]"])
@pytest.mark.parametrize("grouped", [False, True])
def test_solvers_go_by_rows_and_keep_the_budget(spec: str, grouped: bool) -> None:
    problem = layers(3, True, "joint", grouped=grouped)
    solution = solve(problem, spec)
    assert not problem.budget.violation(solution.pruned)
    assert solution.objective < solve(problem, "magnitude").refit_objective


def test_large_layers_are_searched_by_rows_too() -> None:
    block = layer(7, 120, 40, gradient=False)
    problem = SelectionProblem(block, 2400, "selection")
    solution = solve(problem, "best_swap")
    start = solve(problem, "obd")
    assert solution.objective < start.objective
    rng = np.random.default_rng(0)
    gone, stay = np.flatnonzero(solution.pruned), np.flatnonzero(~solution.pruned)
    for i, j in zip(rng.choice(gone, 300), rng.choice(stay, 300), strict=True):
        other = solution.pruned.copy()
        other[i], other[j] = False, True
        assert problem.value(other) >= solution.objective * (1 - 1e-9)


def test_time_that_is_up_leaves_a_feasible_mask() -> None:
    problem = layers(5, False, "joint", grouped=True)
    rows = LayerRows.of(problem, invertible=True)
    assert rows is not None
    pruned, completed = eliminate_rows(rows, Deadline(0.0))
    assert not completed
    assert not problem.budget.violation(pruned)
    found = settle(rows, pruned, joint.settle_row, min_gain=0.0, rounds=9, deadline=Deadline(0.0))
    assert found.reason is Reason.TIME_LIMIT
    assert found.pruned.tolist() == pruned.tolist()


def test_what_is_not_made_of_rows_is_left_to_others() -> None:
    whole = layers(1, False, "joint", grouped=False)
    assert rowwise(whole)
    assert not rowwise(whole.with_budget(Partitioned((3, 35), (1, 9))))
    assert not rowwise(SelectionProblem(layer(1, 1, 6, False), 2, "joint"))
    dense = QuadraticBlock(np.ones(3), curvature=Dense(torch.eye(3, dtype=torch.float64)))
    low = QuadraticBlock(np.ones(3), curvature=LowRank(torch.ones(2, 3, dtype=torch.float64), 0.1))
    assert not rowwise(SelectionProblem([dense, layer(1, 2, 6, False)], 2, "joint"))
    assert not rowwise(SelectionProblem([low], 2, "joint"))
    dark = Kronecker(torch.tensor([1.0, 0.0], dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    problem = SelectionProblem(QuadraticBlock(np.ones(8), curvature=dark), 2, "joint")
    assert LayerRows.of(problem, invertible=True) is None
    assert LayerRows.of(problem, invertible=False) is not None


def test_least_gain_of_a_swap_is_kept() -> None:
    problem = layers(11, False, "selection", grouped=False)
    rows = LayerRows.of(problem, invertible=False)
    assert rows is not None
    start = problem.budget.cheapest_of(np.random.default_rng(1).random(problem.n))
    visit = partial(selection.settle_row, min_gain=1e9 * problem.scale)
    assert settle(rows, start, visit, min_gain=1e9, rounds=9, deadline=Deadline()).pruned.tolist() == start.tolist()
