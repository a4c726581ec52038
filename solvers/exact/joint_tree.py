"""Branch and bound for CBS with n up to one or two hundred weights: perspective bounds with an optimised diagonal.

Completing the square (H d₀ = −g, c = w + d₀) turns CBS into best-subset regression on H's own columns,

    min over v, v_P = 0, |P| = n_prune, of  ½ (v − c)ᵀ H (v − c)  − ½ d₀ᵀH d₀ .

The damping alone makes a weak perspective relaxation (λ is 1e-5 to 1e-7 of ‖H‖). Each node therefore carries its own
diagonal D with G − D ⪰ 0, G the Hessian of the open weights after the kept ones are eliminated, and improves it
together with the relaxation (`solvers.exact.joint_bound`, where the mathematics is). The tree is
best-first (`solvers.exact.best_first`), starts from swap-optimal masks (`solvers.exact.joint_start`), fixes weights by
reduced costs at every node, enumerates nodes with few choices left, and branches on the weight with the largest z.

References
----------
Dong, Chen & Linderoth (2015), "Regularization vs. relaxation: a conic optimization perspective of statistical variable
selection"; Hazimeh, Mazumder & Saab (2022), "Sparse regression at scale" (the tree); Günlük & Linderoth (2010).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from solvers.budget import GroupReach, Partitioned
from solvers.exact import joint_nodes, symmetry
from solvers.exact.best_first import SECONDS_OF_CUBE, Expansion, Fate, Fates, Incumbent, Node, Relaxation, best_first
from solvers.exact.joint_bound import bound_node
from solvers.exact.joint_square import Square, first_diagonal, prepare
from solvers.exact.joint_start import ZERO, find_incumbent, improved, must_stay
from solvers.problem import Array, Mask
from solvers.solution import Reason
from solvers.solver import Deadline

#: Nodes are dropped when they cannot improve the objective by this fraction of it,
RELATIVE_TOLERANCE = 1e-8
#: or by this fraction of the height above the unconstrained minimum, below which float64 knows nothing.
HEIGHT_TOLERANCE = 1e-14


class JointTreeResult(NamedTuple):
    """What `solve_joint_tree` returns.

    Attributes
    ----------
    pruned : numpy bool (n,)
    bound : float
        Lower bound on the joint objective over all masks, never above the value of `pruned` as computed here.
    reason : Reason
    statistics : dict of str to float
        nodes, root_bound, open_nodes, objective; ridge where H is singular.
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


@dataclass(frozen=True)
class _State:
    """Decisions, D and z (n,) in single precision, and the weight to branch on."""

    fates: Fates
    diagonal: npt.NDArray[np.float32]
    share: npt.NDArray[np.float32]
    branch: int


class _JointRelaxation(Relaxation[_State]):
    """Perspective relaxations. Values are in units of `square.unit`, without the constant."""

    window = 16
    max_open = 300_000
    floor = 0.0

    def __init__(self, square: Square, partition: GroupReach, deadline: Deadline, stop: Mask, tolerance: float) -> None:
        self.square, self.n, self.partition = square, square.centre.size, partition
        self.keeps = np.bincount(partition.of, minlength=partition.quotas.size) - partition.quotas
        self.deadline, self.stop, self.tolerance = deadline, stop, tolerance
        signs = np.where(square.centre < 0.0, -1.0, 1.0)
        matrix, centre = square.hessian * np.outer(signs, signs), np.abs(square.centre)
        chains = symmetry.chains(matrix, centre, 0.5 * centre**2)
        # Only weights of one group may change places.
        self.groups: Sequence[symmetry.Indices] = [
            part for chain in chains for group in np.unique(partition.of[chain])
            if (part := chain[partition.of[chain] == group]).size > 1
        ]  # fmt: skip

    def cutoff(self, value: float) -> float:
        """Less a fraction of the whole objective, constant included."""
        total = value + self.square.constant / self.square.unit
        return value - max(self.tolerance * min(abs(total), value), HEIGHT_TOLERANCE * value)

    def root(self, incumbent: Incumbent) -> Expansion[_State]:
        """One node with everything open and many steps for its bound."""
        fates, share = np.full(self.n, Fate.OPEN, np.int8), np.full(self.n, self.keeps.sum() / self.n)
        diagonal = first_diagonal(self.square)
        # Without the time for a few steps the bound stays zero.
        steps = int(min(60.0, 0.5 * self.deadline.remaining() / (SECONDS_OF_CUBE * self.n**3)))
        if steps < 2 and self.n > 100:
            return Expansion([Node(0.0, _State(fates, _single(diagonal), _single(share), 0))])
        return self._process(fates, diagonal, share, incumbent, 0.1, max(steps, 2))

    def least_seconds(self, node: Node[_State]) -> float:
        """A step for both children."""
        n = int((node.state.fates == Fate.OPEN).sum())
        return SECONDS_OF_CUBE * n**3 if n > 100 else 0.0

    def expand(self, node: Node[_State], incumbent: Incumbent) -> Expansion[_State]:
        """Both children of the weight to branch on."""
        children: list[Node[_State]] = []
        closed, best, searched = math.inf, incumbent, 0
        for fate in (Fate.PRUNED, Fate.KEPT):
            fates = node.state.fates.copy()
            fates[node.state.branch] = fate
            searched += 1
            if not symmetry.follow(fates, self.groups):
                continue
            diagonal, share = node.state.diagonal.astype(np.float64), node.state.share.astype(np.float64)
            part = self._process(fates, diagonal, share, best, 1e-3, 8)
            children += part.children
            closed = min(closed, part.closed)
            best = part.found or best
        return Expansion(children, closed, None if best is incumbent else best, searched)

    def _process(
        self, fates: Fates, diagonal: Array, share: Array, incumbent: Incumbent, barrier: float, steps: int
    ) -> Expansion[_State]:
        """Run one node on writable copies."""
        square = self.square
        outcome, bound, branch, mask, value = joint_nodes.process_node(
            square.hessian,
            square.scaled_root,
            square.centre,
            fates,
            self.partition.of,
            self.keeps,
            diagonal,
            share,
            self.cutoff(incumbent.value),
            barrier,
            1e-4,
            steps,
            self.stop,
        )
        found = Incumbent(mask, float(value)) if value < incumbent.value else None
        if outcome != joint_nodes.Outcome.BRANCH:
            return Expansion(closed=float(bound), found=found)
        if found is not None:
            found = min(
                found, improved(square, self.partition, mask, self.deadline), key=lambda candidate: candidate.value
            )
        # Rounded down, so that D stays feasible in single precision.
        state = _State(fates, _single(diagonal * (1.0 - 1e-6)), _single(share), int(branch))
        return Expansion([Node(float(bound), state)], found=found)


def _single(array: Array) -> npt.NDArray[np.float32]:
    return array.astype(np.float32)


def solve_joint_tree(
    weights: Array,
    factor: Array,
    damping: float | Array,
    gradient: Array | None,
    n_prune: int | Partitioned,
    *,
    deadline: Deadline | None = None,
    seed: int = 0,
    incumbent: Mask | None = None,
    n_threads: int = 1,
    node_limit: int | None = None,
    relative_tolerance: float = RELATIVE_TOLERANCE,
) -> JointTreeResult:
    """Minimise the joint objective over all masks that remove as many weights as asked for.

    Parameters
    ----------
    weights : float64 (n,)
    factor : float64 (r, n)
    damping : float or float64 (n,)
        λ ≥ 0, one value or one per weight (several blocks: `factor` block-diagonal).
    gradient : float64 (n,) or None
    n_prune : int, 0 ≤ n_prune ≤ n, or Partitioned
        In all, or in each group.
    deadline : Deadline, optional
    seed : int
        For the local search.
    incumbent : bool (n,), optional
        A mask to start from.
    n_threads : int
        Workers; the result does not depend on it.
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
    Where the correlation matrix of H is singular to float64 (λ = 0), the tree works on H + `RIDGE`·diag(H), and nothing
    is left of its bound, as a mask may be better without the ridge; `statistics["ridge"]` says that this was done.
    """
    deadline = Deadline() if deadline is None else deadline
    square = prepare(weights, factor, damping, gradient)
    n = square.centre.shape[0]
    partition = n_prune if isinstance(n_prune, Partitioned) else Partitioned((n,), (n_prune,))
    if partition.n_prune in (0, n) or square.unit == 0.0:
        mask = partition.cheapest_of(np.zeros(n))
        value = square.value(mask)
        return JointTreeResult(mask, value, Reason.COMPLETED, {"objective": value, "nodes": 0.0})
    inside, whole, groups = np.arange(n), square, partition.groups
    with threadpool_limits(limits=1, user_api="blas"):
        best = find_incumbent(square, groups, incumbent, seed, deadline)
        while (stays := must_stay(square, best)).any():
            square, inside = square.keeping(stays), inside[~stays]
            groups = partition.groups.among(inside)
            best = find_incumbent(square, groups, best.pruned[~stays], seed, deadline)
        if best.value <= ZERO:
            bound, reason, statistics = 0.0, Reason.COMPLETED, {"nodes": 0.0}
        else:
            with deadline.flag() as stop:
                relaxation = _JointRelaxation(square, groups, deadline, stop, relative_tolerance)
                found = best_first(relaxation, best, deadline, n_threads=n_threads, node_limit=node_limit)
            (best, bound, reason, statistics) = found
    mask = np.zeros(n, dtype=bool)
    mask[inside[best.pruned]] = True
    value = whole.value(mask)
    unit = square.unit * (1.0 - square.error)
    statistics["objective"] = value
    if "root_bound" in statistics:
        root_bound = whole.safe(statistics["root_bound"] * unit, value - whole.constant)
        statistics["root_bound"] = min(root_bound, value)
    if square.ridge > 0.0:
        statistics["ridge"] = square.ridge
    bound = min(whole.safe(bound * unit, value - whole.constant), value)
    return JointTreeResult(mask, bound, reason, statistics)


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
        best = find_incumbent(square, Partitioned((n,), (n_prune,)).groups, None, 0, Deadline())
        bound, diagonal, share, _, _ = bound_node(
            square.hessian,
            square.centre,
            np.zeros(n, dtype=np.int64),
            np.array([n - n_prune]),
            first_diagonal(square),
            share,
            0.1,
            1e-6,
            n_steps,
            2.0 * max(best.value, ZERO),
            np.zeros(1, dtype=np.bool_),
        )
    value = square.value(best.pruned)
    value = min(square.safe(bound * square.unit, value - square.constant), value)
    return JointRootBound(value, diagonal * square.norms**2, share)
