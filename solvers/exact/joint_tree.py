"""Branch and bound for CBS with n up to one or two hundred weights: perspective bounds with an optimised diagonal.

Completing the square (H d₀ = −g, c = w + d₀) turns CBS into best-subset regression on H's own columns,

    min over v, v_P = 0, |P| = n_prune, of  ½ (v − c)ᵀ H (v − c)  − ½ d₀ᵀH d₀ .

The damping alone makes a weak perspective relaxation (λ is 1e-5 to 1e-7 of ‖H‖). Each node therefore carries its own
diagonal D with G − D ⪰ 0, G the Hessian of the open weights after the kept ones are eliminated, and improves it
together with the relaxation (`solvers.exact.joint_kernels`, where the mathematics is). The tree is
best-first, starts from swap-optimal masks (`solvers.exact.joint_search`), fixes weights by reduced costs at
every node, enumerates nodes with at most two weights left to keep or to remove, and branches on the weight
with the largest z.

References
----------
Dong, Chen & Linderoth (2015), "Regularization vs. relaxation: a conic optimization perspective of statistical variable
selection"; Hazimeh, Mazumder & Saab (2022), "Sparse regression at scale" (the tree); Günlük & Linderoth (2010).
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from solvers.exact import joint_kernels as kernels
from solvers.exact import joint_search as search
from solvers.exact.joint_square import Square, first_diagonal, prepare, ridge_cost
from solvers.problem import Array, Mask
from solvers.solution import Reason
from solvers.solver import Deadline

#: Nodes are dropped when they cannot improve the objective by this fraction of it,
RELATIVE_TOLERANCE = 1e-8
#: or by this fraction of the problem's scale ½ cᵀHc, below which float64 knows nothing.
SCALE_TOLERANCE = 1e-14
#: Open nodes beyond this number make the search depth-first, so that memory stays bounded.
MAX_OPEN = 300_000

_Statuses = npt.NDArray[np.int8]
_Single = npt.NDArray[np.float32]


class JointTreeResult(NamedTuple):
    """What `solve_joint_tree` returns.

    Attributes
    ----------
    pruned : numpy bool (n,), exactly n_prune True
    bound : float
        Lower bound on the joint objective over all masks, never above the value of `pruned` as computed here.
    reason : Reason
    statistics : dict of str to float
        nodes, root_bound, fixed_at_root, open_nodes, objective; ridge where H is singular.
    """

    pruned: Mask
    bound: float
    reason: Reason
    statistics: dict[str, float]


class JointRootBound(NamedTuple):
    """What `joint_root_bound` returns.

    Attributes
    ----------
    bound : float
    diagonal : float64 (n,)
        D ≥ 0 with H − D ⪰ 0 that proves it, in the units of H.
    share : float64 (n,)
        The relaxed indicator of being kept, in (0, 1).
    """

    bound: float
    diagonal: Array
    share: Array


@dataclass(order=True)
class _Node:
    """An open node; ordered by bound, then by age."""

    bound: float
    serial: int
    status: _Statuses = field(compare=False)
    diagonal: _Single = field(compare=False)
    share: _Single = field(compare=False)
    branch: int = field(compare=False)


def solve_joint_tree(
    weights: Array,
    factor: Array,
    damping: float | Array,
    gradient: Array | None,
    n_prune: int,
    *,
    deadline: Deadline | None = None,
    seed: int = 0,
    incumbent: Mask | None = None,
    n_threads: int = 1,
    node_limit: int | None = None,
    relative_tolerance: float = RELATIVE_TOLERANCE,
) -> JointTreeResult:
    """Minimise the joint objective over all masks that remove exactly n_prune weights.

    Parameters
    ----------
    weights : float64 (n,)
    factor : float64 (r, n)
    damping : float or float64 (n,)
        λ ≥ 0, one value or one per weight (several blocks: `factor` block-diagonal).
    gradient : float64 (n,) or None
    n_prune : int, 0 ≤ n_prune ≤ n
    deadline : Deadline, optional
    seed : int
        For the kicks of the local search.
    incumbent : bool (n,), optional
        A mask to start from.
    n_threads : int
        Workers; the kernels release the GIL. With more than one the order of the search, and so which of several
        optima is returned and how many nodes it takes, may differ between runs.
    node_limit : int, optional
    relative_tolerance : float
        Gap at which a node is dropped.

    Returns
    -------
    JointTreeResult

    Raises
    ------
    ProblemError
        If the objective is unbounded below (λ = 0 and g outside the range of H).

    Notes
    -----
    Where the correlation matrix of H is singular (λ = 0), the tree works on H + `RIDGE`·diag(H). Its bound is lowered
    by the cost of the ridge at the incumbent before it is returned; `statistics["ridge"]` says that this was done.
    """
    deadline = Deadline() if deadline is None else deadline
    square = prepare(weights, factor, damping, gradient)
    n = square.centre.shape[0]
    if n_prune in (0, n):
        mask = np.full(n, n_prune == n)
        return _finished(square, mask, {"nodes": 0.0})
    with threadpool_limits(limits=1, user_api="blas"):
        tree = _Tree(square, n_prune, deadline, seed, node_limit, relative_tolerance)
        if tree.find_incumbent(incumbent):
            return _finished(square, tree.mask, {"nodes": 0.0})
        reason = tree.run(n_threads)
    return tree.result(reason)


def joint_root_bound(
    weights: Array,
    factor: Array,
    damping: float | Array,
    gradient: Array | None,
    n_prune: int,
    *,
    n_steps: int = 60,
) -> JointRootBound:
    """The bound of the root node alone: the semidefinite perspective relaxation, O(n_steps · n³).

    Parameters are those of `solve_joint_tree`; n up to a few hundred or a thousand.

    Returns
    -------
    JointRootBound
    """
    square = prepare(weights, factor, damping, gradient)
    n = square.centre.shape[0]
    share = np.full(n, min(max(1.0 - n_prune / n, 1e-9), 1.0 - 1e-9))
    if n_prune in (0, n) or square.unit == 0.0:
        value = square.value(np.full(n, n_prune == n)) if square.unit else square.constant
        return JointRootBound(value, np.zeros(n), share)
    with threadpool_limits(limits=1, user_api="blas"):
        mask, height = search.descend(
            square.hessian,
            square.scaled_root,
            square.centre,
            search.forward(square.hessian, square.centre, n - n_prune),
            20,
        )
        cutoff = max(height, SCALE_TOLERANCE)
        bound, diagonal, share, _, _ = kernels.bound_node(
            square.hessian,
            square.centre,
            n - n_prune,
            first_diagonal(square.hessian),
            share,
            0.1,
            1e-6,
            n_steps,
            2.0 * cutoff,
        )
    bound = max(0.0, bound - ridge_cost(square, mask))
    value = min(bound * square.unit + square.constant, square.value(mask))
    return JointRootBound(value, diagonal * square.norms**2, share)


def _finished(square: Square, mask: Mask, statistics: dict[str, float]) -> JointTreeResult:
    value = square.value(mask) if square.unit > 0.0 else square.constant
    statistics = {"objective": value, **statistics}
    bound = value if mask.all() or not mask.any() else min(value, square.constant)
    return JointTreeResult(mask, bound, Reason.COMPLETED, statistics)


class _Tree:
    """The state shared by the workers. Values are in units of `square.unit`, without the constant."""

    def __init__(
        self,
        square: Square,
        n_prune: int,
        deadline: Deadline,
        seed: int,
        node_limit: int | None,
        tolerance: float,
    ) -> None:
        self.square = square
        self.n = square.centre.shape[0]
        self.n_prune = n_prune
        self.n_kept = self.n - n_prune
        self.deadline = deadline
        self.seed = seed
        self.node_limit = math.inf if node_limit is None else node_limit
        self.tolerance = tolerance
        self.mask: Mask = np.zeros(self.n, dtype=bool)
        self.best = math.inf
        self.closed = math.inf
        self.nodes = 0
        self.root_bound = 0.0
        self.fixed_at_root = 0
        self.open: list[_Node] = []
        self.serial = itertools.count()
        self.active: dict[int, float] = {}
        self.condition = threading.Condition()
        self.failure: BaseException | None = None
        self.stopped: Reason | None = None

    @property
    def cutoff(self) -> float:
        """A node whose bound reaches this is of no interest."""
        total = self.best + self.square.constant / self.square.unit
        return self.best - max(self.tolerance * min(abs(total), self.best), SCALE_TOLERANCE)

    def find_incumbent(self, start: Mask | None) -> bool:
        """Local search; True if its value is zero to rounding, so that nothing remains to be proven."""
        hessian, root, centre = self.square.hessian, self.square.scaled_root, self.square.centre
        if self.square.unit == 0.0:
            self.mask[: self.n_prune] = True
            return True
        starts = [search.backward(hessian, centre, self.n_prune)]
        starts += [] if start is None else [np.asarray(start, dtype=bool)]
        if not self.late(0.1):
            starts.append(search.forward(hessian, centre, self.n_kept))
        # Swaps between two looks at the clock: a swap takes some 1e-9 n³ seconds.
        chunk = 1 + int(1e8 / self.n**3)
        for first in starts:
            mask, value, before = first, math.inf, math.nan
            while value != before:
                before = value
                mask, value = search.descend(hessian, root, centre, mask, 0 if self.late(0.3) else chunk)
            self.offer(mask, value)
        generator = np.random.default_rng(self.seed)
        rounds = max(10, 6000 // self.n)
        at_once = min(rounds, 1 + chunk // 10)
        for _ in range(0, rounds, at_once):
            if self.best <= SCALE_TOLERANCE or self.late(0.3):
                break
            self.offer(*search.kicked(hessian, root, centre, self.mask, self.best, generator, at_once))
        return self.best <= SCALE_TOLERANCE

    def late(self, fraction: float) -> bool:
        """Whether this fraction of the time limit is gone."""
        return self.deadline.elapsed() > fraction * self.deadline.limit

    def offer(self, mask: Mask, value: float) -> None:
        """Take a mask as incumbent if it is better."""
        if value < self.best:
            self.mask, self.best = mask.copy(), float(value)

    def process(
        self, status: _Statuses, diagonal: Array, share: Array, barrier: float, steps: int
    ) -> tuple[int, float, int]:
        """Run one node on writable copies and take what it found; (outcome, bound, branch)."""
        outcome, bound, branch, mask, value = kernels.process_node(
            self.square.hessian,
            self.square.scaled_root,
            self.square.centre,
            status,
            self.n_kept,
            diagonal,
            share,
            self.cutoff,
            barrier,
            1e-4,
            steps,
        )
        if value < self.best:
            with self.condition:
                self.offer(mask, value)
            if outcome == kernels.BRANCH:
                better, lower = search.descend(
                    self.square.hessian, self.square.scaled_root, self.square.centre, mask, 20
                )
                with self.condition:
                    self.offer(better, lower)
        return int(outcome), float(bound), int(branch)

    def push(
        self,
        parent: float,
        outcome: int,
        bound: float,
        status: _Statuses,
        diagonal: Array,
        share: Array,
        branch: int,
    ) -> None:
        """File a processed node: keep it open, or remember the bound it was closed with."""
        bound = max(parent, bound)
        if outcome != kernels.BRANCH:
            self.closed = min(self.closed, bound)
            return
        # Rounded down, so that D stays feasible in single precision.
        single = (diagonal * (1.0 - 1e-6)).astype(np.float32)
        node = _Node(bound, next(self.serial), status, single, share.astype(np.float32), branch)
        heapq.heappush(self.open, node)

    def run(self, n_threads: int) -> Reason:
        """Root, then workers until nothing is open or a limit is met."""
        status = np.zeros(self.n, dtype=np.int8)
        share = np.full(self.n, self.n_kept / self.n)
        diagonal = first_diagonal(self.square.hessian)
        # A step takes some 1e-9 n³ seconds; without the time for a few the bound stays zero.
        steps = int(min(60.0, 0.5 * self.deadline.remaining() / (1e-9 * self.n**3)))
        if steps < 2 and self.n > 100:
            self.push(0.0, kernels.BRANCH, 0.0, status, diagonal, share, 0)
            return Reason.TIME_LIMIT
        outcome, bound, branch = self.process(status, diagonal, share, 0.1, max(steps, 2))
        self.nodes = 1
        self.root_bound = max(0.0, bound)
        self.fixed_at_root = int(np.count_nonzero(status))
        self.push(0.0, outcome, bound, status, diagonal, share, branch)
        if n_threads > 1:
            threads = [threading.Thread(target=self.work, args=(index,), daemon=True) for index in range(n_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            self.work(0)
        if self.failure is not None:
            raise self.failure
        return self.stopped or Reason.COMPLETED

    def work(self, index: int) -> None:
        """One worker."""
        try:
            while (node := self.take(index)) is not None:
                for choice in (kernels.REMOVED, kernels.KEPT):
                    status = node.status.copy()
                    status[node.branch] = choice
                    diagonal = node.diagonal.astype(np.float64)
                    share = node.share.astype(np.float64)
                    outcome, bound, branch = self.process(status, diagonal, share, 1e-3, 8)
                    with self.condition:
                        self.nodes += 1
                        self.push(node.bound, outcome, bound, status, diagonal, share, branch)
                with self.condition:
                    del self.active[index]
                    self.condition.notify_all()
        except BaseException as error:
            with self.condition:
                self.failure = error
                self.condition.notify_all()

    def take(self, index: int) -> _Node | None:
        """The next node for a worker, or None when the tree is finished or a limit is met."""
        with self.condition:
            while True:
                if self.failure is not None or self.stopped is not None:
                    return None
                while self.open and self.open[0].bound >= self.cutoff:
                    self.closed = min(self.closed, heapq.heappop(self.open).bound)
                if self.open:
                    if self.deadline.expired():
                        self.stopped = Reason.TIME_LIMIT
                    elif self.nodes >= self.node_limit:
                        self.stopped = Reason.NODE_LIMIT
                    if self.stopped is not None:
                        self.condition.notify_all()
                        return None
                    # The last element of the heap's array is a leaf of it: recent, deep and free to remove.
                    node = self.open.pop() if len(self.open) > MAX_OPEN else heapq.heappop(self.open)
                    self.active[index] = node.bound
                    return node
                if not self.active:
                    self.condition.notify_all()
                    return None
                self.condition.wait()

    def result(self, reason: Reason) -> JointTreeResult:
        """The incumbent and the lowest bound among closed and open nodes."""
        lowest = min([self.best, self.closed, *(node.bound for node in self.open)])
        lowest = max(0.0, lowest - ridge_cost(self.square, self.mask))
        value = self.square.value(self.mask)
        bound = min(lowest * self.square.unit + self.square.constant, value)
        statistics = {
            "nodes": float(self.nodes),
            "root_bound": min(self.root_bound * self.square.unit + self.square.constant, value),
            "fixed_at_root": float(self.fixed_at_root),
            "open_nodes": float(len(self.open)),
            "objective": value,
        }
        if self.square.ridge > 0.0:
            statistics["ridge"] = self.square.ridge
        return JointTreeResult(self.mask, bound, reason, statistics)
