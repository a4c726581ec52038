"""The selection tree against brute force, its kernels against dense algebra, and what it must not do."""

from __future__ import annotations

import json
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers.exact import selection_face as faces
from solvers.exact import selection_kernels as kernels
from solvers.exact import symmetry
from solvers.exact.selection_tree import solve_selection_tree
from solvers.solution import Reason
from solvers.solver import Deadline

BLOCKS = Path(__file__).resolve().parents[3] / "shared" / "blocks"
KINDS = ("plain", "ties", "duplicates", "zero weights", "rank one", "spread weights", "huge or tiny", "no damping")


def random_problem(seed: int, kind: str) -> solvers.SelectionProblem:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 13))
    rows = 1 if kind == "rank one" else int(rng.integers(1, n + 3))
    factor, weights = rng.standard_normal((rows, n)), rng.standard_normal(n)
    if kind == "ties":
        factor, weights = np.round(factor), np.sign(weights)
    if kind == "duplicates":
        half = n // 2
        factor[:, n - half :], weights[n - half :] = factor[:, :half], weights[:half]
    if kind == "zero weights":
        weights[rng.random(n) < 0.4] = 0.0
    if kind == "spread weights":
        weights *= 10.0 ** rng.uniform(-6, 6, n)
    if kind == "huge or tiny":
        factor *= 10.0 ** rng.integers(-12, 13)
    damping = 0.0 if kind in ("no damping", "rank one") else float(rng.choice([1e-3, 1.0])) * float((factor**2).mean())
    gradient = None
    if seed % 2:
        gradient = rng.standard_normal(n) * float((factor**2).mean()) * float(np.abs(weights).mean())
    return solvers.SelectionProblem(
        [solvers.QuadraticBlock(weights, factor, damping, gradient)], int(rng.integers(0, n + 1))
    )


def assert_same_optimum(problem: solvers.SelectionProblem) -> None:
    oracle = solvers.solve(problem, "brute_force", with_refit=False)
    found = solvers.solve(problem, "branch_bound", time_limit=60.0, with_refit=False)
    assert found.objective <= oracle.objective + 1e-6 * abs(oracle.objective)
    assert found.bound <= oracle.objective + 1e-9 * abs(oracle.objective)
    assert found.status is solvers.Status.OPTIMAL


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_brute_force(kind: str) -> None:
    for seed in range(12):
        assert_same_optimum(random_problem(seed, kind))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(100, 10**6), kind=st.sampled_from(KINDS))
def test_agrees_with_brute_force_anywhere(seed: int, kind: str) -> None:
    assert_same_optimum(random_problem(seed, kind))


def test_several_blocks_share_one_budget() -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        blocks = [
            solvers.QuadraticBlock(
                rng.standard_normal(5), rng.standard_normal((4, 5)), 0.01, rng.standard_normal(5) * 0.1
            )
            for _ in range(3)
        ]
        assert_same_optimum(solvers.SelectionProblem(blocks, int(rng.integers(1, 15))))


def correlated(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n, n)) @ np.diag(np.arange(1, n + 1) ** -1.0) @ rng.standard_normal((n, n))
    scaled = factor * rng.standard_normal(n)
    return np.asarray(scaled.T @ scaled)


def test_the_result_does_not_depend_on_threads_or_task_size() -> None:
    quadratic = correlated(40, 1)
    one = solve_selection_tree(quadratic, None, 20, n_threads=1, nodes_per_task=50)
    two = solve_selection_tree(quadratic, None, 20, n_threads=3, nodes_per_task=50)
    whole = solve_selection_tree(quadratic, None, 20)
    assert np.array_equal(one.pruned, two.pruned)
    assert one.statistics == two.statistics
    assert one.bound == two.bound
    assert one.statistics["objective"] == pytest.approx(whole.statistics["objective"], rel=1e-6)
    assert one.statistics["nodes"] > 50


def no_curvature(n: int) -> np.ndarray:
    return np.zeros((1, n))


TIES = {
    "zeros": lambda rng: (
        np.where(np.arange(60) < 45, 0.0, rng.standard_normal(60)),
        rng.standard_normal((30, 60)),
        1e-4,
    ),
    "λI, ties": lambda rng: (np.sign(rng.standard_normal(40)), no_curvature(40), 1.0),
    "λI": lambda rng: (rng.standard_normal(40), no_curvature(40), 1.0),
    "rank one, ties": lambda rng: (np.sign(rng.standard_normal(40)), np.ones((1, 40)), 1e-3),
    "rank one": lambda rng: (rng.standard_normal(40), rng.standard_normal((1, 40)), 1e-3),
    "equicorrelated": lambda rng: (np.ones(40), np.eye(40) + 0.5, 1e-3),
    "duplicates": lambda rng: (np.tile(rng.standard_normal(10), 4), np.tile(rng.standard_normal((8, 10)), 4), 1e-3),
    "equal blocks": lambda rng: (
        np.tile(rng.standard_normal(5), 8),
        np.kron(np.eye(8), rng.standard_normal((4, 5))),
        0.1,
    ),
    "integers": lambda rng: (np.sign(rng.standard_normal(40)), np.round(rng.standard_normal((10, 40))), 0.1),
    "integers, no damping": lambda rng: (
        np.sign(rng.standard_normal(40)),
        np.round(rng.standard_normal((10, 40))),
        0.0,
    ),
}


@pytest.mark.parametrize("kind", TIES)
@pytest.mark.parametrize("n_prune", [20, 30])
def test_ties_end_without_a_limit(kind: str, n_prune: int) -> None:
    weights, factor, damping = TIES[kind](np.random.default_rng(1))
    problem = solvers.SelectionProblem([solvers.QuadraticBlock(weights, factor, damping)], n_prune)
    found = solvers.solve(problem, "branch_bound[node_limit=50000]", with_refit=False)
    assert found.status is solvers.Status.OPTIMAL
    if kind == "zeros":
        assert found.objective == 0.0
    if kind == "λI":
        assert found.objective == pytest.approx(0.5 * np.sort(weights**2)[:n_prune].sum(), rel=1e-9)


def test_chains_and_lattices_of_a_form_with_both() -> None:
    rng = np.random.default_rng(0)
    columns = rng.integers(-2, 3, (5, 4)).astype(float)[:, [0, 0, 1, 2, 3, 1]]
    matrix = np.zeros((8, 8))
    matrix[:6, :6] = columns.T @ columns
    matrix[6, 6], matrix[7, 7] = 4.0, 2.0
    groups = symmetry.chains(matrix, np.zeros(8), 0.5 * np.diag(matrix))
    assert sorted(group.tolist() for group in groups) == [[0, 1], [2, 5], [7, 6]]
    found = symmetry.lattice(matrix, np.zeros(8), 3)
    values = [0.5 * matrix[np.ix_(c, c)].sum() for c in combinations(range(8), 3)]
    offsets = (np.array(values) - found.base) / found.step
    assert found.step >= 0.5 and np.abs(offsets - np.rint(offsets)).max() < 1e-9
    for bound in rng.uniform(0.0, max(values), 20):
        reached = found.lifted(float(bound))
        assert bound <= reached <= min(value for value in values if value >= bound)
    fates = np.full(8, 2, dtype=np.int8)
    fates[[1, 7]] = 1, 0
    assert symmetry.follow(fates, groups)
    assert fates.tolist() == [1, 1, 2, 2, 2, 2, 0, 0]
    assert symmetry.lattice(rng.standard_normal((30, 30)), np.zeros(30), 3).step == 0.0


def test_limits_return_the_incumbent_with_a_valid_bound() -> None:
    quadratic = correlated(40, 2)
    proven = solve_selection_tree(quadratic, None, 20)
    assert proven.reason is Reason.COMPLETED
    best = proven.statistics["objective"]
    limited = solve_selection_tree(quadratic, None, 20, node_limit=1, nodes_per_task=1)
    assert limited.reason is Reason.NODE_LIMIT
    assert limited.bound <= best * (1.0 + 1e-9)
    assert limited.pruned.sum() == 20
    expired = solve_selection_tree(quadratic, None, 20, deadline=Deadline(1e-9))
    assert expired.reason is Reason.TIME_LIMIT
    assert expired.bound <= best * (1.0 + 1e-9)
    assert expired.pruned.sum() == 20


@pytest.mark.parametrize("early", [True, False])
def test_a_search_told_to_stop_hands_back_what_is_open_with_valid_bounds(early: bool) -> None:
    quadratic, n = correlated(30, 4), 30
    unit = float(np.diag(quadratic).max())
    best = solve_selection_tree(quadratic / unit, None, 15).statistics["objective"]
    matrix, none, stop = quadratic / unit + 1e-9 * np.eye(n), np.full(n, -1), np.array([early])
    linear = np.full(n, 0.5e-9)
    face, size = faces.new_face(matrix, linear, none, none, np.full(n, 0.5), stop)
    stop[0] = True
    mask = np.zeros(n, dtype=np.bool_)
    _, statuses, bounds, _, counters = kernels.explore(face, size, 15, 0.0, 1.1 * best, mask, 1000, 0.0)
    assert counters[kernels.Count.NODES] == 1
    assert (size == 0) == early
    assert statuses.shape == (1, n)
    assert bounds[0] <= best


def test_a_deadline_sets_its_flag() -> None:
    with Deadline(1e-3).flag() as stop:
        while not stop[0]:
            time.sleep(1e-3)
    with Deadline().flag() as stop:
        assert not stop[0]


def test_a_start_is_used() -> None:
    quadratic = correlated(30, 3)
    best = solve_selection_tree(quadratic, None, 15)
    again = solve_selection_tree(quadratic, None, 15, incumbent=best.pruned, deadline=Deadline(1e-9))
    assert again.statistics["objective"] <= best.statistics["objective"] * (1.0 + 1e-12)


def test_updates_of_the_face_inverse_match_dense_algebra() -> None:
    """P = N(NᵀMN)⁻¹Nᵀ and a = M⁻¹1/(1ᵀM⁻¹1) after insertions and removals in any order."""
    rng = np.random.default_rng(0)
    n = 12
    root = rng.standard_normal((n, n))
    matrix = root.T @ root + 0.1 * np.eye(n)
    inverse, centre, members = np.zeros((n + 1, n + 1)), np.zeros(n + 1), np.empty(n + 1, np.int64)
    z, work, size = rng.random(n), np.empty(n + 1), 0
    for var in rng.permutation(n):
        size = faces.insert(matrix, inverse, centre, members, size, int(var), work)
    for position in (3, 0, 5):
        size = faces.remove(inverse, centre, members, size, position, z, 0.0)
    face = members[:size]
    dense = np.linalg.inv(matrix[np.ix_(face, face)])
    ones = dense.sum(1)
    assert size == n - 3
    np.testing.assert_allclose(centre[:size], ones / ones.sum(), atol=1e-10)
    np.testing.assert_allclose(inverse[:size, :size], dense - np.outer(ones, ones) / ones.sum(), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_the_node_certificate_is_a_lower_bound_at_any_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, count = 8, int(rng.integers(1, 8))
    root = rng.standard_normal((n, n))
    matrix, linear, z = root.T @ root, rng.standard_normal(n), rng.random(n)
    z *= count / z.sum()
    status = np.full(n, faces.Status.FRACTIONAL, np.int8)
    g = np.empty(n)
    faces.gradient(matrix, linear, z, g)
    sums = np.abs(matrix).sum(1)
    bound, value, _, _ = faces.certificate(z, g, linear, sums, status, count, 0.0, np.empty(n))
    assert value == pytest.approx(0.5 * z @ matrix @ z - linear @ z)
    draws = [rng.permutation(np.arange(n) < count).astype(float) for _ in range(50)]
    assert bound <= min(0.5 * s @ matrix @ s - linear @ s for s in draws) + 1e-12


@pytest.mark.skipif(not BLOCKS.is_dir(), reason="the optional data folder is not there")
def test_small_stored_blocks_are_proven() -> None:
    for entry in json.loads((BLOCKS / "optima.json").read_text()):
        if entry["objective"] != "selection" or entry["n"] > 100:
            continue
        problem = solvers.load_problem(
            BLOCKS / f"{entry['block']}.npz", n_prune=entry["n_prune"], objective="selection", use_gradient=False
        )
        found = solvers.solve(problem, "branch_bound", time_limit=60.0, with_refit=False)
        assert found.objective == pytest.approx(entry["best"], rel=1e-6)
        assert found.status is solvers.Status.OPTIMAL
