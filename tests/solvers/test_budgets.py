"""N:M and other groups that interact: text forms, exact solvers against exhaustive search, searches within groups."""

from __future__ import annotations

import numpy as np
import pytest

import solvers
from solvers import NM, Partitioned, ProblemError, QuadraticBlock, SelectionProblem, Status
from solvers.budget import as_partition, parse, places
from solvers.exact.selection_start import scaled
from solvers.moves import kicks
from tests.conftest import random_block
from tests.solvers.test_partitions import exhaustive, layer

EXACT = {"selection": ("branch_bound", "ortools_miqp", "cvxpy_miqp", "ortools_cpsat"),
         "joint": ("branch_bound", "ortools_miqp", "cvxpy_miqp")}  # fmt: skip
SEARCHES = {"selection": ("best_swap", "greedy_ls", "greedy_ls[rule=best]", "tabu", "annealing", "rmp"),
            "joint": ("obs", "obs[exact_below=2,chunks=3]", "joint_ls", "joint_ls[dense_limit=1]", "admm")}  # fmt: skip


def test_text_forms_become_budgets() -> None:
    problem = SelectionProblem(random_block(0, 8, 5), "2:4")
    assert problem.budget == Partitioned((4, 4), (2, 2))
    assert problem.with_budget("1:4").budget == Partitioned((4, 4), (3, 3))
    assert problem.with_budget("sparsity:0.3").n_prune == 8 - int(8 * 0.7)
    assert parse(" 4 : 8 ") == NM(4, 8)
    for text in ("4:2", "two", "sparsity:1.5", "sparsity:x", "2:4:8", "", "5"):
        with pytest.raises(ProblemError):
            parse(text)


def test_groups_lie_along_the_inputs_and_tails_are_refused_or_kept() -> None:
    rows = SelectionProblem(layer(rows=2, inputs=6), NM(1, 2), "joint")
    assert rows.budget == Partitioned((2,) * 6, (1,) * 6)
    with pytest.raises(ProblemError, match=r"6 weights \(block 0\): 2 are left over"):
        rows.with_budget("2:4")
    tail = rows.with_budget(NM(2, 4, dense_tail=True))
    assert tail.budget == Partitioned((4, 2, 4, 2), (2, 0, 2, 0))
    flat = SelectionProblem(random_block(0, 12, 5), NM(1, 4, inputs=6, dense_tail=True))
    assert flat.budget == tail.with_budget(NM(1, 4, dense_tail=True)).budget
    with pytest.raises(ProblemError, match="rows of 5 do not divide"):
        flat.with_budget(NM(1, 2, inputs=5))


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_exact_solvers_agree_on_groups_that_interact(objective: str) -> None:
    one = SelectionProblem(random_block(3, 12, 9), "2:4", objective)
    blocks = [random_block(0, 5, 9, gradient=True), random_block(1, 7, 5)]
    several = SelectionProblem(blocks, Partitioned((4, 4, 4), (2, 1, 3)), objective)
    for problem in (one, several):
        best = exhaustive(problem)
        brute = solvers.solve(problem, "brute_force")
        assert brute.objective == pytest.approx(best, rel=1e-9) and brute.status is Status.OPTIMAL
        for name in EXACT[objective]:
            # The joint models of SCIP may take minutes; what they have by then must be true all the same.
            limited = objective == "joint" and name.endswith("_miqp")
            solution = solvers.solve(problem, name, time_limit=10.0 if limited else None)
            assert solution.objective == pytest.approx(best, rel=1e-6), name
            assert solution.bound <= best + 1e-9 * abs(best), name
            assert limited or solution.status is Status.OPTIMAL, name


@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_searches_stay_within_groups_and_come_close(objective: str) -> None:
    blocks = [random_block(0, 5, 9), random_block(1, 7, 5)]
    for problem in (
        SelectionProblem(random_block(4, 16, 20), "2:4", objective),
        SelectionProblem(blocks, Partitioned((3, 4, 5), (2, 1, 3)), objective),
    ):
        best = exhaustive(problem)
        for name in SEARCHES[objective]:
            try:
                value = solvers.solve(problem, name, seed=1).objective
            except solvers.CapabilityError:
                assert "exact_below" in name and len(problem.blocks) > 1
                continue
            assert best * (1 - 1e-9) <= value <= best * (2.0 if name in ("rmp", "admm") else 1.3), name


@pytest.mark.parametrize("sizes", [(4,) * 1250, (2000, 3000)])
def test_large_problems_end_in_a_swap_optimum_of_every_group(sizes: tuple[int, ...]) -> None:
    budget = Partitioned(sizes, tuple(size // 2 for size in sizes))
    block = random_block(5, 5000, 6)
    problem = SelectionProblem(block, budget)
    found = solvers.solve(problem, "best_swap", with_refit=False)
    arrays = problem.arrays()
    removed = np.where(found.pruned, arrays.weights, 0.0)
    forces = arrays.weights * (arrays.factor.T @ (arrays.factor @ removed))
    for start, stop in zip(budget.starts[:50], budget.starts[1:51], strict=False):
        where = slice(int(start), min(int(stop), int(start) + 40))
        columns = arrays.factor[:, where] * arrays.weights[where]
        table, pruned = columns.T @ columns, found.pruned[where]
        ridge = arrays.damping[where] * arrays.weights[where] ** 2
        own = 0.5 * (np.diag(table) + ridge)
        rise, drop = forces[where] + own, forces[where] + ridge - own
        change = rise[None, :] - drop[:, None] - table
        gains = change[np.ix_(pruned, ~pruned)]
        assert gains.size == 0 or gains.min() > -1e-9 * found.objective


def test_binding_leaves_feasible_masks_alone_and_puts_all_others_above() -> None:
    problem = SelectionProblem(random_block(6, 10, 7), Partitioned((4, 6), (1, 3)))
    free, _ = scaled(problem.arrays(), as_partition(problem.budget, 10))
    feasible, other = np.zeros(10, dtype=bool), np.zeros(10, dtype=bool)
    feasible[[0, 5, 6, 7]] = other[[0, 1, 6, 7]] = True
    bound = free.binding(free.value(feasible))
    assert bound.value(feasible) == pytest.approx(free.value(feasible), rel=1e-12)
    assert bound.value(other) > free.value(feasible)
    assert (np.linalg.eigvalsh(bound.quadratic) > -1e-12).all()


def test_kicks_exchange_within_groups() -> None:
    budget = Partitioned((4, 3, 5), (2, 0, 4))
    mask = np.array([1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0], dtype=bool)
    for size in (1, 2, 3, 9):
        changed = kicks.exchanged(mask, size, np.random.default_rng(size), budget.groups)
        assert budget.violation(changed) == ""
        assert (changed != mask).sum() == 2 * min(size, 3)
    assert places(np.array([1, 0, 1, 1, 0])).tolist() == [0, 0, 1, 2, 1]


def test_rows_of_a_layer_are_proven_one_by_one() -> None:
    moment = np.cov(np.random.default_rng(0).standard_normal((8, 30)))
    curvature = solvers.Kronecker(np.array([1.0, 2.0]), moment, 0.1)
    problem = SelectionProblem(
        QuadraticBlock(np.random.default_rng(1).standard_normal(16), curvature=curvature), "2:4", "joint"
    )
    solution = solvers.solve(problem, "branch_bound")
    assert solution.status is Status.OPTIMAL and solution.objective == pytest.approx(exhaustive(problem), rel=1e-9)
