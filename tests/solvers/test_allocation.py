"""Splits of one budget over several blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import QuadraticBlock, SelectionProblem, UnknownNameError, solve
from solvers.allocation import ALLOCATIONS, CostCurve, allocate, convex_slopes, split_costs, split_curves
from solvers.errors import ProblemError
from solvers.joint.elimination import EliminationPlan, elimination_costs
from tests.conftest import random_block, random_problem


@pytest.mark.parametrize("rule", sorted(ALLOCATIONS))
@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_counts_sum_to_the_budget_and_fit_the_blocks(rule: str, objective: str) -> None:
    for n_prune in (1, 7, 16, 25):
        problem = random_problem(1, (3, 14, 9), n_prune, objective, gradient=True)
        counts = allocate(problem, rule)
        assert counts.sum() == n_prune
        assert (counts >= 0).all()
        assert (counts <= [3, 14, 9]).all()


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="marginal"):
        allocate(random_problem(1, (3, 4), 2), "marginale")


def test_uniform_splits_by_size() -> None:
    np.testing.assert_array_equal(allocate(random_problem(2, (10, 20, 30), 30), "uniform"), [5, 10, 15])


def test_slopes_are_those_of_the_lower_hull() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        increments = rng.exponential(size=9)
        curve = np.concatenate([[0.0], np.cumsum(increments)])
        slopes = convex_slopes(increments)
        hull = np.concatenate([[0.0], np.cumsum(slopes)])
        # The lower hull at k is the least value of any chord over k.
        for k in range(10):
            chords = [
                curve[a] + (curve[b] - curve[a]) * (k - a) / max(b - a, 1) for a in range(k + 1) for b in range(k, 10)
            ]
            assert hull[k] == pytest.approx(min(chords), abs=1e-12)
    np.testing.assert_allclose(convex_slopes(np.array([1.0, 2.0, 3.0])), [1.0, 2.0, 3.0])
    assert convex_slopes(np.zeros(0)).size == 0


@pytest.mark.parametrize("plan", [EliminationPlan(), EliminationPlan(chunks=5, exact_below=4, pool=0)])
def test_elimination_costs_add_up_to_the_objective(plan: EliminationPlan) -> None:
    problem = SelectionProblem([random_block(3, 30, 12, gradient=True)], 25, "joint")
    costs = elimination_costs(problem, plan)
    assert costs.shape == (25,)
    nothing = problem.joint_value(np.zeros(30, dtype=bool))
    exact = np.flatnonzero(np.ones(25))
    if plan.pool:
        for k in exact[::6]:
            reached = solve(problem.with_n_prune(int(k) + 1), "obs").objective
            assert costs[: k + 1].sum() == pytest.approx(reached - nothing, rel=1e-8)
    else:
        reached = solve(problem, "obs[chunks=5,exact_below=4,pool=0]").objective
        assert costs.sum() == pytest.approx(reached - nothing, rel=1e-8)


def test_the_marginal_split_is_the_optimum_for_convex_curves() -> None:
    # Uncorrelated weights: cost curves are exact, convex sums of single costs, for both objectives.
    rng = np.random.default_rng(4)
    blocks = [
        QuadraticBlock(rng.normal(size=n) * scale, np.diag(rng.uniform(0.5, 2.0, n)), 0.1, name=str(n))
        for n, scale in ((4, 1.0), (6, 0.3), (5, 2.0))
    ]
    for objective, n_prune in itertools.product(("selection", "joint"), (3, 8, 12)):
        problem = SelectionProblem(blocks, n_prune, objective)
        best = np.sort(0.5 * problem.diagonal * problem.weights**2)[:n_prune].sum()
        assert solve(problem, "obd" if objective == "selection" else "obs", allocation="marginal").objective == (
            pytest.approx(best, rel=1e-9)
        )


def test_the_marginal_split_beats_a_uniform_one_on_unequal_blocks() -> None:
    blocks = [random_block(5 + i, 40, 20, scale=scale) for i, scale in enumerate((0.1, 1.0, 5.0))]
    problem = SelectionProblem(blocks, 72, "joint")
    marginal = solve(problem, "obs", allocation="marginal").objective
    assert marginal < 0.8 * solve(problem, "obs", allocation="uniform").objective
    assert marginal <= 1.2 * solve(problem, "obs").objective


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_curves_are_split_at_the_least_cost_of_their_hulls(increments: list[list[int]], draw: st.DataObject) -> None:
    """Brute force over all splits, on curves that are convex."""
    curves = [np.concatenate([[0.0], np.cumsum(np.sort(row))]) for row in increments]
    n_prune = draw.draw(st.integers(0, sum(len(row) for row in increments)))
    counts = split_curves([CostCurve(np.arange(len(c)), c) for c in curves], n_prune)
    assert counts.sum() == n_prune
    every = itertools.product(*(range(len(c)) for c in curves))
    best = min(sum(c[k] for c, k in zip(curves, ks, strict=True)) for ks in every if sum(ks) == n_prune)
    assert sum(c[k] for c, k in zip(curves, counts.tolist(), strict=True)) == best


def test_between_the_points_of_a_curve_its_hull_decides() -> None:
    # The hull of the first rises by 1 a weight from 0 to 10; the second by 0.5 to 4, then by 2.
    bump = CostCurve(np.array([0, 5, 10]), np.array([0.0, 9.0, 10.0]))
    bend = CostCurve(np.array([0, 4, 8]), np.array([0.0, 2.0, 10.0]))
    np.testing.assert_allclose(bump.slopes, [1.0, 1.0])
    for n_prune, expected in ((3, [0, 3]), (4, [0, 4]), (11, [7, 4]), (14, [10, 4]), (18, [10, 8])):
        assert split_curves([bump, bend], n_prune).tolist() == expected


@pytest.mark.parametrize(
    ("removed", "costs"),
    [([0, 2], [0.0]), ([1, 2], [0.0, 1.0]), ([0, 0], [0.0, 1.0]), ([0, 2], [0.0, np.inf]), ([0], [0])],
)
def test_curves_that_are_none_are_refused(removed: list[int], costs: list[float]) -> None:
    with pytest.raises(ProblemError, match="cost curve"):
        CostCurve(np.array(removed), np.array(costs))


def test_more_than_there_is_cannot_be_split() -> None:
    with pytest.raises(ProblemError, match="n_prune"):
        split_curves([CostCurve(np.array([0, 2]), np.array([0.0, 1.0]))], 3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_costs_are_shared_out_at_the_least_price_on_the_hulls(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    sizes, each = rng.integers(1, 7, 3), rng.integers(1, 9, 3).astype(float)
    curves = [CostCurve(np.arange(n + 1), np.concatenate([[0.0], np.cumsum(np.sort(rng.random(n)))])) for n in sizes]
    most = np.array([rng.integers(0, n + 1) for n in sizes])
    demand = share * float(each @ most)
    counts, value, bound = split_costs(curves, each, demand, most)
    assert (counts <= most).all() and each @ counts >= demand * (1 - 1e-12)
    costs = {
        at: sum(curve.costs[k] for curve, k in zip(curves, at, strict=True))
        for at in itertools.product(*(range(m + 1) for m in most))
        if each @ at >= demand
    }
    assert value == pytest.approx(costs[tuple(counts.tolist())])
    assert bound <= min(costs.values()) + 1e-12 and value <= bound + 1.0


def test_what_costs_too_much_to_stay_is_refused() -> None:
    curve = CostCurve(np.array([0, 2]), np.array([0.0, 1.0]))
    with pytest.raises(ProblemError, match="what may go costs 1, less than the 3"):
        split_costs([curve], np.array([1.0]), 3.0, np.array([1]))
    counts, value, bound = split_costs([curve], np.array([0.0]), 0.0)
    assert counts.tolist() == [0] and value == bound == 0.0
