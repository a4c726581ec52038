"""Groups that go whole: patterns, the problem over groups, solvers against every set of groups, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import CapabilityError, Groups, ProblemError, QuadraticBlock, SelectionProblem, Status, Tiles
from solvers.aggregate import aggregate
from solvers.curvature import Curvature
from solvers.curvature.unmeasured import Unmeasured
from solvers.testing import CURVATURES, random_problem, with_curvature
from tests.conftest import random_block
from tests.solvers.test_partitions import layer

SEARCHES = ("magnitude", "obd", "greedy_ls", "best_swap", "tabu", "annealing", "restarts", "portfolio", "lns", "random")


def labelled(seed: int, objective: str, kind: type[Curvature], n: int = 12, count: int = 5) -> SelectionProblem:
    drawn = with_curvature(random_problem(seed, objective, n=n, n_blocks=1 + seed % 2, kinds=("plain",)), kind)
    labels = np.random.default_rng(seed).permutation(np.arange(drawn.n) % count)
    return drawn.with_budget(Groups(labels, 2))


def least(problem: SelectionProblem) -> float:
    budget = problem.budget
    assert isinstance(budget, Groups)
    sets = itertools.combinations(range(budget.n_groups), budget.k)
    return min(problem.value(budget.widen(np.isin(np.arange(budget.n_groups), chosen))) for chosen in sets)


def test_tiles_of_layers_are_groups() -> None:
    assert Groups.tiles(2, 4, 1).labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert Groups.tiles(2, 4, 1, None, 1).labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert Groups.tiles(4, 4, 1, 2, 2).labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    two = SelectionProblem([layer(rows=2, inputs=6), layer(rows=4, inputs=6)], "channels:0.5")
    budget = two.budget
    assert isinstance(budget, Groups) and budget.n_groups == 6 and budget.k == 3 and two.n_prune == 18
    assert two.with_budget("columns:0.5").budget.k == 6  # type: ignore[attr-defined]
    assert two.with_budget("2x3:0.5").budget.sizes.tolist() == [6] * 6  # type: ignore[attr-defined]
    flat = SelectionProblem(random_block(0, 12, 5), Tiles(0.5, inputs=4))
    assert flat.budget.sizes.tolist() == [4, 4, 4]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Groups([0, 2], 1), "group 1 of 3 has no weight"),
        (lambda: Groups([0.0, 1.0], 1), "integers"),
        (lambda: Groups([0, -1], 1), "integers"),
        (lambda: Groups([0, 1], 3), "3 groups are to go, but there are 2"),
        (lambda: Groups([0, 1], True), "number of groups"),
        (lambda: Groups.of([[0, 1], [1, 2]], 1, 3), "must not overlap: weight 1 of group 1 is also group 0"),
        (lambda: Groups.of([[0, 1, 1]], 1, 2), "overlap"),
        (lambda: Groups.of([[0, 1]], 1, 3), "weight 2 is in no group"),
        (lambda: Groups.of([[0, 7]], 1, 3), r"numbers of weights in \[0, 3\)"),
        (lambda: Groups.tiles(6, 6, 1, 4, 4), "2 × 2 would"),
        (lambda: Tiles(float("nan")), "share"),
        (lambda: SelectionProblem(random_block(0, 4, 3), Groups([0, 1, 1], 1)), "hold 3 weights, but there are 4"),
        (lambda: SelectionProblem(random_block(0, 4, 3), Tiles(0.5, inputs=3)), "rows of 3 do not divide"),
        (lambda: SelectionProblem(random_block(0, 4, 3), "channels:2"), "share"),
    ],
)
def test_bad_groups_are_refused(make: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        make()  # type: ignore[operator]


def test_masks_that_cut_groups_are_refused() -> None:
    budget = Groups([0, 0, 1, 2], 1)
    assert budget.n_prune is None and not budget.violation(np.array([True, True, False, False]))
    assert "2 weights of group 0" in budget.violation(np.array([True, False, False, False]))
    assert "removes 2 groups" in budget.violation(np.array([False, False, True, True]))
    problem = SelectionProblem(random_block(0, 4, 3), budget)
    assert "Groups" in repr(problem)
    with pytest.raises(CapabilityError, match="does not settle"):
        _ = problem.n_prune
    everything = solvers.solve(problem.with_budget(Groups([0, 0, 1, 2], 3)), "magnitude")
    assert everything.pruned.all() and everything.status is Status.OPTIMAL


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(CURVATURES), count=st.integers(2, 7))
def test_the_problem_over_groups_has_the_same_objective(seed: int, kind: type[Curvature], count: int) -> None:
    problem = labelled(seed, "selection", kind, count=count)
    whole = aggregate(problem)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        gone = rng.random(whole.problem.n) < 0.5
        value, expected = whole.problem.selection_value(gone), problem.selection_value(whole.widen(gone))
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12 * problem.scale)
        assert np.array_equal(whole.narrow(whole.widen(gone)), gone)


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_selection_solvers_run_on_groups_and_exact_ones_prove(kind: type[Curvature], seed: int) -> None:
    problem = labelled(seed, "selection", kind)
    best = least(problem)
    for name in ("brute_force", "branch_bound", "ortools_miqp", "ortools_cpsat"):
        solution = solvers.solve(problem, name)
        assert solution.objective == pytest.approx(best, rel=1e-6) and solution.status is Status.OPTIMAL, name
        assert solution.bound <= best + 1e-9 * abs(best), name
    for name in SEARCHES:
        assert solvers.solve(problem, name).objective >= best - 1e-9 * abs(best), name
    assert solvers.solve(problem, "best_swap").objective == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("kind", CURVATURES)
def test_elimination_of_groups_refits_what_stays(kind: type[Curvature]) -> None:
    for seed in range(4):
        problem = labelled(seed, "joint", kind)
        solution = solvers.solve(problem, "obs")
        assert solution.objective <= least(problem) + 0.5 * abs(least(problem))
        one = problem.with_budget(Groups(problem.budget.labels, 1))  # type: ignore[attr-defined]
        assert solvers.solve(one, "obs").objective == pytest.approx(least(one), rel=1e-8), "one at a time is exact"
        assert solvers.solve(problem, "brute_force").objective == pytest.approx(least(problem), rel=1e-9)


def test_input_channels_of_a_layer_share_one_matrix() -> None:
    block = layer(rows=5, inputs=8)
    problem = SelectionProblem(block, "columns:0.5", "joint")
    dense = solvers.curvature.Dense(block.curvature.dense())
    twin = SelectionProblem(QuadraticBlock(block.weights, curvature=dense), problem.budget, "joint")
    assert np.array_equal(solvers.solve(problem, "obs").pruned, solvers.solve(twin, "obs").pruned)


def test_magnitude_ranks_groups_by_their_norm_without_a_curvature() -> None:
    weights = torch.tensor([3.0, 0.1, 1.0, 1.0, 2.0, 0.0])
    problem = SelectionProblem(QuadraticBlock(weights, curvature=Unmeasured(6)), Groups([0, 0, 1, 1, 2, 2], 1), "joint")
    assert solvers.solve(problem, "magnitude").pruned.tolist() == [False, False, True, True, False, False]


def test_starts_and_calibration_losses_speak_of_weights() -> None:
    problem = labelled(3, "selection", CURVATURES[0])
    best = solvers.solve(problem, "brute_force").pruned
    seen: list[str] = []

    def loss(pruned: np.ndarray) -> float:  # type: ignore[type-arg]
        seen.append(problem.budget.violation(pruned))
        return 1.0

    assert np.array_equal(solvers.solve(problem, "best_swap", start=best).pruned, best)
    solvers.solve(problem, "rmp", calibration_loss=loss)
    assert seen and not any(seen)


def test_what_cannot_take_groups_names_what_can() -> None:
    for name in ("sweep", "best_swap"):
        with pytest.raises(
            CapabilityError, match=r"these do: admm, branch_bound, brute_force, .*\bjoint_ls\b.*\bobs\b"
        ):
            solvers.solve(labelled(0, "joint", CURVATURES[0]), name)
    notes = solvers.solve(labelled(0, "joint", CURVATURES[0]), "obd").repairs
    assert any("chosen by the selection objective" in note for note in notes)
