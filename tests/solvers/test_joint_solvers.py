"""`obs`, `joint_ls`, `iht` and `admm` as backends."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from solvers import CapabilityError, OptionError, QuadraticBlock, Reason, SelectionProblem, load_problem, solve
from solvers.joint import pool_search as pools
from solvers.joint.elimination import EliminationPlan, eliminate
from solvers.solver import Deadline
from tests.conftest import random_block, random_problem

SPECS = ["obs", "joint_ls", "iht", "admm"]
# Settings that send small problems through the code for large ones.
LARGE_SPECS = [
    "obs[exact_below=3,pool=6,chunks=4]",
    "obs[exact_below=1,pool=0,chunks=3]",
    "joint_ls[dense_limit=1,width=4,start=magnitude]",
]


def brute_force(problem: SelectionProblem) -> float:
    best = np.inf
    for chosen in itertools.combinations(range(problem.n), problem.n_prune):
        mask = np.zeros(problem.n, dtype=bool)
        mask[list(chosen)] = True
        best = min(best, problem.joint_value(mask))
    return best


def permuted(problem: SelectionProblem, order: np.ndarray) -> SelectionProblem:
    (block,) = problem.blocks
    gradient = None if block.gradient is None else block.gradient[order]
    return SelectionProblem(
        [QuadraticBlock(block.weights[order], block.factor[:, order], block.damping, gradient)],
        problem.n_prune,
        "joint",
    )


@pytest.mark.parametrize("spec", [*SPECS, *LARGE_SPECS])
@pytest.mark.parametrize("sizes", [(12,), (5, 9, 2)])
@pytest.mark.parametrize("gradient", [False, True])
def test_exactly_the_budget_is_removed_and_never_below_the_optimum(
    spec: str, sizes: tuple[int, ...], gradient: bool
) -> None:
    whole = random_problem(1, sizes, 1, "joint", gradient=gradient)
    for n_prune in (1, whole.n // 2, whole.n - 1):
        problem = whole.with_n_prune(n_prune)
        solution = solve(problem, spec)
        assert solution.n_pruned == n_prune
        if n_prune != whole.n // 2 or whole.n <= 12:
            best = brute_force(problem)
            assert solution.objective >= best - 1e-9 * abs(best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gradient", [False, True])
def test_joint_ls_finds_the_optimum_of_small_problems(seed: int, gradient: bool) -> None:
    sizes = (10,) if seed % 2 else (6, 4)
    problem = random_problem(seed, sizes, 3 + seed, "joint", gradient=gradient)
    solution = solve(problem, "joint_ls[iterations=2000]", seed=seed)
    assert solution.objective == pytest.approx(brute_force(problem), rel=1e-9)


def test_joint_ls_meets_or_betters_the_stored_joint_optima(shared: Path) -> None:
    gaps = []
    for entry in json.loads((shared / "blocks" / "optima.json").read_text()):
        if entry["objective"] == "joint" and not entry["gradient"] and entry["n"] <= 60:
            path = shared / "blocks" / f"{entry['block']}.npz"
            problem = load_problem(path, n_prune=entry["n_prune"], objective="joint", use_gradient=False)
            gaps.append(solve(problem, "joint_ls").objective / entry["best"] - 1.0)
    assert len(gaps) >= 5
    assert max(gaps) < 1e-4
    assert np.mean(gaps) < 1e-2


@pytest.mark.parametrize("spec", ["joint_ls[iterations=50]", "joint_ls[dense_limit=1,width=5]"])
@pytest.mark.parametrize("sizes", [(24,), (14, 10)])
@pytest.mark.parametrize("gradient", [False, True])
def test_joint_ls_ends_in_a_one_swap_local_optimum(spec: str, sizes: tuple[int, ...], gradient: bool) -> None:
    problem = random_problem(4, sizes, 14, "joint", gradient=gradient)
    solution = solve(problem, spec)
    mask = solution.pruned.copy()
    for i, j in itertools.product(np.flatnonzero(~mask), np.flatnonzero(mask)):
        swapped = mask.copy()
        swapped[i], swapped[j] = True, False
        assert problem.joint_value(swapped) >= solution.objective - 2e-6 * abs(solution.objective)


@pytest.mark.parametrize("spec", ["joint_ls", "joint_ls[dense_limit=1,width=5]", "iht[metric=diagonal]", "admm"])
def test_a_search_never_worsens_its_start_and_its_trace_falls(spec: str) -> None:
    problem = random_problem(5, (20, 10), 18, "joint", gradient=True)
    start = np.zeros(30, dtype=bool)
    start[::5] = True
    start[np.flatnonzero(~start)[:12]] = True
    solution = solve(problem, spec, start=start)
    assert solution.objective <= problem.joint_value(start)
    objectives = [point.objective for point in solution.trace]
    assert objectives
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(objectives))
    assert objectives[-1] == pytest.approx(solution.objective, rel=1e-6)


@pytest.mark.parametrize("spec", ["obs", LARGE_SPECS[0], LARGE_SPECS[1], "iht", "admm", LARGE_SPECS[2]])
def test_masks_follow_a_renumbering_of_the_weights(spec: str) -> None:
    problem = random_problem(6, (18,), 11, "joint", gradient=True)
    order = np.random.default_rng(0).permutation(18)
    there = solve(permuted(problem, order), spec)
    np.testing.assert_array_equal(there.pruned, solve(problem, spec).pruned[order])


@pytest.mark.parametrize("spec", [*SPECS, *LARGE_SPECS])
def test_the_same_seed_gives_the_same_mask(spec: str) -> None:
    problem = random_problem(7, (25,), 15, "joint")
    np.testing.assert_array_equal(solve(problem, spec, seed=3).pruned, solve(problem, spec, seed=3).pruned)


@pytest.mark.parametrize("spec", [*SPECS, *LARGE_SPECS])
def test_an_expired_limit_still_gives_a_whole_mask(spec: str) -> None:
    problem = random_problem(8, (30, 20), 33, "joint", gradient=True)
    solution = solve(problem, spec, time_limit=1e-9)
    assert solution.n_pruned == 33
    if spec not in ("obs",):
        assert solution.reason is Reason.TIME_LIMIT


@pytest.mark.parametrize("spec", [*SPECS, *LARGE_SPECS])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_choice_does_not_depend_on_the_units(spec: str, scale: float) -> None:
    problem = random_problem(9, (20,), 12, "joint", gradient=True)
    (block,) = problem.blocks
    assert block.gradient is not None
    scaled = QuadraticBlock(block.weights, block.factor * scale, block.damping * scale**2, block.gradient * scale**2)
    here, there = solve(problem, spec), solve(SelectionProblem([scaled], 12, "joint"), spec)
    assert there.objective / scale**2 == pytest.approx(here.objective, rel=1e-6)


def test_obs_is_exact_backward_elimination_when_weights_go_one_at_a_time() -> None:
    problem = random_problem(10, (8, 6), 7, "joint", gradient=True)
    mask = np.zeros(14, dtype=bool)
    for _ in range(7):
        options = np.flatnonzero(~mask)
        values = []
        for i in options:
            trial = mask.copy()
            trial[i] = True
            values.append(problem.joint_value(trial))
        mask[options[int(np.argmin(values))]] = True
    np.testing.assert_array_equal(solve(problem, "obs").pruned, mask)
    np.testing.assert_array_equal(solve(problem, "obs[exact_below=1,pool=0,chunks=10000,refresh=1]").pruned, mask)
    np.testing.assert_array_equal(solve(problem, "obs[exact_below=1,pool=14,chunks=1]").pruned, mask)


def test_finer_elimination_is_better_on_a_correlated_problem() -> None:
    rng = np.random.default_rng(11)
    mixing = rng.normal(size=(200, 200)) * 0.3 + np.eye(200)
    block = QuadraticBlock(rng.normal(size=200), (rng.normal(size=(60, 200)) @ mixing).astype(np.float32), 1e-2)
    problem = SelectionProblem([block], 120, "joint")
    coarse = solve(problem, "obs[exact_below=1,pool=0,chunks=1]").objective
    fine = solve(problem, "obs[exact_below=1,pool=0,chunks=20]").objective
    exact = solve(problem, "obs").objective
    assert max(exact, fine) < 0.8 * coarse
    assert solve(problem, "joint_ls").objective < exact


def test_frozen_zeros_stay_out_and_free_ones_may_come_back() -> None:
    block = random_block(12, 20, 10, gradient=True)
    weights = block.weights.clone()
    weights[::4] = 0.0
    problem = SelectionProblem([QuadraticBlock(weights, block.factor, 0.1, block.gradient)], 9, "joint")
    frozen = solve(problem, "obs[frozen_zeros=true]")
    assert frozen.pruned[::4].all()
    free = solve(problem, "obs")
    assert not free.pruned[::4].all()
    few = solve(problem.with_n_prune(3), "obs[frozen_zeros=true]")
    assert few.n_pruned == 3
    assert not few.pruned[weights.numpy() != 0].any()


@pytest.mark.parametrize("spec", SPECS)
def test_no_damping_with_few_rows_is_repaired_and_reported(spec: str) -> None:
    problem = SelectionProblem([random_block(13, 20, 6, damping=0.0)], 12, "joint")
    solution = solve(problem, spec)
    assert solution.n_pruned == 12
    assert any("damping 0" in repair for repair in solution.repairs)


def test_joint_ls_starts_from_whatever_solver_it_is_told() -> None:
    problem = random_problem(14, (20,), 12, "joint")
    selection_start = solve(problem, "joint_ls[start=magnitude,iterations=0]")
    nested = solve(problem, "joint_ls[start=obs[chunks=2,pool=0],iterations=0]")
    assert selection_start.n_pruned == nested.n_pruned == 12
    with pytest.raises(CapabilityError, match="start"):
        solve(problem, "obs", start=selection_start.pruned)


def test_options_out_of_range_are_refused() -> None:
    problem = random_problem(15, (6,), 3, "joint")
    for spec in ("obs[chunks=0]", "iht[metric=nonsense]", "admm[penalty=0]", "joint_ls[width=0]"):
        with pytest.raises(OptionError):
            solve(problem, spec)


def test_a_plan_spends_the_rounds_it_was_given() -> None:
    problem = random_problem(16, (300,), 200, "joint")
    result = eliminate(problem, EliminationPlan(chunks=5, exact_below=10, pool=0))
    assert result.rounds == 5
    assert int(result.pruned.sum()) == 200
    assert result.reason is Reason.COMPLETED


def test_an_incomplete_scan_does_not_claim_a_local_optimum() -> None:
    problem = random_problem(17, (600,), 300, "joint")
    start = solve(problem, "magnitude").pruned
    result = pools.pool_search(problem, start, width=2, rounds=1, min_gain=1e-9, most_pairs=1.0, deadline=Deadline())
    assert not result.complete
    assert result.reason is Reason.ITERATION_LIMIT
    assert result.value == pytest.approx(problem.joint_value(result.pruned), rel=1e-6)
