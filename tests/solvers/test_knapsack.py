"""Costs and limits: bad ones, masks against every mask, the relaxation, counts for other solvers, gaps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import CapabilityError, Cardinality, Groups, Knapsack, ProblemError, QuadraticBlock, SelectionProblem
from solvers.testing import CURVATURES, random_problem, with_curvature
from tests.conftest import random_block
from tests.solvers.test_partitions import layer


def every_mask(n: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [np.array(bits, dtype=bool) for bits in itertools.product([False, True], repeat=n)]


@pytest.mark.parametrize(
    ("costs", "limit", "labels", "message"),
    [
        ([1.0, -1.0], 1.0, None, "cost 1 is -1.0"),
        ([1.0, float("nan")], 1.0, None, "cost 1 is nan"),
        ([1.0, float("inf")], 1.0, None, "cost 1 is inf"),
        ([1.0, 2.0], -1.0, None, "zero or more"),
        ([1.0, 2.0], float("nan"), None, "zero or more"),
        ([1.0, 2.0], [1.0, 2.0], None, "with a limit for each"),
        (np.ones((3, 2)), np.ones(3), None, "one or two costs"),
        (["a"], 1.0, None, "must be numbers"),
        ([1.0, 2.0], 1.0, [0, 0], "there are 1 groups, but 2 costs"),
        ([1.0, 2.0], 1.0, [0, 2], "group 1 of 3 has no weight"),
    ],
)
def test_bad_costs_are_refused(costs: object, limit: object, labels: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        Knapsack(costs, limit, labels)  # type: ignore[arg-type]


def test_costs_must_be_those_of_the_weights_and_limits_are_said_with_the_figure() -> None:
    with pytest.raises(ProblemError, match="costs of 3 weights, but there are 4"):
        SelectionProblem(random_block(0, 4, 3), Knapsack([1.0, 1, 1], 1.0))
    budget = Knapsack([1.0, 2.0, 4.0], 3.0)
    assert not budget.violation(np.array([False, False, True]))
    assert "costs 4, where 3 is the limit" in budget.violation(np.array([True, True, False]))
    assert budget.n_prune is None and budget.classes() == (1, 1, 1)
    nothing = solvers.solve(SelectionProblem(random_block(0, 3, 3), Knapsack([1.0, 2.0, 4.0], 0.5)), "obd")
    assert nothing.pruned.all() and nothing.status is solvers.Status.OPTIMAL
    with pytest.raises(ProblemError, match="what has to stay costs more"):
        budget.cheapest_of(np.array([1.0, np.inf, np.inf]))
    assert "part of group 0" in Knapsack([1.0, 1.0], 1.0, [0, 0, 1]).violation(np.array([True, False, False]))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 9), m=st.integers(1, 2), whole=st.booleans(), share=st.floats(0.0, 1.0)
)
def test_masks_keep_the_limit_and_the_relaxation_bounds_every_one(
    seed: int, n: int, m: int, whole: bool, share: float
) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 5, (m, n)).astype(float) if whole else rng.random((m, n)) * 10.0 ** rng.integers(-6, 6)
    scores = rng.standard_normal(n) ** 3 + (seed % 3)
    budget = Knapsack(costs, costs.sum(1) * share)
    found, bound = budget.cheapest_of(scores), budget.least_sum(scores)
    assert not budget.violation(found)
    best = min(float(scores[mask].sum()) for mask in every_mask(n) if not budget.violation(mask))
    assert bound <= best + 1e-12 * np.abs(scores).sum() <= scores[found].sum() + 2e-12 * np.abs(scores).sum()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_floors_are_kept_under_the_limit(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    sizes, least = [3, 2, 4], rng.integers(0, 3, 3)
    costs = np.repeat(rng.integers(1, 9, 3).astype(float), sizes)
    floor = float(np.repeat(least, 1) @ costs[[0, 3, 5]])
    limit = floor + share * (costs.sum() - floor)
    budget, scores = Knapsack(costs, limit, sizes=sizes, min_kept=least), rng.standard_normal(9)
    found = budget.cheapest_of(scores)
    assert not budget.violation(found)
    feasible = [float(scores[mask].sum()) for mask in every_mask(9) if not budget.violation(mask)]
    assert budget.least_sum(scores) <= min(feasible) + 1e-12
    split = solvers.solve(SelectionProblem(random_block(seed, 9, 7), budget), "best_swap")
    assert not budget.violation(split.pruned)


def test_floors_above_the_limit_are_refused_with_the_figure() -> None:
    with pytest.raises(ProblemError, match="what has to stay costs 6, more than the limit 4"):
        Knapsack([1.0, 2.0, 3.0, 3.0], 4.0, sizes=[2, 2], min_kept=[2, 1])
    with pytest.raises(ProblemError, match="no floor above its size"):
        Knapsack([1.0, 2.0], 4.0, sizes=[2], min_kept=[3])
    assert "keeps 0 weights of range 1" in Knapsack([1.0, 2.0], 3.0, sizes=[1, 1], min_kept=[0, 1]).violation(
        np.array([False, True])
    )


def test_equal_costs_are_a_number_of_weights() -> None:
    scores = np.random.default_rng(0).random(50)
    for kept in (0, 1, 17, 50):
        budget = Knapsack(np.full(50, 3.0), 3.0 * kept)
        assert np.array_equal(budget.cheapest_of(scores), Cardinality(50 - kept).cheapest_of(scores))


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("kind", CURVATURES)
def test_brute_force_is_the_best_of_all_masks_and_others_come_close(objective: str, kind: type) -> None:
    for seed, labels in ((0, None), (1, None), (2, np.arange(8) // 2)):
        drawn = with_curvature(random_problem(seed, objective, n=8, kinds=("plain",), linear=False), kind)
        held = 8 if labels is None else 4
        costs = np.repeat([1.0, 3.0], held // 2)
        problem = drawn.with_budget(Knapsack(costs, 0.5 * costs.sum(), labels))
        best = min(problem.value(mask) for mask in every_mask(8) if not problem.budget.violation(mask))
        brute = solvers.solve(problem, "brute_force")
        assert brute.objective == pytest.approx(best, rel=1e-9) and brute.status is solvers.Status.OPTIMAL
        for name in ("magnitude", "obd", "best_swap" if objective == "selection" else "obs"):
            if labels is not None and name == "obs":
                continue
            solution = solvers.solve(problem, name)
            assert best * (1 - 1e-9) <= solution.objective and solution.bound <= best * (1 + 1e-9), name


def test_other_solvers_get_counts_of_weights_that_cost_alike() -> None:
    blocks = [random_block(0, 10, 7), random_block(1, 20, 7)]
    costs = np.repeat([9.0, 1.0], [10, 20])
    problem = SelectionProblem(blocks, Knapsack(costs, 0.5 * costs.sum()))
    quick, swapped = solvers.solve(problem, "obd"), solvers.solve(problem, "best_swap")
    assert swapped.objective <= quick.objective and not swapped.repairs
    counted = solvers.solve(problem, "rmp")
    assert any("counts for 2 ranges" in note for note in counted.repairs)
    assert np.array_equal(*(np.add.reduceat(s.pruned, [0, 10]) for s in (quick, counted)))
    again = solvers.solve(problem, "best_swap", start=swapped.pruned)
    assert again.objective <= swapped.objective
    for rule in ("uniform", "magnitude", "surgeon", "marginal"):
        split = solvers.solve(problem, "best_swap", allocation=rule)
        assert not problem.budget.violation(split.pruned) and split.bound == -np.inf, rule
    with pytest.raises(CapabilityError, match="does not share out costs"):
        solvers.solve(problem, "best_swap", allocation="rows")
    uneven = problem.with_budget(Knapsack(np.arange(30.0), 200.0))
    with pytest.raises(CapabilityError, match="takes costs itself"):
        solvers.solve(uneven, "rmp")
    with pytest.raises(CapabilityError, match=r"these do: .*branch_bound.*brute_force.*magnitude.*obd"):
        solvers.solve(problem.with_objective("joint"), "iht")


def test_the_lagrangian_bound_is_met_within_a_percent_where_the_objective_adds_up() -> None:
    rng = np.random.default_rng(0)
    sizes, prices = [800, 4000, 20000], [64.0, 16.0, 1.0]
    blocks = [
        QuadraticBlock(rng.standard_normal(n), curvature=solvers.Diagonal(torch.from_numpy(rng.exponential(size=n))))
        for n in sizes
    ]
    flops, count = np.repeat(prices, sizes), np.ones(sum(sizes))
    for costs in (flops, np.stack([flops, count])):
        problem = SelectionProblem(blocks, Knapsack(costs, 0.3 * np.atleast_2d(costs).sum(1)))
        assert solvers.solve(problem, "obd", with_refit=False).gap <= 1e-3
        assert solvers.solve(problem.with_objective("joint"), "obd").gap <= 1e-3
    rows = SelectionProblem(layer(rows=40, inputs=6), "channels:0.5")
    assert isinstance(rows.budget, Groups)
    channels = rows.with_budget(Knapsack(rng.integers(1, 4, 40), 40.0, rows.budget.labels))
    # Rows do not interact, so that the problem over them adds up.
    assert solvers.solve(channels, "obd").gap <= 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_of_many_weights_allows_for_the_rounding_of_running_sums(seed: int) -> None:
    # With equal costs that fill the limit the best mask is known: the smallest go.
    rng = np.random.default_rng(seed)
    n = 200_000
    scores = rng.standard_normal(n) ** 2 * 1e-7
    budget = Knapsack(np.full(n, 4.0), 4.0 * (n // 2))
    best = math.fsum(np.sort(scores)[: n // 2].tolist())
    bound = budget.least_sum(scores)
    assert best * (1 - 1e-8) <= bound <= best
