"""best_swap, tabu and annealing against brute force, and the tiled descent against the dense one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import QuadraticBlock, Reason, SelectionProblem
from solvers.local_search import descent, swap_search, tabu
from solvers.local_search.descent import descend
from solvers.local_search.state import SwapState
from solvers.local_search.working_set import WorkingSet
from solvers.solver import Deadline
from tests.conftest import random_problem
from tests.solvers.test_greedy_ls import random_mask

SEARCHES = ["best_swap", "tabu[iterations=300]", "annealing[sweeps=50]"]


def best_neighbour(problem: SelectionProblem, pruned: np.ndarray) -> float:
    """The lowest objective one swap away, one evaluation at a time."""
    values = []
    for i in np.flatnonzero(pruned):
        for j in np.flatnonzero(~pruned):
            mask = pruned.copy()
            mask[i], mask[j] = False, True
            values.append(problem.value(mask))
    return min(values)


@given(st.integers(0, 10_000), st.sampled_from([(14,), (6, 1, 9)]), st.booleans(), st.sampled_from(SEARCHES))
@settings(max_examples=40, deadline=None)
def test_no_single_swap_improves_the_result(seed: int, sizes: tuple[int, ...], gradient: bool, spec: str) -> None:
    n_prune = int(np.random.default_rng(seed).integers(1, sum(sizes)))
    problem = random_problem(seed, sizes, n_prune, gradient=gradient)
    solution = solvers.solve(problem, spec, seed=seed)
    assert solution.n_pruned == n_prune
    assert best_neighbour(problem, solution.pruned) >= solution.objective - 1e-10 * problem.scale
    assert solution.trace[-1].objective == pytest.approx(solution.objective, rel=1e-9, abs=1e-10 * problem.scale)


@pytest.mark.parametrize("gradient", [False, True])
def test_best_swap_takes_the_steepest_path(gradient: bool) -> None:
    problem = random_problem(5, (13, 7), 12, gradient=gradient)
    mask = random_mask(problem, 2)
    current = mask.copy()
    while True:
        options = [
            (problem.value(changed), changed)
            for i in np.flatnonzero(current)
            for j in np.flatnonzero(~current)
            for changed in [np.where(np.arange(20) == i, False, np.where(np.arange(20) == j, True, current))]
        ]
        value, changed = min(options, key=lambda pair: pair[0])
        if value >= problem.value(current) - 1e-12:
            break
        current = changed
    assert np.array_equal(solvers.solve(problem, "best_swap", start=mask).pruned, current)
    assert np.array_equal(solvers.solve(problem, "greedy_ls[rule=best]", start=mask).pruned, current)


@pytest.mark.parametrize("spec", ["tabu[iterations=2000]", "annealing[sweeps=2000]"])
def test_small_problems_are_solved(spec: str) -> None:
    for seed in range(12):
        problem = random_problem(seed, (11, 3) if seed % 2 else (14,), 3 + seed % 8, gradient=seed % 3 == 0)
        optimum = solvers.solve(problem, "brute_force").objective
        assert solvers.solve(problem, spec, seed=seed).objective == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("sizes", [(60,), (30, 45)])
def test_the_tiled_descent_of_large_problems_ends_in_a_true_local_optimum(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(descent, "DENSE_LIMIT", 10)
    monkeypatch.setattr(descent, "_TILE", 7)
    monkeypatch.setattr(descent, "_CHUNK", 11)
    monkeypatch.setattr(descent, "_CACHE_ENTRIES", 400)
    for seed in range(4):
        problem = random_problem(seed, sizes, sum(sizes) // 2, gradient=seed % 2 == 0)
        state = SwapState(problem, random_mask(problem, seed))
        swaps, settled = descend(state, 0.0, Deadline())
        assert settled and swaps > 0
        assert state.value == pytest.approx(problem.value(state.pruned), rel=1e-12)
        assert best_neighbour(problem, state.pruned) >= state.value - 1e-10 * problem.scale


@pytest.mark.parametrize("spec", ["tabu[iterations=3000]", "annealing[sweeps=20]"])
def test_large_problems_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    for module in (descent, swap_search):
        monkeypatch.setattr(module, "DENSE_LIMIT", 20)
    monkeypatch.setattr(swap_search, "WORKING_SET", 24)
    monkeypatch.setattr(tabu, "_MOVES_PER_ROUND", 500)
    problem = random_problem(1, (40, 50), 60, gradient=True)
    descended = solvers.solve(problem, "best_swap").objective
    solution = solvers.solve(problem, spec)
    assert solution.n_pruned == 60
    assert solution.objective <= descended + 1e-12
    assert solution.objective == pytest.approx(solution.trace[-1].objective, rel=1e-9)


def test_a_working_set_sees_what_is_removed_outside_it() -> None:
    problem = random_problem(3, (9, 8), 9, gradient=True)
    state = SwapState(problem, random_mask(problem, 0))
    index = np.array([0, 2, 3, 5, 9, 10, 14, 16])
    piece = WorkingSet(state, index, state.forces())
    i, j = np.flatnonzero(piece.pruned)[0], np.flatnonzero(~piece.pruned)[0]
    change = piece.forces[j] + 0.5 * piece.table[j, j] - piece.forces[i] + 0.5 * piece.table[i, i] - piece.table[i, j]
    before = problem.value(state.pruned)
    piece.pruned[i], piece.pruned[j] = False, True
    piece.commit(float(change))
    assert problem.value(state.pruned) - before == pytest.approx(change, rel=1e-9)
    assert state.value == pytest.approx(problem.value(state.pruned), rel=1e-12)
    images = state.images.copy()
    state.refresh()
    assert state.images == pytest.approx(images, abs=1e-12)


@pytest.mark.parametrize("spec", ["tabu", "annealing", "best_swap"])
@pytest.mark.parametrize("n_prune", [1, 39])
def test_extreme_budgets_zero_weights_and_duplicate_columns(spec: str, n_prune: int) -> None:
    rng = np.random.default_rng(0)
    factor = np.repeat(rng.normal(size=(3, 10)), 4, axis=1)
    weights = rng.normal(size=40) * (rng.random(40) < 0.5)
    problem = SelectionProblem(QuadraticBlock(weights, factor), n_prune)
    solution = solvers.solve(problem, spec)
    assert best_neighbour(problem, solution.pruned) >= solution.objective - 1e-10 * problem.scale
    nothing = SelectionProblem(QuadraticBlock(np.zeros(6), factor[:, :6]), 3)
    assert solvers.solve(nothing, spec).objective == 0.0


@pytest.mark.parametrize("spec", SEARCHES)
def test_seeds_repeat_and_limits_are_kept(spec: str) -> None:
    problem = random_problem(9, (80,), 60)
    runs = [solvers.solve(problem, spec, seed=7).pruned for _ in range(2)]
    assert np.array_equal(*runs)
    hurried = solvers.solve(problem, spec, time_limit=1e-9)
    assert hurried.n_pruned == 60
    assert hurried.reason in (Reason.TIME_LIMIT, Reason.COMPLETED)


def test_stored_optima_are_approached(shared) -> None:
    import json

    records = json.loads((shared / "blocks" / "optima.json").read_text())
    ratios = []
    for record in records:
        if record["objective"] == "selection" and not record["gradient"] and record["n"] <= 144:
            problem = solvers.load_problem(
                shared / "blocks" / f"{record['block']}.npz", n_prune=record["n_prune"], use_gradient=False
            )
            found = solvers.solve(problem, "tabu[iterations=10000]", with_refit=False).objective
            if record["proved"]:
                assert found >= record["best"] * (1 - 1e-9)
            ratios.append(found / record["best"])
    assert np.mean(ratios) < 1.02
