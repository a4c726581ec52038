"""Floors and ceilings of what stays in each group: against enumeration, for every solver, and what is refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import solvers
from solvers import Bounded, ProblemError, QuadraticBlock, SelectionProblem, available_solvers, describe
from solvers.arrays import Mask
from tests.conftest import random_block


@st.composite
def bounded(draw: st.DrawFn) -> Bounded:
    """A budget over a few weights that some mask keeps, its groups in any order."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(sum))
    least = [draw(st.integers(0, size)) for size in sizes]
    most = [draw(st.integers(low, size)) for low, size in zip(least, sizes, strict=True)]
    n = sum(sizes)
    kept = draw(st.integers(sum(least), sum(most)))
    order = draw(st.none() | st.permutations(range(n)).map(np.array))
    return Bounded(n - kept, sizes, least, most, order)


def masks(budget: Bounded) -> list[Mask]:
    """All masks that keep it, told by counting."""
    n = sum(budget.sizes)
    found, ends = [], np.cumsum(budget.sizes)
    place = np.arange(n) if budget.order is None else budget.order
    group = np.searchsorted(ends, place, side="right")
    for removed in combinations(range(n), budget.k):
        pruned = np.zeros(n, dtype=bool)
        pruned[list(removed)] = True
        kept = np.bincount(group[~pruned], minlength=len(ends))
        if (kept >= np.array(budget.min_kept)).all() and (kept <= np.array(budget.most)).all():
            found.append(pruned)
    return found


@given(bounded(), st.integers(0, 100))
def test_the_cheapest_mask_is_that_of_enumeration(budget: Bounded, seed: int) -> None:
    n, feasible = sum(budget.sizes), masks(budget)
    budget.check(n)
    # Few values, so that many are equal.
    scores = np.random.default_rng(seed).integers(-3, 4, n).astype(float)
    found = budget.cheapest_of(scores)
    assert not budget.violation(found)
    assert scores[found].sum() == min(scores[mask].sum() for mask in feasible)


@given(bounded(), st.integers(0, 100))
def test_a_mask_is_called_wrong_where_counting_says_so_and_repaired_by_the_fewest_swaps(
    budget: Bounded, seed: int
) -> None:
    n, feasible = sum(budget.sizes), masks(budget)
    rng = np.random.default_rng(seed)
    pruned = np.zeros(n, dtype=bool)
    pruned[rng.permutation(n)[: budget.k]] = True
    assert (budget.violation(pruned) == "") == any(np.array_equal(pruned, mask) for mask in feasible)
    repaired = budget.repaired(pruned, rng.random(n))
    assert not budget.violation(repaired)
    assert (repaired != pruned).sum() == min((mask != pruned).sum() for mask in feasible)
    assert budget.violation(np.ones(n, dtype=bool)) or budget.k == n


def floored(objective: str, gradient: bool = False) -> SelectionProblem:
    """Two blocks, the first so light that all of it goes unless some of it has to stay."""
    light, heavy = random_block(0, 4, 9, gradient=gradient), random_block(1, 6, 9, gradient=gradient)
    small = QuadraticBlock(light.weights * 1e-3, light.factor, light.damping, light.gradient)
    return SelectionProblem([small, heavy], Bounded(6, (4, 6), (2, 1)), objective)


@pytest.mark.parametrize("name", available_solvers())
def test_every_solver_keeps_floors_and_says_what_it_put_back(name: str) -> None:
    about = describe(name)
    if about.missing:
        pytest.skip(f"{name} needs {about.missing}")
    # SCIP's tolerances can keep it from ending although all is proven.
    limit = 5.0 if "miqp" in name else None
    for objective in ("selection", "joint"):
        problem = floored(objective, gradient=name == "gradient_magnitude")
        for allocation in (None, "magnitude"):
            try:
                solution = solvers.solve(problem, name, allocation=allocation, time_limit=limit)
                relaxed = solvers.solve(problem.with_n_prune(6), name, allocation=allocation, time_limit=limit)
            except solvers.CapabilityError as error:
                assert "floor" not in str(error) and "Bounded" not in str(error)
                continue
            assert not problem.budget.violation(solution.pruned)
            assert solution.bound <= solution.objective and solution.own_weights is None
            short = bool(problem.budget.violation(relaxed.pruned))
            direct = "Bounded" in about.budgets and allocation is None
            assert any("floors: " in repair for repair in solution.repairs) == (short and not direct)
            if not short:
                assert np.array_equal(solution.pruned, relaxed.pruned) and solution.objective == relaxed.objective


def test_floors_are_proven_whether_or_not_they_bind() -> None:
    problem = floored("selection")
    for least in ((0, 1), (2, 1)):
        solution = solvers.solve(problem.with_budget(Bounded(6, (4, 6), least)), "branch_bound")
        best = min(problem.value(mask) for mask in masks(Bounded(6, (4, 6), least)))
        assert solution.bound <= best * (1 + 1e-9) and solution.objective >= best * (1 - 1e-9)
        assert solution.status is solvers.Status.OPTIMAL and solution.objective <= best * (1 + 1e-9)


@pytest.mark.parametrize("name", ["magnitude", "obd"])
def test_rules_that_rank_give_what_ranking_under_the_floors_gives(name: str) -> None:
    problem = floored("selection")
    scores = np.abs(problem.weights) if name == "magnitude" else problem.diagonal * problem.weights**2
    assert np.array_equal(solvers.solve(problem, name).pruned, problem.budget.cheapest_of(scores))


def test_devices_and_large_groups_agree_with_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    n, sizes = 50_000, [50] * 1000
    budget = Bounded(n - 1500, sizes, [1] * 1000)
    pruned = budget.cheapest(torch.from_numpy(rng.random(n)).float()).numpy()
    assert not budget.violation(pruned) and (~pruned).reshape(1000, 50).sum(1).min() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, (4, 6), (2, 2)), "at least 4 weights are to stay in 2 groups together, but 3 of 10 stay"),
        ((1, (4, 6), (0, 0), (2, 6)), "at most 8 weights are to stay .* but 9 of 10"),
        ((3, (4, 6), (5, 0)), "of the 4 weights of group 0 at least 5"),
        ((3, (4, 6), (2, 0), (1, 6)), "at least 2 and at most 1"),
        ((3, (4, 6), (1,)), "one for each"),
        ((3, (4, 6), (1.5, 1)), "must be integers"),
        ((3, (4, 5), (1, 1)), "the groups hold 9 weights"),
        ((3, (4, 6), (1, 1), None, np.zeros(10, dtype=np.int64)), "each once"),
        ((11, (4, 6), (0, 0)), r"must lie in \[0, 10\]"),
    ],
)
def test_what_no_mask_can_keep_is_refused_with_the_figure(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        floored("selection").with_budget(Bounded(*arguments))  # type: ignore[arg-type]
