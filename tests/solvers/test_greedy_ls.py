"""The paper's local search against a slow, dense, literal reading of its rule."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import OptionError, QuadraticBlock, Reason, SelectionProblem
from solvers.local_search.greedy_ls import paper_pass
from solvers.local_search.state import SwapState
from solvers.solver import Deadline
from tests.conftest import random_problem


def random_mask(problem: SelectionProblem, seed: int) -> np.ndarray:
    mask = np.zeros(problem.n, dtype=bool)
    mask[np.random.default_rng(seed).permutation(problem.n)[: problem.n_prune]] = True
    return mask


def literal_pass(
    problem: SelectionProblem, pruned: np.ndarray, min_gain: float, window: int, failures_allowed: int
) -> np.ndarray:
    """One pass of the published rule, every gain taken from the objective itself."""

    def put_back(mask: np.ndarray, i: int, j: int | None = None) -> np.ndarray:
        changed = mask.copy()
        changed[i] = False
        if j is not None:
            changed[j] = True
        return changed

    value = problem.selection_value
    start = value(pruned)
    inside = sorted(np.flatnonzero(pruned), key=lambda i: -(start - value(put_back(pruned, i))))
    first = inside[0]
    outside = sorted(np.flatnonzero(~pruned), key=lambda j: value(put_back(pruned, first, j)))
    current, used, failures = pruned.copy(), set(), 0
    for position, i in enumerate(inside):
        for j in range(max(0, position - window), min(position + window, len(outside))):
            swapped = put_back(current, i, outside[j])
            if j not in used and value(current) - value(swapped) > min_gain:
                current = swapped
                used.add(j)
                break
        else:
            failures += 1
            if position == 0 or failures >= failures_allowed:
                break
    return current


@pytest.mark.parametrize("sizes", [(40,), (25, 4, 30)])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("window,failures", [(10, 20), (2, 3), (1, 1), (50, 100)])
def test_passes_are_the_papers(sizes: tuple[int, ...], gradient: bool, window: int, failures: int) -> None:
    problem = random_problem(11, sizes, sum(sizes) * 2 // 3, gradient=gradient)
    state = SwapState(problem, random_mask(problem, 5))
    min_gain = 1e-3
    for _ in range(4):
        expected = literal_pass(problem, state.pruned, min_gain, window, failures)
        paper_pass(state, min_gain, window, failures, Deadline())
        assert np.array_equal(state.pruned, expected)
        assert state.value == pytest.approx(problem.value(expected), rel=1e-10)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([(9,), (5, 7), (1, 1, 6)]))
@settings(max_examples=40, deadline=None)
def test_a_swap_changes_the_objective_by_beta_minus_alpha_minus_gamma(
    seed: int, gradient: bool, sizes: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, sizes, int(rng.integers(1, sum(sizes))), gradient=gradient)
    state = SwapState(problem, random_mask(problem, seed))
    forces = state.forces()
    i, j = int(rng.choice(np.flatnonzero(state.pruned))), int(rng.choice(np.flatnonzero(~state.pruned)))
    alpha, beta = forces[i] - state.curvature[i], forces[j] + state.curvature[j]
    change = float(beta - alpha - state.interaction(i)[j])
    assert state.interaction(i)[j] == pytest.approx(state.interaction(j)[i], abs=1e-12)
    before = problem.value(state.pruned)
    columns = state.columns(np.array([i, j]))
    state.swap(i, j, columns[0], columns[1], change)
    assert problem.value(state.pruned) - before == pytest.approx(change, rel=1e-9, abs=1e-11)
    kept_up_to_date = state.images.copy()
    state.refresh()
    assert state.images == pytest.approx(kept_up_to_date, abs=1e-12)


@given(
    st.integers(0, 10_000),
    st.sampled_from([(30,), (12, 3, 20)]),
    st.booleans(),
    st.sampled_from(["rmp", "magnitude", "obd", "woodfisher", "random"]),
    st.sampled_from(["paper", "best"]),
)
@settings(max_examples=40, deadline=None)
def test_cardinality_is_exact_and_the_objective_never_rises(
    seed: int, sizes: tuple[int, ...], gradient: bool, start: str, rule: str
) -> None:
    n_prune = int(np.random.default_rng(seed).integers(1, sum(sizes)))
    problem = random_problem(seed, sizes, n_prune, gradient=gradient)
    solution = solvers.solve(problem, f"greedy_ls[start={start},rule={rule}]", seed=seed)
    assert solution.n_pruned == n_prune
    path = [point.objective for point in solution.trace]
    slack = 1e-10 * problem.scale
    assert all(later <= earlier + slack for earlier, later in pairwise(path))
    assert path[-1] == pytest.approx(solution.objective, rel=1e-9, abs=slack)


def test_permuting_the_weights_permutes_the_mask() -> None:
    problem = random_problem(3, (50,), 35, gradient=True)
    arrays = problem.arrays()
    order = np.random.default_rng(0).permutation(50)
    block = QuadraticBlock(arrays.weights[order], arrays.factor[:, order], 0.1, arrays.gradient[order])
    for spec in ("greedy_ls[start=obd]", "greedy_ls[start=magnitude]", "greedy_ls[start=woodfisher,rule=best]"):
        mask = solvers.solve(problem, spec).pruned
        assert np.array_equal(solvers.solve(SelectionProblem(block, 35), spec).pruned, mask[order])


@pytest.mark.parametrize("factor", [1e-12, 1e-4, 1e6])
def test_the_relative_gain_makes_the_search_free_of_scale(factor: float) -> None:
    arrays = random_problem(8, (60,), 40).arrays()
    masks = []
    for scale in (1.0, factor):
        block = QuadraticBlock(arrays.weights, arrays.factor * scale, 0.1 * scale**2)
        masks.append(solvers.solve(SelectionProblem(block, 40), "greedy_ls[start=magnitude]").pruned)
    assert np.array_equal(masks[0], masks[1])


def test_float32_factors_give_the_mask_of_float64() -> None:
    arrays = random_problem(9, (80,), 60).arrays()
    single = arrays.factor.astype(np.float32)
    masks = [
        solvers.solve(SelectionProblem(QuadraticBlock(arrays.weights, factor, 0.1), 60), "greedy_ls").pruned
        for factor in (single, single.astype(np.float64), np.asfortranarray(single))
    ]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


def test_the_iterate_of_lowest_calibration_loss_is_returned() -> None:
    problem = random_problem(2, (200,), 150)
    seen: list[np.ndarray] = []

    def loss(mask: np.ndarray) -> float:
        seen.append(mask)
        return abs(len(seen) - 3)  # the third mask is the best

    options = "start=magnitude,relative_gain=0,max_failures=2"
    solution = solvers.solve(problem, f"greedy_ls[{options},patience=4]", calibration_loss=loss)
    assert np.array_equal(solution.pruned, seen[2])
    assert len(seen) == 3 + 4
    assert solution.reason is Reason.COMPLETED
    assert solution.statistics["best_pass"] == 2
    plain = solvers.solve(problem, f"greedy_ls[{options}]")
    assert plain.objective < solution.objective


def test_start_mask_pass_limit_and_thresholds() -> None:
    problem = random_problem(6, (80,), 50)
    mask = random_mask(problem, 1)
    untouched = solvers.solve(problem, "greedy_ls[passes=0]", start=mask)
    assert np.array_equal(untouched.pruned, mask)
    nothing_gains = solvers.solve(problem, "greedy_ls[min_gain=1e9]", start=mask)
    assert np.array_equal(nothing_gains.pruned, mask)
    one = solvers.solve(problem, "greedy_ls[passes=1,relative_gain=0]", start=mask)
    assert one.reason is Reason.ITERATION_LIMIT
    assert one.objective < problem.value(mask)


def test_the_same_seed_gives_the_same_mask_and_time_limits_are_kept() -> None:
    problem = random_problem(6, (300, 40), 250)
    first, second = (solvers.solve(problem, "greedy_ls", seed=4) for _ in range(2))
    assert np.array_equal(first.pruned, second.pruned)
    hurried = solvers.solve(problem, "greedy_ls", time_limit=1e-9)
    assert hurried.n_pruned == 250
    assert hurried.reason is Reason.TIME_LIMIT


@pytest.mark.parametrize("option", ["window=0", "start=best", "min_gain=-1", "rule=steepest", "passes=-1"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(OptionError, match="greedy_ls"):
        solvers.make_solver(f"greedy_ls[{option}]")
