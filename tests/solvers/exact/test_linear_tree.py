"""Budgets as linear rows over items: exact backends against every mask, moves against the objective itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import Bounded, Cardinality, Groups, Knapsack, Partitioned, SelectionProblem, Status
from solvers.budget import Budget
from solvers.exact.joint_square import prepare
from solvers.exact.linear_items import ItemObjective, SelectionItems
from solvers.exact.linear_roots import item_form, joint_items
from solvers.testing import random_problem

KINDS = ("knapsack", "two costs", "groups", "costs of groups", "floors", "floors and costs")


def drawn_budget(kind: str, n: int, rng: np.random.Generator) -> Budget:
    """A random budget of a kind over n ≥ 2 weights, tight or not."""
    items = int(rng.integers(1, n + 1))
    labels = rng.permutation(np.concatenate([np.arange(items), rng.integers(0, items, n - items)]))
    if kind == "groups":
        return Groups(labels, int(rng.integers(0, items + 1)))
    cut = int(rng.integers(1, n))
    if kind == "floors":
        k, sizes = int(rng.integers(0, n + 1)), np.array([cut, n - cut])
        least = int(rng.integers(0, min(cut, n - k) + 1))
        most = int(rng.integers(max(least, cut - k), cut + 1))
        return Bounded(k, sizes, [least, 0], [most, n - cut])
    held = items if kind == "costs of groups" else n
    shape = (2 if kind == "two costs" else 1, held)
    costs = rng.integers(0, 6, shape).astype(float) if rng.random() < 0.5 else rng.exponential(size=shape)
    limits = costs.sum(1) * rng.random()
    if kind == "floors and costs":
        floors = np.array([int(rng.integers(0, cut + 1)), 0])
        least_cost = float(np.sort(costs[0, :cut])[: floors[0]].sum())
        return Knapsack(costs, np.maximum(limits, least_cost), sizes=[cut, n - cut], min_kept=floors)
    return Knapsack(costs, limits, labels if kind == "costs of groups" else None)


def assert_agrees(problem: SelectionProblem, backend: str, seconds: float = 30.0) -> bool:
    """Whether it was proven; the objective and the bound are those of brute force whether or not."""
    reference = solvers.solve(problem, "brute_force", with_refit=False)
    found = solvers.solve(problem, backend, time_limit=seconds, with_refit=False)
    assert found.objective <= reference.objective + 1e-6 * abs(reference.objective) + 1e-12 * problem.scale
    assert found.bound <= reference.objective + 1e-9 * abs(reference.objective) + 1e-13 * problem.scale
    return found.status is Status.OPTIMAL


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), objective=st.sampled_from(["selection", "joint"]))
def test_the_tree_finds_the_best_of_all_masks(seed: int, kind: str, objective: str) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, objective, n=int(rng.integers(2, 10)))
    assert_agrees(problem.with_budget(drawn_budget(kind, problem.n, rng)), "branch_bound")


@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_proves_what_brute_force_cannot_reach(kind: str, objective: str) -> None:
    rng = np.random.default_rng(len(kind))
    problem = random_problem(3, objective, n=26, kinds=("plain",), linear=objective == "selection")
    limited = problem.with_budget(drawn_budget(kind, 26, rng))
    found = solvers.solve(limited, "branch_bound", time_limit=60.0)
    assert found.status is Status.OPTIMAL and not limited.budget.violation(found.pruned)
    start = solvers.solve(limited, "branch_bound", start=found.pruned)
    assert start.objective == pytest.approx(found.objective, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["ortools_miqp", "ortools_cpsat", "cvxpy_miqp"])
def test_backends_take_every_budget(backend: str, kind: str) -> None:
    about = solvers.describe(backend)
    if about.missing:
        pytest.skip(f"{backend} needs {about.missing}")
    for objective in ("selection", "joint")[: 1 + (backend != "ortools_cpsat")]:
        for seed in range(2):
            problem = random_problem(seed, objective, n=7, kinds=("plain",), linear=False)
            limited = problem.with_budget(drawn_budget(kind, 7, np.random.default_rng(seed)))
            assert assert_agrees(limited, backend), (objective, seed)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from([*KINDS, "number", "partition"]))
def test_rows_hold_where_the_budget_does(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 8))
    budget: Budget = (
        Cardinality(int(rng.integers(0, n + 1))) if kind == "number" else
        Partitioned((1, n - 1), (int(rng.integers(0, 2)), int(rng.integers(0, n)))) if kind == "partition" else
        drawn_budget(kind, n, rng)
    )  # fmt: skip
    rows = budget.linear(n)
    for bits in itertools.product([False, True], repeat=rows.items):
        gone = np.array(bits)
        allowed = not budget.violation(rows.widen(gone))
        assert rows.holds(gone) == allowed == (not budget.over_items.violation(gone))
        assert np.array_equal(rows.narrow(rows.widen(gone)), gone)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_moves_change_the_value_by_what_they_say(objective: str, grouped: bool) -> None:
    rng = np.random.default_rng(4)
    problem = random_problem(5, objective, n=9, kinds=("plain",), linear=True)
    arrays = problem.arrays()
    labels = rng.permutation(np.repeat([0, 1, 2, 3], [3, 2, 2, 2])) if grouped else rng.permutation(9)
    rows = Groups(labels, 1).linear(9)
    items: ItemObjective
    if objective == "selection":
        items, unit, constant = SelectionItems(*item_form(arrays, rows)), 1.0, 0.0
    else:
        square = prepare(arrays.weights, arrays.factor, arrays.damping, arrays.gradient)
        items, unit, constant = joint_items(square, rows), square.unit, square.constant
    for _ in range(10):
        gone = rng.random(rows.items) < 0.5
        value = items.value(gone)
        assert unit * value + constant == pytest.approx(problem.value(rows.widen(gone)), rel=1e-8)
        flips, swaps = items.moves(gone)
        for item in range(rows.items):
            moved = gone.copy()
            moved[item] ^= True
            assert value + flips[item] == pytest.approx(items.value(moved), rel=1e-7, abs=1e-12)
        for (a, i), (b, j) in itertools.product(enumerate(np.flatnonzero(gone)), enumerate(np.flatnonzero(~gone))):
            moved = gone.copy()
            moved[[i, j]] ^= True
            assert value + swaps[a, b] == pytest.approx(items.value(moved), rel=1e-7, abs=1e-12)


def test_groups_of_more_weights_than_the_tree_takes_are_chosen_as_groups() -> None:
    problem = random_problem(1, "selection", n=2400, kinds=("plain",), linear=False)
    labels = np.arange(2400) // 200
    for budget in (Groups(labels, 5), Knapsack(np.arange(1.0, 13.0), 40.0, labels)):
        assert solvers.solve(problem.with_budget(budget), "branch_bound", with_refit=False).status is Status.OPTIMAL
