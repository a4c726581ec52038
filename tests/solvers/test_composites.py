"""Solvers around solvers: sub-problems, components, bounds passed on, options refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import CapabilityError, OptionError, QuadraticBlock, SelectionProblem, Status, UnknownNameError
from solvers.composites.by_component import interaction_components
from solvers.composites.subproblem import subproblem
from solvers.registry import split_outside_brackets
from tests.conftest import random_block, random_problem
from tests.solvers.test_greedy_ls import random_mask

OBJECTIVES = ["selection", "joint"]


def sparse_problem(seed: int, objective: str, gradient: bool) -> SelectionProblem:
    """Two blocks whose columns fall into several components, with zero weights and a zero column."""
    rng = np.random.default_rng(seed)
    blocks = []
    for n, rows in ((6, 5), (7, 9)):
        factor = rng.normal(size=(rows, n)) * (rng.random((rows, n)) < 0.2)
        weights = rng.normal(size=n) * (rng.random(n) < 0.9)
        blocks.append(QuadraticBlock(weights, factor, 0.05, rng.normal(size=n) if gradient else None))
    return SelectionProblem(blocks, int(rng.integers(1, 13)), objective)


@given(st.integers(0, 10_000), st.sampled_from(OBJECTIVES), st.booleans(), st.sampled_from([0.0, 1e-3, 0.3]))
@settings(max_examples=60, deadline=None)
def test_the_subproblem_has_the_outer_objective(seed: int, objective: str, gradient: bool, damping: float) -> None:
    rng = np.random.default_rng(seed)
    # Without damping the rows must span each block, or the joint objective with a gradient is unbounded.
    blocks = [random_block(seed + i, n, n + 3, damping, gradient) for i, n in enumerate((9, 5))]
    problem = SelectionProblem(blocks, int(rng.integers(1, 14)), objective)
    pruned = random_mask(problem, seed)
    part = subproblem(problem, pruned, rng.permutation(14)[:6])
    assert part is not None
    for _ in range(4):
        inner = np.zeros(6, dtype=bool)
        inner[rng.permutation(6)[: part.problem.n_prune]] = True
        outer = problem.value(part.widen(pruned, inner))
        assert part.constant + part.problem.value(inner) == pytest.approx(outer, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_subproblem_of_a_rank_deficient_block(objective: str) -> None:
    problem = SelectionProblem([random_block(1, 12, 4, 0.0), random_block(2, 3, 1, 0.0)], 7, objective)
    pruned = random_mask(problem, 3)
    part = subproblem(problem, pruned, np.array([0, 1, 5, 8, 12, 13]))
    assert part is not None
    outer = problem.value(pruned)
    assert part.constant + part.problem.value(pruned[part.free]) == pytest.approx(outer, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("gradient", [False, True])
def test_lns_improves_and_proves_what_it_frees_whole(objective: str, gradient: bool) -> None:
    for seed in range(4):
        problem = random_problem(seed, (8, 7), 8, objective, gradient)
        exact = solvers.solve(problem, "brute_force")
        whole = solvers.solve(problem, "lns[backend=brute_force,size=15,start=random]", seed=seed)
        assert whole.status is Status.OPTIMAL
        assert whole.objective == pytest.approx(exact.objective, rel=1e-9)
        parts = solvers.solve(problem, "lns[backend=brute_force,size=9,start=random]", seed=seed)
        assert parts.bound == -np.inf
        first = solvers.solve(problem, "random", seed=seed).objective
        assert exact.objective - 1e-9 <= parts.objective <= first
        path = [point.objective for point in parts.trace]
        assert path == sorted(path, reverse=True)
        assert parts.objective == pytest.approx(exact.objective, rel=0.05, abs=0.05)


def test_components_are_those_of_the_interactions() -> None:
    for seed in range(10):
        problem = sparse_problem(seed, "joint", False)
        hessian = problem.arrays().hessian
        label = np.arange(13)
        for _ in range(13):
            for i, j in zip(*np.nonzero(hessian), strict=True):
                label[[i, j]] = min(label[i], label[j])
        expected = [np.flatnonzero(label == c) for c in np.unique(label)]
        found = interaction_components(problem)
        assert len(found) == len(expected)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@given(st.integers(0, 10_000), st.sampled_from(OBJECTIVES), st.booleans())
@settings(max_examples=30, deadline=None)
def test_by_component_shares_the_budget_exactly(seed: int, objective: str, gradient: bool) -> None:
    problem = sparse_problem(seed, objective, gradient)
    solution = solvers.solve(problem, "by_component[solver=brute_force]")
    exact = solvers.solve(problem, "brute_force")
    assert solution.objective == pytest.approx(exact.objective, rel=1e-9, abs=1e-12)
    assert solution.status is Status.OPTIMAL


def test_by_component_claims_no_bound_from_a_heuristic() -> None:
    problem = sparse_problem(1, "selection", True)
    while len(interaction_components(problem)) in (1, 13):
        problem = sparse_problem(problem.n_prune + 7, "selection", True)
    solution = solvers.solve(problem, "by_component[solver=best_swap]")
    assert solution.n_pruned == problem.n_prune
    assert solution.objective >= solvers.solve(problem, "brute_force").objective - 1e-12


def test_ten_thousand_independent_weights_need_no_solver() -> None:
    weights = np.random.default_rng(0).normal(size=10_000)
    blocks = [QuadraticBlock(part, np.zeros((1, 2500)), 0.5) for part in np.split(weights, 4)]
    solution = solvers.solve(SelectionProblem(blocks, 9000), "by_component[solver=brute_force]")
    assert solution.status is Status.OPTIMAL
    assert np.array_equal(solution.pruned, np.abs(weights) <= np.sort(np.abs(weights))[8999])
    assert solution.statistics["runs"] == 0


def test_restarts_keep_the_best_seed() -> None:
    problem = random_problem(4, (40,), 25)
    each = [solvers.solve(problem, "best_swap[start=random]", seed=3 + s).objective for s in range(5)]
    solution = solvers.solve(problem, "restarts[solver=best_swap[start=random],runs=5]", seed=3)
    assert solution.objective == pytest.approx(min(each), rel=1e-12)
    assert len(set(each)) > 1
    assert solution.bound == -np.inf


def test_the_portfolio_keeps_the_best_member_and_its_bound() -> None:
    problem = random_problem(4, (12,), 7, gradient=True)
    members = ["magnitude", "obd", "rmp[draws=5]"]
    solution = solvers.solve(problem, "portfolio[solvers=magnitude+obd+rmp[draws=5]]")
    assert solution.objective == min(solvers.solve(problem, m).objective for m in members)
    proven = solvers.solve(problem, "portfolio[solvers=magnitude+brute_force]")
    assert proven.status is Status.OPTIMAL
    loss = {"obd": solvers.solve(problem, "obd").pruned}
    by_loss = solvers.solve(
        problem,
        "portfolio[solvers=magnitude+obd+random]",
        calibration_loss=lambda mask: float((mask != loss["obd"]).sum()),
    )
    assert np.array_equal(by_loss.pruned, loss["obd"])


def test_the_portfolio_hands_its_best_mask_on() -> None:
    problem = random_problem(4, (30,), 20)
    start = solvers.solve(problem, "tabu").pruned
    solution = solvers.solve(problem, "portfolio[solvers=random+best_swap]", start=start)
    assert solution.objective <= problem.value(start)


def test_plus_signs_inside_brackets_do_not_split() -> None:
    assert list(split_outside_brackets("obd + greedy_ls[min_gain=1e+2]+restarts[solver=rmp[draws=2]]", "+")) == [
        "obd",
        "greedy_ls[min_gain=1e+2]",
        "restarts[solver=rmp[draws=2]]",
    ]


def test_what_the_inner_solver_cannot_do_is_refused() -> None:
    problem = random_problem(0, (6,), 3, "joint")
    with pytest.raises(CapabilityError, match=r"restarts.*joint"):
        solvers.solve(problem, "restarts[solver=best_swap]")
    with pytest.raises(UnknownNameError, match="magnitude"):
        solvers.solve(problem, "portfolio[solvers=magnitud]")
    with pytest.raises(OptionError, match="portfolio"):
        solvers.solve(problem, "portfolio[solvers=obd+]")
    with pytest.raises(OptionError, match="again"):
        solvers.solve(problem, "lns[backend=lns]")


@pytest.mark.parametrize(
    "spec",
    ["restarts[runs=3]", "portfolio[solvers=obd+tabu]", "lns[backend=brute_force,size=8]"],
)
def test_seeds_repeat_and_a_spent_limit_still_gives_a_mask(spec: str) -> None:
    problem = random_problem(2, (25,), 15)
    assert np.array_equal(solvers.solve(problem, spec, seed=5).pruned, solvers.solve(problem, spec, seed=5).pruned)
    assert solvers.solve(problem, spec, time_limit=1e-9).n_pruned == 15
