"""The joint tree against brute force, and its bound against every mask."""

from __future__ import annotations

import json
import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import QuadraticBlock, SelectionProblem, Status, solve
from solvers.errors import ProblemError
from solvers.exact import joint_bound, joint_nodes, joint_subsets
from solvers.exact.best_first import Fate
from solvers.exact.joint_tree import joint_root_bound, solve_joint_tree
from solvers.solution import Reason
from solvers.solver import Deadline

BLOCKS = Path(__file__).resolve().parents[2].parent / "shared" / "blocks"


def joint_value(weights, factor, damping, gradient, pruned):
    """CBS-U by least squares on [A; √λ I], independent of the code under test."""
    n = weights.shape[0]
    damping = np.broadcast_to(damping, (n,))
    root = np.vstack([factor, np.diag(np.sqrt(damping))])
    kept = ~pruned
    gradient = np.zeros(n) if gradient is None else gradient
    linear = -float(gradient[pruned] @ weights[pruned])
    target = root[:, pruned] @ weights[pruned]
    if not kept.any():
        return 0.5 * float(target @ target) + linear
    columns = root[:, kept]
    if not gradient.any():
        residual = target - columns @ np.linalg.lstsq(columns, target, rcond=1e-13)[0]
        return 0.5 * float(residual @ residual)
    hessian = columns.T @ columns
    right = columns.T @ target - gradient[kept]
    step = np.linalg.lstsq(hessian, right, rcond=1e-13)[0]
    change = columns @ step - target
    return 0.5 * float(change @ change) + float(gradient[kept] @ step) + linear


def brute_force(weights, factor, damping, gradient, n_prune):
    """Lowest joint value over all masks."""
    n = weights.shape[0]
    values = []
    for removed in combinations(range(n), n_prune):
        pruned = np.zeros(n, dtype=bool)
        pruned[list(removed)] = True
        values.append(joint_value(weights, factor, damping, gradient, pruned))
    return min(values)


def check(weights, factor, damping, gradient, n_prune, **options):
    result = solve_joint_tree(weights, factor, damping, gradient, n_prune, **options)
    best = brute_force(weights, factor, damping, gradient, n_prune)
    found = joint_value(weights, factor, damping, gradient, result.pruned)
    slack = 1e-6 * abs(best) + 1e-300
    assert result.pruned.dtype == np.bool_ and int(result.pruned.sum()) == n_prune
    assert found <= best + slack
    assert result.bound <= best + slack
    # Where H is singular to float64 the tree proves nothing; `branch_bound` enumerates.
    assert result.bound >= best - slack or "ridge" in result.statistics
    assert result.reason is Reason.COMPLETED
    return result


def root_of(matrix):
    return np.ascontiguousarray(np.linalg.cholesky(matrix).T)


@st.composite
def instances(draw):
    """Small blocks with what breaks solvers: duplicates, zero weights, low rank, no damping, huge and tiny scales."""
    n = draw(st.integers(1, 9))
    rank = draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    factor = rng.standard_normal((rank, n)) * np.exp(rng.uniform(-1, 1) * rng.standard_normal(n))
    weights = rng.standard_normal(n)
    if n > 2 and draw(st.booleans()):
        factor[:, 1] = factor[:, 0]
    if n > 3 and draw(st.booleans()):
        weights[2] = 0.0
    if n > 3 and draw(st.booleans()):
        factor[:, 3] = 0.0
    if n > 4 and draw(st.booleans()):
        weights[4] = weights[0]
    damping = draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0]))
    gradient = None
    if damping > 0.0 and draw(st.booleans()):
        # A mean gradient lies in the rows' span; a little of it may not.
        gradient = 0.1 * factor.T @ rng.standard_normal(rank) + 0.1 * damping * rng.standard_normal(n)
    size = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    height = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    weights, factor, damping = weights * size, factor * height, damping * height**2
    if gradient is not None:
        gradient = gradient * size * height**2
    return weights, factor, damping, gradient, draw(st.integers(0, n))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(instances())
def test_agrees_with_brute_force(instance):
    check(*instance)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_prune", [3, 6, 10])
def test_agrees_with_brute_force_where_it_must_branch(seed, n_prune):
    rng = np.random.default_rng(seed)
    n = 13
    factor = rng.standard_normal((8, n)) @ np.diag(np.exp(rng.standard_normal(n)))
    result = check(rng.standard_normal(n), factor, 1e-3, None, n_prune)
    assert result.statistics["nodes"] >= 1


def test_gradient_moves_the_optimum():
    rng = np.random.default_rng(3)
    factor, weights, gradient = (
        rng.standard_normal((12, 10)),
        rng.standard_normal(10),
        5.0 * rng.standard_normal(10),
    )
    result = check(weights, factor, 1e-2, gradient, 6)
    assert result.bound < 0.0


def test_several_dampings_of_a_block_diagonal_hessian():
    rng = np.random.default_rng(4)
    factor = np.zeros((9, 10))
    factor[:4, :5], factor[4:, 5:] = rng.standard_normal((4, 5)), 3.0 * rng.standard_normal((5, 5))
    check(rng.standard_normal(10), factor, np.repeat([1e-3, 1e-1], 5), None, 6)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_and_a_given_incumbent_reach_the_same_value(n_threads):
    rng = np.random.default_rng(5)
    weights, factor = rng.standard_normal(12), rng.standard_normal((7, 12))
    start = np.zeros(12, dtype=bool)
    start[:7] = True
    check(weights, factor, 1e-4, None, 7, n_threads=n_threads, incumbent=start)


def test_the_result_does_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(6)
    arrays = rng.standard_normal(30), rng.standard_normal((18, 30)), 1e-4, None, 18
    first, *others = (solve_joint_tree(*arrays, seed=1, n_threads=threads) for threads in (1, 1, 2, 5))
    for other in others:
        assert np.array_equal(first.pruned, other.pruned)
        assert first.bound == other.bound and first.statistics == other.statistics


def duplicates(rng):
    return np.tile(rng.standard_normal(10), 4), np.tile(rng.standard_normal((8, 10)), 4), 1e-3


def equal_blocks(rng):
    return np.tile(rng.standard_normal(5), 8), np.kron(np.eye(8), rng.standard_normal((4, 5))), 1e-3


@pytest.mark.parametrize(
    "arrays",
    [
        lambda rng: (np.sign(rng.standard_normal(40)), np.zeros((1, 40)), 1.0),
        lambda rng: (rng.standard_normal(40), np.zeros((1, 40)), 1.0),
        lambda rng: (np.ones(40), np.ones((1, 40)), 1e-3),
        lambda rng: (np.ones(40), np.eye(40) + 0.5, 1e-3),
        duplicates,
        equal_blocks,
    ],
    ids=["λI, ties", "λI", "rank one", "equicorrelated", "duplicates", "equal blocks"],
)
def test_ties_end_without_a_limit(arrays):
    weights, factor, damping = arrays(np.random.default_rng(1))
    result = solve_joint_tree(weights, factor, damping, None, 20, node_limit=20_000)
    assert result.reason is Reason.COMPLETED
    assert result.bound == pytest.approx(joint_value(weights, factor, damping, None, result.pruned), rel=1e-6)


@pytest.mark.parametrize("node_limit", [1, 5])
def test_stops_at_the_node_limit_with_a_valid_bound(node_limit):
    rng = np.random.default_rng(7)
    weights, factor = rng.standard_normal(14), rng.standard_normal((9, 14))
    best = brute_force(weights, factor, 1e-4, None, 8)
    result = solve_joint_tree(weights, factor, 1e-4, None, 8, node_limit=node_limit)
    assert result.bound <= best * (1 + 1e-9)
    assert result.reason in (Reason.NODE_LIMIT, Reason.COMPLETED)
    assert joint_value(weights, factor, 1e-4, None, result.pruned) >= best * (1 - 1e-9)


def test_an_expired_deadline_still_returns_a_mask_and_a_bound():
    rng = np.random.default_rng(8)
    weights, factor = rng.standard_normal(40), rng.standard_normal((20, 40))
    result = solve_joint_tree(weights, factor, 1e-4, None, 25, deadline=Deadline(0.0))
    value = joint_value(weights, factor, 1e-4, None, result.pruned)
    assert result.reason is Reason.TIME_LIMIT
    assert 0.0 <= result.bound <= value


def test_unbounded_below_is_refused():
    weights, factor, gradient = np.ones(3), np.array([[1.0, 0.0, 0.0]]), np.array([0.0, 1.0, 0.0])
    with pytest.raises(ProblemError, match="unbounded"):
        solve_joint_tree(weights, factor, 0.0, gradient, 1)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("n_prune", [0, 4, 8, 12])
def test_root_bound_is_below_the_optimum_and_its_diagonal_is_feasible(n_prune, with_gradient):
    rng = np.random.default_rng(9)
    weights, factor = rng.standard_normal(12), rng.standard_normal((10, 12))
    gradient = rng.standard_normal(12) if with_gradient else None
    root = joint_root_bound(weights, factor, 1e-2, gradient, n_prune)
    best = brute_force(weights, factor, 1e-2, gradient, n_prune)
    hessian = factor.T @ factor + 1e-2 * np.eye(12)
    assert root.bound <= best + 1e-9 * abs(best) + 1e-12
    assert np.linalg.eigvalsh(hessian - np.diag(root.diagonal))[0] >= -1e-12 * np.linalg.norm(hessian)
    if n_prune == 8 and not with_gradient:
        # Better than anything the damping alone gives: the certificate with D = λ, at its maximiser over many points.
        flat, scores = np.full(12, 1e-2), np.zeros(12)
        points = [share * weights for share in np.linspace(0.0, 1.0, 51)]
        one = np.zeros(12, dtype=np.int64), np.array([4])
        plain = max(joint_bound.certificate(hessian, flat, weights, point, *one, scores)[0] for point in points)
        assert root.bound > 1.5 * max(plain, 0.5 * 1e-2 * np.sort(weights**2)[:8].sum())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.floats(-3, 3))
def test_the_certificate_holds_at_any_point_and_the_reduced_costs_with_it(seed, n, size):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((n + 2, n))
    matrix, target = factor.T @ factor, rng.standard_normal(n)
    n_kept = int(rng.integers(1, n))
    diagonal = np.full(n, 0.9 * np.linalg.eigvalsh(matrix)[0])
    scores = np.zeros(n)
    point, one = rng.standard_normal(n) * 10.0**size, (np.zeros(n, dtype=np.int64), np.array([n_kept]))
    bound, order = joint_bound.certificate(matrix, diagonal, target, point, *one, scores)
    last_in, first_out = scores[order[n_kept - 1]], scores[order[n_kept]]
    for kept in combinations(range(n), n_kept):
        mask = np.ones(n, dtype=bool)
        mask[list(kept)] = False
        value = joint_nodes.mask_value(matrix, root_of(matrix), target, mask)
        forced = bound + max(
            [0.0]
            + [0.5 * (scores[i] - first_out) for i in order[:n_kept] if mask[i]]
            + [0.5 * (last_in - scores[i]) for i in order[n_kept:] if not mask[i]]
        )
        assert value >= forced - 1e-9 * (abs(forced) + abs(bound) + value)


def test_a_node_is_the_same_problem_again():
    rng = np.random.default_rng(10)
    n = 9
    factor = rng.standard_normal((12, n))
    hessian, centre = factor.T @ factor, rng.standard_normal(n)
    status = np.full(n, Fate.OPEN, dtype=np.int8)
    status[[1, 5]], status[[2, 7]] = Fate.KEPT, Fate.PRUNED
    undecided, matrix, target, base = joint_nodes.reduce_node(hessian, factor, centre, status)
    for chosen in combinations(range(undecided.size), 2):
        inner = np.zeros(undecided.size, dtype=bool)
        inner[list(chosen)] = True
        whole = status == Fate.PRUNED
        whole[undecided[inner]] = True
        assert joint_nodes.mask_value(hessian, factor, centre, whole) == pytest.approx(
            base + joint_nodes.mask_value(matrix, root_of(matrix), target, inner), rel=1e-9
        )


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_best_subset_is_the_best_of_all(size):
    rng = np.random.default_rng(12 + size)
    factor, slope = rng.standard_normal((12, 8)), rng.standard_normal(8)
    gram = factor.T @ factor
    gains = {}
    for chosen in combinations(range(8), size):
        part = list(chosen)
        gains[chosen] = 0.5 * float(slope[part] @ np.linalg.solve(gram[np.ix_(part, part)], slope[part]))
    best = max(gains, key=gains.__getitem__)
    gain, second, chosen = joint_subsets.best_subset(gram, slope, size, 0.0)
    assert gain == pytest.approx(gains[best], rel=1e-10)
    assert second == pytest.approx(sorted(gains.values())[-2], rel=1e-10)
    assert tuple(sorted(chosen)) == best
    gain, second, chosen = joint_subsets.best_subset(gram, slope, size, gains[best] * (1 + 1e-9))
    assert np.all(chosen == -1)


def test_dominates_refuses_what_is_not_psd():
    matrix, scratch = np.array([[1.0, 0.5], [0.5, 1.0]]), np.zeros((2, 2))
    assert joint_bound.dominates(matrix, np.array([0.4, 0.4]), scratch)
    assert not joint_bound.dominates(matrix, np.array([0.5, 0.5]), scratch)
    assert not joint_bound.dominates(matrix, np.array([0.9, 0.9]), scratch)


def _stored():
    if not BLOCKS.is_dir():
        return []
    rows = json.loads((BLOCKS / "optima.json").read_text())
    return [row for row in rows if row["objective"] == "joint"]


@pytest.mark.skipif(not BLOCKS.is_dir(), reason="the optional data folder ../shared/blocks is absent")
@pytest.mark.parametrize("row", _stored(), ids=lambda row: f"{row['block']}-{row['n_prune']}")
def test_proves_the_stored_blocks(row):
    with np.load(BLOCKS / f"{row['block']}.npz") as data:
        weights, factor, damping = data["weights"], data["factor"].astype(np.float64), float(data["damping"])
    result = solve_joint_tree(weights, factor, damping, None, row["n_prune"])
    value = joint_value(weights, factor, damping, None, result.pruned)
    assert value <= row["best"] * (1 + 1e-6)
    assert result.bound <= value * (1 + 1e-9)
    assert math.isclose(result.bound, value, rel_tol=1e-6)


@pytest.mark.parametrize("needs", [(2, 2), (1, 2, 1), (2, 1, 3), (1, 1)])
def test_the_best_of_groups_is_the_best_of_all_choices_that_keep_them(needs):
    sizes = [4] * len(needs)
    rng = np.random.default_rng(len(needs))
    root = rng.standard_normal((20, sum(sizes)))
    gram, slope = root.T @ root, rng.standard_normal(sum(sizes))
    owner = np.repeat(np.arange(len(needs)), sizes)
    parts = [combinations(np.flatnonzero(owner == g), k) for g, k in enumerate(needs)]
    gains = {}
    for parts_kept in product(*parts):
        kept = np.array(sorted(int(i) for part in parts_kept for i in part))
        gains[tuple(kept)] = 0.5 * slope[kept] @ np.linalg.solve(gram[np.ix_(kept, kept)], slope[kept])
    best, second = sorted(gains.values(), reverse=True)[:2]
    found = joint_subsets.best_of_groups(gram, slope, owner, np.array(needs), 0.0)
    assert found[0] == pytest.approx(best) and found[1] == pytest.approx(second)
    assert gains[tuple(sorted(found[2].tolist()))] == pytest.approx(best)
    assert joint_subsets.best_of_groups(gram, slope, owner, np.array(needs), best * (1 + 1e-9))[2].tolist()[0] == -1


@pytest.mark.parametrize("seed", range(4))
def test_patterns_that_took_a_tree_of_thousands_are_proven_in_few_nodes(seed):
    # Neighbours nearly alike, as pixels are: many weights are certain, and few decide.
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.standard_normal((60, 32)), axis=1) / 6.0 + 0.3 * rng.standard_normal((60, 32))
    block = QuadraticBlock(rng.standard_normal(32), smooth / 60**0.5, 1e-4)
    problem = SelectionProblem(block, "2:4", "joint")
    solution = solve(problem, "branch_bound[node_limit=1000]")
    assert solution.status is Status.OPTIMAL
    for swapped in range(0, 32, 4):
        # No other choice inside one group is better.
        for pair in combinations(range(swapped, swapped + 4), 2):
            other = solution.pruned.copy()
            other[swapped : swapped + 4] = False
            other[list(pair)] = True
            assert problem.joint_value(other) >= solution.objective * (1 - 1e-9)
