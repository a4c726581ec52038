"""Branch and bound for the selection objective: min ½ zᵀQz − cᵀz, z ∈ {0, 1}ⁿ, 1ᵀz = n_prune.

Q = diag(w) H diag(w) is scaled by a power of two and an incumbent is found by tabu search
(`solvers.exact.selection_start`, which also decides the weights whose removal alone costs more). Groups of
a partition are bound into Q (`ScaledSelection.binding`). The root is bounded by
the quadratic programme whose diagonal shift the semidefinite relaxation chose (`solvers.bounds.shift`). Weights that
the root's reduced costs decide leave the problem, and the shift is chosen afresh for what is left. From
there compiled depth-first searches (`solvers.exact.selection_kernels`) run on the open nodes of the lowest
bounds (`solvers.exact.best_first`), each for a limited number of nodes; what they leave open comes back, and a node
whose problem has become markedly smaller than the one its shift was made for gets a new shift. What makes masks equally
good is used to exclude all but one (`solvers.exact.symmetry`).

A node is dropped when its certificate exceeds the incumbent less `RELATIVE_TOLERANCE` of it; the bound returned is the
lower of that and of all open nodes, less a margin for the rounding of Q itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from solvers.bounds.shift import best_shift, safe_shift
from solvers.budget import Partitioned
from solvers.exact import selection_face as faces
from solvers.exact import selection_kernels as kernels
from solvers.exact import symmetry
from solvers.exact.best_first import SECONDS_OF_CUBE, Expansion, Fate, Fates, Incumbent, Node, Relaxation, best_first
from solvers.exact.selection_start import ScaledSelection, find_incumbent, must_stay, unit_of
from solvers.problem import Array, Mask
from solvers.solution import Reason
from solvers.solver import Deadline

#: Nodes are dropped when they cannot improve the objective by this fraction of it.
RELATIVE_TOLERANCE = 1e-7
_NODES_PER_TASK = 10_000
#: A new shift when the free weights have become fewer than this fraction of those the old one was made for.
_SHRINKAGE = 0.5
#: Weights from which on a node is dear, and the first search is one that tells how dear.
_LARGE = 300
_NEVER = 2**31
#: Nodes looked at before a relaxation that may be tight is solved to the end.
_FIRST_LOOK = 100


class SelectionTreeResult(NamedTuple):
    """What `solve_selection_tree` returns.

    Attributes
    ----------
    pruned : numpy bool (n,)
    bound : float
        Lower bound on the objective over all masks.
    reason : Reason
    statistics : dict of str to float
        nodes, root_bound, open_nodes, objective.
    """

    pruned: Mask
    bound: float
    reason: Reason
    statistics: dict[str, float]


@dataclass(frozen=True)
class _State:
    """Decisions, relaxed point (n,), shift (n,) and the number of weights the shift was made for."""

    fates: Fates
    point: Array
    shift: Array | None = None
    made_for: int = _NEVER


@dataclass(frozen=True, eq=False)
class _NodeProblem:
    """The problem of the free weights of a node, in units of its own."""

    free: symmetry.Indices
    count: int
    quadratic: Array
    linear: Array
    constant: float
    unit: float


class _SelectionRelaxation(Relaxation[_State]):
    """Convex quadratic relaxations with a diagonal shift, searched depth-first below each node."""

    window = 4

    def __init__(
        self, problem: ScaledSelection, deadline: Deadline, stop: Mask, nodes_per_task: int, fates: Fates
    ) -> None:
        self.problem, self.deadline, self.stop = problem, deadline, stop
        self.nodes_per_task, self.fates = nodes_per_task, fates
        # Q is positive semidefinite.
        self.floor = -math.inf if problem.linear.any() else 0.0
        inside = np.flatnonzero(fates == Fate.OPEN)
        matrix, linear = problem.quadratic[np.ix_(inside, inside)], problem.linear[inside]
        groups = symmetry.chains(matrix, linear, 0.5 * np.diag(matrix) - linear)
        self.groups: Sequence[symmetry.Indices] = [inside[group] for group in groups]
        self.lattice = symmetry.lattice(matrix, linear, problem.count)
        self.pace = 0.0

    def cutoff(self, value: float) -> float:
        """Less a fraction of the value itself."""
        return value - RELATIVE_TOLERANCE * abs(value)

    def root(self, incumbent: Incumbent) -> Expansion[_State]:
        """Everything open, expanded if there is time."""
        node = Node(-math.inf, _State(self.fates, np.full(self.fates.size, self.problem.count / self.fates.size)))
        if self.deadline.remaining() <= self.least_seconds(node):
            return Expansion([node], searched=0)
        return self.expand(node, incumbent)

    def least_seconds(self, node: Node[_State]) -> float:
        """A shift of its own and a face."""
        return self._cube(int((node.state.fates == Fate.OPEN).sum()))

    @staticmethod
    def _cube(n: int) -> float:
        return SECONDS_OF_CUBE * n**3 if n > _LARGE else 0.0

    def expand(self, node: Node[_State], incumbent: Incumbent) -> Expansion[_State]:
        """Bound a node, shift it anew where that pays, and search below it."""
        state, began = node.state, self.deadline.elapsed()
        part = self._restrict(state.fates)
        if not 0 <= part.count <= part.free.size:
            return Expansion()
        if part.count in (0, part.free.size):
            mask = state.fates == Fate.PRUNED
            mask[part.free] = part.count > 0
            value = self.problem.value(mask)
            return Expansion(closed=value, found=Incumbent(mask, value))
        # On a lattice a better mask is better by a step.
        cut = min(self.cutoff(incumbent.value), incumbent.value - self.lattice.step + 4.0 * self.lattice.slack)
        shift, made_for, point, nodes = state.shift, state.made_for, state.point[part.free], self._task()
        close, late = False, lambda: self.deadline.remaining() <= 0.5 * self._cube(part.free.size)
        if shift is None or part.free.size <= _SHRINKAGE * made_for:
            own, relaxed, close = _new_shift(part, cut, late)
            point = point if shift is not None else relaxed
            shift, made_for = np.zeros(state.fates.size), part.free.size
            shift[part.free] = own
        expansion = self._explore(
            Node(node.bound, _State(state.fates, point, shift, made_for)),
            part, incumbent, incumbent.value - cut, min(nodes, _FIRST_LOOK) if close else nodes,
        )  # fmt: skip
        self.pace = max(self.pace, (self.deadline.elapsed() - began) / expansion.searched)
        if close and expansion.children and _tight_bound(part, cut, late) >= cut:
            return Expansion((), min(expansion.closed, self.lattice.lifted(cut)), expansion.found, expansion.searched)
        return expansion

    def _restrict(self, fates: Fates) -> _NodeProblem:
        free, ones = np.flatnonzero(fates == Fate.OPEN), np.flatnonzero(fates == Fate.PRUNED)
        quadratic, linear = self.problem.quadratic, self.problem.linear
        inner = np.ascontiguousarray(quadratic[np.ix_(free, free)])
        slope = linear[free] - quadratic[np.ix_(free, ones)].sum(1)
        constant = 0.5 * float(quadratic[np.ix_(ones, ones)].sum()) - float(linear[ones].sum())
        return _NodeProblem(free, self.problem.count - ones.size, inner, slope, constant, unit_of(inner, slope))

    def _task(self) -> int:
        """Nodes for one search: smaller towards the end, which keeps the time limit."""
        remaining, large = self.deadline.remaining(), self.fates.size > _LARGE
        if self.pace == 0.0 and large and math.isfinite(remaining):
            return 1
        if self.pace == 0.0 or remaining >= 4.0 * self.pace * self.nodes_per_task:
            return self.nodes_per_task
        return max(1 if large else 100, int(remaining / (4.0 * self.pace)))

    def _explore(
        self, node: Node[_State], part: _NodeProblem, incumbent: Incumbent, tolerance: float, nodes: int
    ) -> Expansion[_State]:
        """The compiled search below a node, its open nodes, and the best mask: found there, or rounded and improved."""
        fates, free, unit, shift = node.state.fates, part.free, part.unit, node.state.shift
        assert shift is not None
        own, best = shift[free], np.zeros(free.size, dtype=np.bool_)
        earlier, later = symmetry.links(self.groups, free, fates.size)
        matrix, linear = (part.quadratic - np.diag(own)) / unit, (part.linear - 0.5 * own) / unit
        face, size = faces.new_face(matrix, linear, earlier, later, node.state.point, self.stop)
        value, statuses, bounds, points, counters = kernels.explore(
            face, size, part.count, part.constant / unit, incumbent.value / unit, best, nodes, tolerance / unit
        )
        # A node that could not even be branched on is given its own shift next time.
        made_for = node.state.made_for if counters[kernels.Count.STUCK] == 0 else _NEVER
        children: list[Node[_State]] = []
        for status, bound, child_point in zip(statuses, bounds, points, strict=True):
            full, full_point = fates.copy(), np.zeros(fates.size)
            full[free], full_point[free] = status, child_point
            lower = max(node.bound, self.lattice.lifted(float(bound) * unit))
            for decided in self._halves(full) if np.array_equal(full, fates) else [full]:
                if symmetry.follow(decided, self.groups):
                    children.append(Node(lower, _State(decided, full_point, shift, made_for)))
        found = None
        if value * unit < incumbent.value and best.any():
            mask = fates == Fate.PRUNED
            mask[free] = best
            found = self.problem.improved(mask, self.deadline)
        elif children:
            rounded = _rounded(min(children, key=lambda child: child.bound).state, self.problem)
            found = self.problem.improved(rounded, self.deadline)
        upper = min(value * unit, incumbent.value)
        closed = min(upper, self.lattice.lifted(upper - tolerance))
        return Expansion(children, closed, found, int(counters[kernels.Count.NODES]))

    def _halves(self, fates: Fates) -> list[Fates]:
        """A node that came back unchanged is branched on by its largest diagonal."""
        free = np.flatnonzero(fates == Fate.OPEN)
        var = free[np.argmax(np.diag(self.problem.quadratic)[free])]
        halves = []
        for fate in (Fate.KEPT, Fate.PRUNED):
            half = fates.copy()
            half[var] = fate
            halves.append(half)
        return halves


def _new_shift(part: _NodeProblem, cut: float, expired: Callable[[], bool]) -> tuple[Array, Array, bool]:
    """(shift (m,), relaxed point (m,), whether the semidefinite relaxation may be tight enough to reach `cut`)."""
    quadratic, linear, n = part.quadratic / part.unit, part.linear / part.unit, part.free.size
    target = (cut - part.constant) / part.unit
    found = best_shift(quadratic, linear, part.count, tolerance=1e-3, target=target, expired=expired)
    # A little of the bound is given away for a well-conditioned M.
    lost = 1e-3 * max(abs(target - found.value), 0.01 * abs(found.value))
    own = part.unit * safe_shift(quadratic, found.diagonal, max(1e-12, 2.0 * lost / n))
    point = np.where(found.point < 1e-4, 0.0, np.where(found.point > 1.0 - 1e-4, 1.0, found.point))
    return own, point, target <= found.value + 2e-3 * abs(found.value)


def _tight_bound(part: _NodeProblem, cut: float, expired: Callable[[], bool]) -> float:
    """The certificate of the semidefinite relaxation itself, for nodes where it may decide."""
    quadratic, linear = part.quadratic / part.unit, part.linear / part.unit
    target = (cut - part.constant) / part.unit
    found = best_shift(
        quadratic, linear, part.count, tolerance=1e-11, target=target + 1e-9 * abs(target), expired=expired
    )
    own = safe_shift(quadratic, found.diagonal)
    matrix, slope = quadratic - np.diag(own), linear - 0.5 * own
    gradient, status = np.empty(own.size), np.full(own.size, faces.Status.FRACTIONAL, np.int8)
    faces.gradient(matrix, slope, found.point, gradient)
    sums = np.abs(matrix).sum(1)
    bound = faces.certificate(found.point, gradient, slope, sums, status, part.count, 0.0, np.empty(own.size))[0]
    return part.constant + part.unit * float(bound)


def _rounded(state: _State, problem: ScaledSelection) -> Mask:
    """The largest entries (of each group) of a node's relaxed point, its fixed weights first."""
    score = np.where(state.fates == Fate.PRUNED, 2.0, np.where(state.fates == Fate.KEPT, -1.0, state.point))
    return problem.partition.cheapest_of(-score)


def solve_selection_tree(
    quadratic: Array,
    linear: Array | None,
    n_prune: int | Partitioned,
    *,
    deadline: Deadline | None = None,
    seed: int = 0,
    incumbent: Mask | None = None,
    n_threads: int = 1,
    node_limit: int | None = None,
    nodes_per_task: int = _NODES_PER_TASK,
) -> SelectionTreeResult:
    """Minimise ½ zᵀQz − cᵀz over z ∈ {0, 1}ⁿ with as many ones as asked for, Q positive semidefinite.

    Parameters
    ----------
    quadratic : float64 (n, n)
        Q = diag(w) H diag(w).
    linear : float64 (n,) or None
        c = g·w.
    n_prune : int, 0 ≤ n_prune ≤ n, or Partitioned
        Ones of z, in all or in each group.
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
    slope = np.zeros(n) if linear is None else linear
    scale = unit_of(quadratic, slope)
    partition = n_prune if isinstance(n_prune, Partitioned) else Partitioned((n,), (n_prune,))
    problem = ScaledSelection(np.ascontiguousarray(0.5 * (quadratic + quadratic.T) / scale), slope / scale, partition)
    only = partition.only_mask(n)
    if only is not None:
        value = problem.value(only) * scale
        return SelectionTreeResult(only, value, Reason.COMPLETED, {"nodes": 0.0, "objective": value})
    deadline = deadline or Deadline()
    with threadpool_limits(1):
        best = find_incumbent(problem, deadline, seed, incumbent)
        fates = np.where(must_stay(problem, best.value), Fate.KEPT, Fate.OPEN).astype(np.int8)
        problem = problem.binding(best.value)
        with deadline.flag() as stop:
            relaxation = _SelectionRelaxation(problem, deadline, stop, nodes_per_task, fates)
            search = best_first(relaxation, best, deadline, n_threads=n_threads, node_limit=node_limit)
    bound = max(search.bound - problem.rounding(fates == Fate.OPEN), relaxation.floor)
    statistics = {
        **search.statistics,
        "root_bound": search.statistics["root_bound"] * scale,
        "objective": search.incumbent.value * scale,
    }
    return SelectionTreeResult(search.incumbent.pruned, bound * scale, search.reason, statistics)
