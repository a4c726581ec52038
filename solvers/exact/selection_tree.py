"""Branch and bound for the selection objective: min ½ zᵀQz − cᵀz, z ∈ {0, 1}ⁿ, 1ᵀz = n_prune.

Q = diag(w) H diag(w) is scaled by a power of two, an incumbent is found by tabu search, and the root is bounded by the
quadratic programme whose diagonal shift the semidefinite relaxation chose (`solvers.bounds.shift`). Weights that
the root's reduced costs decide leave the problem, and the shift is chosen afresh for what is left. From
there compiled depth-first searches (`solvers.exact.selection_kernels`) run in batches on the open nodes of the lowest
bounds, each for a limited number of nodes; what they leave open comes back, and a node whose problem has become
markedly smaller than the one its shift was made for gets a new shift. Batches have a fixed size whatever the number of
threads, so the search does not depend on it.

A node is dropped when its certificate exceeds the incumbent less `RELATIVE_TOLERANCE` of it; the bound returned is the
lower of that and of all open nodes, less a margin for the rounding of Q itself.
"""

from __future__ import annotations

import heapq
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from solvers.bounds.shift import best_shift, safe_shift
from solvers.exact import selection_kernels as kernels
from solvers.moves import selection_swaps
from solvers.problem import Array, Mask
from solvers.solution import Reason
from solvers.solver import Deadline

#: Nodes are dropped when they cannot improve the objective by this fraction of it.
RELATIVE_TOLERANCE = 1e-7
#: And by this fraction of the sum of the diagonal: below it float64 knows nothing.
SCALE_TOLERANCE = 1e-14
_BATCH = 4
_NODES_PER_TASK = 10_000
#: A new shift when the free weights have become fewer than this fraction of those the old one was made for.
_SHRINKAGE = 0.5
_MAX_OPEN = 200_000
_NEVER = 2**31
_TABU_ROUNDS = 10
_TABU_MOVES = 1000


class SelectionTreeResult(NamedTuple):
    """What `solve_selection_tree` returns.

    Attributes
    ----------
    pruned : numpy bool (n,), exactly n_prune True
    bound : float
        Lower bound on the objective over all masks.
    reason : Reason
    statistics : dict of str to float
        nodes, shifts, root_bound, root_free, open_nodes, objective.
    """

    pruned: Mask
    bound: float
    reason: Reason
    statistics: dict[str, float]


@dataclass(order=True)
class _Node:
    """An open node, ordered by bound, then by age."""

    bound: float
    serial: int
    status: kernels.Statuses = field(compare=False)
    point: Array = field(compare=False)
    shift: Array | None = field(compare=False)
    made_for: int = field(compare=False)


class _Outcome(NamedTuple):
    """What the search below one node brought: a better incumbent or none, and new open nodes."""

    value: float
    mask: Mask | None
    nodes: list[_Node]
    searched: int
    shifts: int


@dataclass(eq=False)
class _Tree:
    """The scaled problem and the state of the search."""

    quadratic: Array
    linear: Array
    count: int
    deadline: Deadline
    nodes_per_task: int
    upper: float = math.inf
    best: Mask = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def value(self, mask: Mask) -> float:
        """½ zᵀQz − cᵀz of a mask."""
        return 0.5 * float(self.quadratic[np.ix_(mask, mask)].sum()) - float(self.linear[mask].sum())

    def tolerance(self) -> float:
        """What an improvement must be worth."""
        return RELATIVE_TOLERANCE * abs(self.upper) + SCALE_TOLERANCE * float(np.trace(self.quadratic))

    def offer(self, mask: Mask) -> None:
        """Descend from a mask by swaps; keep the result if it is better than the incumbent."""
        pruned = mask.copy()
        forces = self.quadratic @ pruned - self.linear
        selection_swaps.steepest_descent(self.quadratic, forces, pruned, 1e-13 * max(abs(self.upper), 1e-300), 10_000)
        value = self.value(pruned)
        if value < self.upper:
            self.upper, self.best = value, pruned

    def search(self, node: _Node, upper: float) -> _Outcome:
        """Bound a node, shift it anew where that pays, and search below it."""
        free = np.flatnonzero(node.status == 2)
        ones = np.flatnonzero(node.status == 1)
        count, n = self.count - ones.size, free.size
        constant = 0.5 * float(self.quadratic[np.ix_(ones, ones)].sum()) - float(self.linear[ones].sum())
        if count < 0 or count > n:
            return _Outcome(math.inf, None, [], 1, 0)
        if count in (0, n):
            mask = node.status == 1
            mask[free] = count > 0
            return _Outcome(self.value(mask), mask, [], 1, 0)
        quadratic = np.ascontiguousarray(self.quadratic[np.ix_(free, free)])
        linear = self.linear[free] - self.quadratic[np.ix_(free, ones)].sum(1)
        cut = upper - self.tolerance()
        shifts = 0
        shift, made_for, point = node.shift, node.made_for, node.point[free]
        if shift is None or n <= _SHRINKAGE * made_for:
            unit = _unit(quadratic, linear)
            found = best_shift(quadratic / unit, linear / unit, count, tolerance=1e-3, target=(cut - constant) / unit)
            # A little of the bound is given away for a well-conditioned M.
            lost = 1e-3 * max(abs(cut - constant) / unit - found.value, 0.01 * abs(found.value))
            own = unit * safe_shift(quadratic / unit, found.diagonal, max(1e-12, 2.0 * lost / n))
            shift = np.zeros(node.status.size)
            shift[free] = own
            made_for, shifts = n, 1
            if node.shift is None:
                point = np.where(found.point < 1e-4, 0.0, np.where(found.point > 1.0 - 1e-4, 1.0, found.point))
        own = shift[free]
        unit = _unit(quadratic, linear)
        best = np.zeros(n, dtype=np.bool_)
        value, statuses, bounds, points, counters = kernels.explore(
            (quadratic - np.diag(own)) / unit,
            (linear - 0.5 * own) / unit,
            constant / unit,
            count,
            point,
            upper / unit,
            best,
            self.nodes_per_task,
            self.tolerance() / unit,
        )
        mask = None
        if value * unit < upper and best.any():
            mask = node.status == 1
            mask[free] = best
        children = []
        for status, bound, child_point in zip(statuses, bounds, points, strict=True):
            full, full_point = node.status.copy(), np.zeros(node.status.size)
            full[free], full_point[free] = status, child_point
            # A node that could not even be branched on is given its own shift next time.
            kept = made_for if counters[kernels.STUCK] == 0 else _NEVER
            lower = max(node.bound, float(bound) * unit)
            children.append(_Node(lower, 0, full, full_point, shift, kept))
        return _Outcome(value * unit, mask, children, int(counters[kernels.NODES]), shifts)


def _unit(quadratic: Array, linear: Array) -> float:
    """A power of two of the size of the largest entry, so that dividing by it is exact."""
    size = max(float(np.abs(np.diag(quadratic)).max(initial=0.0)), float(np.abs(linear).max(initial=0.0)))
    return 2.0 ** math.floor(math.log2(size)) if size > 0.0 else 1.0


def solve_selection_tree(
    quadratic: Array,
    linear: Array | None,
    n_prune: int,
    *,
    deadline: Deadline | None = None,
    seed: int = 0,
    incumbent: Mask | None = None,
    n_threads: int = 1,
    node_limit: int | None = None,
    nodes_per_task: int = _NODES_PER_TASK,
) -> SelectionTreeResult:
    """Minimise ½ zᵀQz − cᵀz over z ∈ {0, 1}ⁿ with 1ᵀz = n_prune, Q positive semidefinite.

    Parameters
    ----------
    quadratic : float64 (n, n)
        Q = diag(w) H diag(w).
    linear : float64 (n,) or None
        c = g·w.
    n_prune : int, 0 ≤ n_prune ≤ n
    deadline : Deadline, optional
    seed : int
        For the tabu search that finds the incumbent.
    incumbent : bool (n,), optional
        A mask to start from.
    n_threads : int
        Workers; the result does not depend on it.
    node_limit : int, optional
    nodes_per_task : int
        Nodes a depth-first search may take before it hands its open nodes back.

    Returns
    -------
    SelectionTreeResult
    """
    n = quadratic.shape[0]
    scale = _unit(quadratic, np.zeros(n) if linear is None else linear)
    tree = _Tree(
        np.ascontiguousarray(0.5 * (quadratic + quadratic.T) / scale),
        np.zeros(n) if linear is None else linear / scale,
        n_prune,
        deadline or Deadline(),
        nodes_per_task,
    )
    if n_prune in (0, n):
        only = np.full(n, n_prune > 0)
        value = tree.value(only) * scale
        return SelectionTreeResult(only, value, Reason.COMPLETED, {"nodes": 0.0, "objective": value})
    with threadpool_limits(1):
        _find_incumbent(tree, seed, incumbent)
        bound, reason, statistics = _search(tree, n_threads, math.inf if node_limit is None else node_limit)
    bound -= _rounding_margin(tree)
    if not tree.linear.any():
        # Q is positive semidefinite.
        bound = max(bound, 0.0)
    for name in ("root_bound", "objective"):
        statistics[name] *= scale
    return SelectionTreeResult(tree.best, bound * scale, reason, statistics)


def _search(tree: _Tree, n_threads: int, node_limit: float) -> tuple[float, Reason, dict[str, float]]:
    """Empty the tree, or stop at a limit; (bound in the tree's units, reason, statistics)."""
    n = tree.quadratic.shape[0]
    everything = np.full(n, 2, dtype=np.int8)
    heap = [_Node(-math.inf, 0, everything, np.full(n, tree.count / n), None, _NEVER)]
    searched, shifts, serial, root_bound, reason = 0, 0, 1, -math.inf, Reason.COMPLETED
    with ThreadPoolExecutor(max(1, n_threads)) as workers:
        while heap:
            if tree.deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            if searched >= node_limit:
                reason = Reason.NODE_LIMIT
                break
            batch: list[_Node] = []
            while heap and len(batch) < _BATCH:
                node = _pop(heap)
                if node.bound < tree.upper - tree.tolerance():
                    batch.append(node)
            upper, began = tree.upper, tree.deadline.elapsed()
            outcomes = list(workers.map(lambda node, known=upper: tree.search(node, known), batch))
            took = tree.deadline.elapsed() - began
            if took > 0.0 and tree.deadline.remaining() < 4.0 * took:
                # Smaller tasks towards the end keep the time limit.
                share = tree.deadline.remaining() / (4.0 * took)
                tree.nodes_per_task = max(100, int(tree.nodes_per_task * share))
            for node, outcome in zip(batch, outcomes, strict=True):
                searched += outcome.searched
                shifts += outcome.shifts
                if outcome.mask is not None:
                    tree.offer(outcome.mask)
                for child in _progressing(node, outcome, tree):
                    child.serial = serial
                    serial += 1
                    heapq.heappush(heap, child)
            if math.isinf(root_bound):
                root_bound = min([tree.upper, *(node.bound for node in heap)])
            for node in heap[:2]:
                tree.offer(_rounded(node, tree.count))
    bound = min([tree.upper - tree.tolerance(), *(node.bound for node in heap)])
    statistics = {
        "nodes": float(searched),
        "shifts": float(shifts),
        "root_bound": root_bound,
        "open_nodes": float(len(heap)),
        "objective": tree.upper,
    }
    return bound, reason, statistics


def _pop(heap: list[_Node]) -> _Node:
    """The node of the lowest bound, or the newest one while memory must be saved."""
    if len(heap) < _MAX_OPEN:
        return heapq.heappop(heap)
    newest = max(range(len(heap)), key=lambda i: heap[i].serial)
    node = heap[newest]
    heap[newest] = heap[-1]
    heap.pop()
    heapq.heapify(heap)
    return node


def _progressing(node: _Node, outcome: _Outcome, tree: _Tree) -> list[_Node]:
    """The open nodes left by a search; a node that came back unchanged is branched on by its largest diagonal."""
    children: list[_Node] = []
    for child in outcome.nodes:
        if not np.array_equal(child.status, node.status) or node.shift is None:
            children.append(child)
            continue
        free = np.flatnonzero(child.status == 2)
        var = free[np.argmax(np.diag(tree.quadratic)[free])]
        for value in (0, 1):
            status = child.status.copy()
            status[var] = value
            children.append(_Node(child.bound, 0, status, child.point, child.shift, child.made_for))
    return children


def _rounded(node: _Node, count: int) -> Mask:
    """The k largest entries of a node's relaxed point, its fixed weights first."""
    score = np.where(node.status == 1, 2.0, np.where(node.status == 0, -1.0, node.point))
    mask = np.zeros(score.size, dtype=np.bool_)
    mask[np.argsort(-score, kind="stable")[:count]] = True
    return mask


def _find_incumbent(tree: _Tree, seed: int, start: Mask | None) -> None:
    """Swap-optimal masks from several starts, then tabu search from the best."""
    n, count = tree.quadratic.shape[0], tree.count
    saliency = 0.5 * np.diag(tree.quadratic)
    starts = [np.argsort(saliency - tree.linear, kind="stable"), np.argsort(saliency, kind="stable")]
    rng = np.random.default_rng(seed)
    starts += [np.argsort(saliency * rng.uniform(0.3, 3.0, n) - tree.linear, kind="stable") for _ in range(6)]
    for order in starts:
        mask = np.zeros(n, dtype=np.bool_)
        mask[order[:count]] = True
        tree.offer(mask)
    if start is not None:
        tree.offer(start.astype(np.bool_))
    frozen, random = np.zeros(n, dtype=np.int64), selection_swaps.random_state(rng)
    pruned, best = tree.best.copy(), tree.best.copy()
    forces = tree.quadratic @ pruned - tree.linear
    value = best_value = tree.upper
    for round_number in range(_TABU_ROUNDS):
        if tree.deadline.expired():
            break
        value, best_value, idle = selection_swaps.tabu_search(
            tree.quadratic, forces, pruned, frozen, value, best_value, best,
            round_number * _TABU_MOVES, _TABU_MOVES, max(2, min(10, n // 4)), 40, random,
        )  # fmt: skip
        if idle >= _TABU_MOVES:
            # Begin again from a perturbed copy of the best mask.
            pruned = _perturbed(best, rng)
            forces = tree.quadratic @ pruned - tree.linear
            value = tree.value(pruned)
    tree.offer(best)


def _perturbed(mask: Mask, rng: np.random.Generator) -> Mask:
    """A copy with a tenth of the smaller side swapped."""
    inside, outside = np.flatnonzero(mask), np.flatnonzero(~mask)
    size = max(1, min(inside.size, outside.size) // 10)
    changed = mask.copy()
    changed[rng.choice(inside, size, replace=False)] = False
    changed[rng.choice(outside, size, replace=False)] = True
    return changed


def _rounding_margin(tree: _Tree) -> float:
    """What the rounding of Q and c can change about the value of the masks in question.

    An entry of Q is off by a few units in the last place of √Q_ii √Q_jj.
    """
    eps = float(np.finfo(np.float64).eps)
    roots = np.sqrt(np.maximum(np.diag(tree.quadratic), 0.0))[tree.best].sum()
    return 16.0 * eps * (float(roots) ** 2 + float(np.abs(tree.linear[tree.best]).sum()))
