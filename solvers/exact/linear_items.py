"""The two objectives over items, as the tree over linear rows sees them: values, moves, and what bounds a node.

With z marking the items that go, a node is bounded by some base + sᵀz over its open items (`Plane`), minimised over the
rows (`solvers.exact.linear_kernels.least`).

* selection: the tangent of ½ zᵀ(Q − diag d)z + (½ d − c)ᵀz at a relaxed point; Q − diag d ⪰ 0, z² = z. The shift d is
  that of the semidefinite relaxation of the problem whose rows have become prices (`solvers.bounds.shift`).
* joint: let H be the open weights' Hessian once the kept ones are eliminated, v their centre, 0 < D ⪯ H, S = H − D. For
  any x, with β = Hv − Sx,

      ½ vᵀHv − ½ xᵀSx − ½ Σ_items y Σ_{i in item} β_i²/d_i ,     y = 1 − z,

  bounds every mask: the perspective relaxation of `solvers.bounds.diagonal`, with y priced by any rows instead of a
  number, and items in place of weights. x solves (S + diag(d/y)) x = Hv at the shares y that the rows leave.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy

from solvers.arrays import Array, Index, Mask
from solvers.bounds.shift import best_shift, safe_shift
from solvers.exact import linear_kernels as kernels
from solvers.exact.best_first import Fate, Fates
from solvers.exact.joint_nodes import mask_value, reduce_node
from solvers.exact.joint_square import Square
from solvers.exact.splitting import optimal_diagonal
from solvers.moves.item_moves import ItemMoves, JointMoves, SelectionMoves

_EPS = float(np.finfo(np.float64).eps)
#: A new shift, or diagonal, when the open items have become fewer than this fraction of those the old one was made for.
_SHRINKAGE = 0.6
#: Fewer are left with what they have: a tree below them takes less time.
_LEAST = 14
_ALTERNATIONS = 12


class Plane(NamedTuple):
    """base + slope·z over the open items (f,) bounds a node.

    With it the relaxed z (f,), how much each item matters (f,), and what the node's children begin with.
    """

    base: float
    slope: Array
    point: Array
    weight: Array
    state: Any


class OpenRows(NamedTuple):
    """What rows still ask of the open items: A (m, f), low and high (m,), prices (m,)."""

    matrix: Array
    low: Array
    high: Array
    prices: Array


class ItemObjective(ItemMoves):
    """Moves, and what bounds a node."""

    @abstractmethod
    def plane(self, fates: Fates, rows: OpenRows, state: Any, point: Array) -> Plane:
        """The bound of a node; `state` is its parent's, None at the root, `point` a relaxed z (G,) to begin from."""

    @abstractmethod
    def rounding(self, candidates: Mask) -> float:
        """What rounding may change about a bound, where items (G,) may still go."""


class SelectionItems(SelectionMoves, ItemObjective):
    """½ zᵀQz − cᵀz, Q (G, G) positive semidefinite."""

    def rounding(self, candidates: Mask) -> float:
        """A few units in the last place of √Q_gg √Q_hh for each pair."""
        roots = float(np.sqrt(np.maximum(np.diag(self.quadratic)[candidates], 0.0)).sum())
        return 16.0 * _EPS * (roots**2 + float(np.abs(self.linear[candidates]).sum()))

    def plane(self, fates: Fates, rows: OpenRows, state: Any, point: Array) -> Plane:
        """The tangent at about the least point of the shifted form."""
        free, ones = np.flatnonzero(fates == Fate.OPEN), np.flatnonzero(fates == Fate.PRUNED)
        inner = self.quadratic[np.ix_(free, free)]
        slope = self.quadratic[np.ix_(free, ones)].sum(1) - self.linear[free]
        constant = 0.5 * float(self.quadratic[np.ix_(ones, ones)].sum()) - float(self.linear[ones].sum())
        z = point[free]
        if state is None or _LEAST <= free.size <= _SHRINKAGE * state[1]:
            shift = np.zeros(self.items)
            shift[free] = _shifted(inner, slope, rows, z, None if state is None else state[0][free])
            state = (shift, free.size)
        own = state[0][free]
        matrix, linear = inner - np.diag(own), slope + 0.5 * own
        _relax(matrix, linear, rows, z)
        image = matrix @ z
        return Plane(constant - 0.5 * float(z @ image), image + linear, z, np.diag(inner), state)


def _relax(matrix: Array, linear: Array, rows: OpenRows, z: Array) -> None:
    """Move z (f,), and the prices, to about the least over the box and the rows."""
    bend = float(np.abs(np.diag(matrix)).mean()) + 1e-300
    norms = np.maximum((rows.matrix**2).sum(1), 1e-300)
    kernels.settle(matrix, linear, rows.matrix, rows.low, rows.high, z, rows.prices, 4.0 * bend * z.size / norms, 8, 12)


def _shifted(quadratic: Array, slope: Array, rows: OpenRows, z: Array, before: Array | None) -> Array:
    """The best shift at prices that are found together with it, safely below; `before` is a node's so far."""
    n = slope.size
    unit = float(np.abs(np.diag(quadratic)).max(initial=0.0)) or 1.0
    shift = np.zeros(n) if before is None else before
    for _ in range(3 if before is None else 1):
        _relax(quadratic - np.diag(shift), slope + 0.5 * shift, rows, z)
        priced = (slope - rows.prices @ rows.matrix) / unit
        found = best_shift(quadratic / unit, -priced, None, tolerance=1e-2)
        shift = unit * safe_shift(quadratic / unit, found.diagonal, 1e-12, whole_space=True)
        z[:] = found.point
    return shift


@dataclass(frozen=True, eq=False)
class _Reduced:
    """The open weights of a node: indices (m,), H (m, m), centre v (m,), D (m,), the least value, how many items."""

    index: Index
    hessian: Array
    centre: Array
    diagonal: Array
    base: float
    items: int


class JointItems(JointMoves, ItemObjective):
    """The joint objective in the units of a `Square`, whose weights are grouped into items by `labels` (n,).

    `kept` is about how many weights stay, for the choice of a diagonal.
    """

    def __init__(self, square: Square, labels: Index, kept: int) -> None:
        super().__init__(square.hessian, square.linear, 0.5 * float(square.centre @ square.linear), labels)
        self.square, self.kept, self.floor = square, kept, 0.0

    def value(self, gone: Mask) -> float:
        """By least squares, exact to rounding."""
        square = self.square
        return float(mask_value(square.hessian, square.scaled_root, square.centre, gone[self.labels]))

    def rounding(self, candidates: Mask) -> float:
        """Nothing: `Square.safe` sees to it."""
        return 0.0

    def plane(self, fates: Fates, rows: OpenRows, state: Any, point: Array) -> Plane:
        """The perspective relaxation at shares that the rows leave."""
        free = np.flatnonzero(fates == Fate.OPEN)
        reduced: _Reduced | None = state
        if reduced is None or _LEAST <= free.size <= 0.4 * reduced.items:
            reduced = self._reduce(fates, free.size)
        alive = np.flatnonzero(fates[self.labels[reduced.index]] != Fate.PRUNED)
        index = reduced.index[alive]
        # Weights that went since the reduction: v moves, and the value of keeping all others with it.
        hessian, centre, base = _without(reduced, alive)
        d = reduced.diagonal[alive]
        stays = fates[self.labels[index]] == Fate.KEPT
        pull, rest = hessian @ centre, hessian - np.diag(d)
        place = np.full(self.items, -1)
        place[free] = np.arange(free.size)
        own = place[self.labels[index]]
        y, shares = np.clip(1.0 - point[free], 1e-3, 1.0), np.empty(free.size)
        x = centre
        for _ in range(_ALTERNATIONS):
            bend = np.where(stays, 1.0, np.maximum(y[own], 1e-9))
            try:
                factor = scipy.linalg.cho_factor(rest + np.diag(d / bend), check_finite=False)
            except np.linalg.LinAlgError:
                break
            x = scipy.linalg.cho_solve(factor, pull, check_finite=False)
            sizes = np.bincount(own[~stays], weights=(d * x**2)[~stays], minlength=free.size)
            kernels.shares(sizes, rows.matrix, rows.low, rows.high, rows.prices, shares)
            moved = float(np.abs(shares - y).max(initial=0.0))
            y = np.maximum(shares, 1e-9)
            if moved < 1e-3:
                break
        image = rest @ x
        worth = (pull - image) ** 2 / d
        slope = np.asarray(0.5 * np.bincount(own[~stays], weights=worth[~stays], minlength=free.size), dtype=np.float64)
        terms = (0.5 * float(centre @ pull), 0.5 * float(x @ image), 0.5 * float(worth.sum()))
        base += terms[0] - terms[1] - terms[2] - 16.0 * _EPS * x.size**0.5 * (abs(base) + sum(map(abs, terms)))
        return Plane(base, slope, 1.0 - y, slope, reduced)

    def _reduce(self, fates: Fates, items: int) -> _Reduced:
        square = self.square
        index, hessian, centre, base = reduce_node(
            square.hessian, square.scaled_root, square.centre, fates[self.labels].astype(np.int64)
        )
        share = self.kept - int((fates[self.labels] == Fate.KEPT).sum())
        count = min(max(share, 1), index.size)
        unit = max(0.5 * float(centre @ hessian @ centre), 1e-30)
        diagonal = _below(hessian, optimal_diagonal(hessian, centre, count, unit)[0])
        return _Reduced(index, hessian, centre, diagonal, float(base), items)


def _below(hessian: Array, diagonal: Array) -> Array:
    """`diagonal` (m,) lowered until it lies below H beyond rounding."""
    floor = float(np.linalg.eigvalsh(hessian)[0])
    margin = 16.0 * diagonal.size * _EPS
    for share in (1.0, 1.0 - 1e-6, 1.0 - 1e-3, 0.9, 0.5):
        d = share * diagonal
        if (d > 0.0).all():
            root = 1.0 / np.sqrt(d)
            scaled = root[:, None] * hessian * root
            scaled[np.diag_indices(d.size)] -= 1.0 + margin * float(np.diag(scaled).max())
            try:
                np.linalg.cholesky(scaled)
            except np.linalg.LinAlgError:
                continue
            return np.asarray(d)
    return np.full(diagonal.size, 0.5 * max(floor, 1e-13))


def _without(reduced: _Reduced, alive: Index) -> tuple[Array, Array, float]:
    """(H, v, the least value) of the weights that are left when others of a reduced node have gone."""
    if alive.size == reduced.index.size:
        return reduced.hessian, reduced.centre, reduced.base
    gone = np.setdiff1d(np.arange(reduced.index.size), alive)
    hessian = reduced.hessian[np.ix_(alive, alive)]
    cross, own = reduced.hessian[np.ix_(alive, gone)], reduced.centre[gone]
    pull = cross @ own
    step = np.linalg.solve(hessian, pull)
    rise = 0.5 * float(own @ reduced.hessian[np.ix_(gone, gone)] @ own) - 0.5 * float(pull @ step)
    return hessian, reduced.centre[alive] + step, reduced.base + max(rise, 0.0)
