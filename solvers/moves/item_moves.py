"""What flips and exchanges of items change, under both objectives, where H is small enough to be held.

An item is a weight, or a group of weights that goes or stays whole (`solvers.budget.linear`); z marks what goes. For
the selection objective ½ zᵀQz − cᵀz everything follows from F = Qz − c. For the joint one, with M = H_SS⁻¹, v the refit
and ρ minus the gradient at v,

    removing item g costs  ½ v_gᵀ (M_gg)⁻¹ v_g ,    taking j back gains  ½ ρ_jᵀ (H_jj − H_jS M H_Sj)⁻¹ ρ_j ,

and an exchange is the one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import scipy.linalg

from solvers.arrays import Array, Index, Mask


class ItemMoves(ABC):
    """An objective over items."""

    items: int
    #: No mask has a value below this.
    floor: float

    @abstractmethod
    def value(self, gone: Mask) -> float:
        """Of a mask of items (G,)."""

    @abstractmethod
    def moves(self, gone: Mask, exchanges: bool = True) -> tuple[Array, Array]:
        """(what flipping each item changes (G,), what exchanging a gone item and a kept one changes (|P|, |S|)).

        Without `exchanges` the second means nothing.
        """


class SelectionMoves(ItemMoves):
    """½ zᵀQz − cᵀz.

    Parameters
    ----------
    quadratic : float64 (G, G), positive semidefinite
    linear : float64 (G,)
    """

    def __init__(self, quadratic: Array, linear: Array) -> None:
        self.quadratic, self.linear = quadratic, linear
        self.items = linear.size
        self.floor = -np.inf if linear.any() else 0.0

    def value(self, gone: Mask) -> float:
        """½ zᵀQz − cᵀz."""
        return 0.5 * float(self.quadratic[np.ix_(gone, gone)].sum()) - float(self.linear[gone].sum())

    def moves(self, gone: Mask, exchanges: bool = True) -> tuple[Array, Array]:
        """By F = Qz − c: a flip changes ±F_i + ½ Q_ii, an exchange the sum of two less Q_ij."""
        sign = np.where(gone, -1.0, 1.0)
        flips = sign * (self.quadratic @ gone - self.linear) + 0.5 * np.diag(self.quadratic)
        if not exchanges:
            return flips, flips[:0, None]
        return flips, flips[gone][:, None] + flips[~gone] - self.quadratic[np.ix_(gone, ~gone)]


class JointMoves(ItemMoves):
    """The least ½ vᵀHv − aᵀv over v that vanishes on what goes, plus a constant.

    Parameters
    ----------
    hessian : float64 (n, n), positive definite
    pull : float64 (n,)
        a = Hw − g.
    constant : float
    labels : int64 (n,)
        Item of each weight.
    """

    def __init__(self, hessian: Array, pull: Array, constant: float, labels: Index) -> None:
        self.hessian, self.pull, self.constant, self.labels = hessian, pull, constant, labels
        self.items = int(labels.max()) + 1
        self.floor = -np.inf
        sizes = np.bincount(labels)
        self.members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        self.single = bool((sizes == 1).all())

    def value(self, gone: Mask) -> float:
        """By a Cholesky factor; raises numpy.linalg.LinAlgError where H of what stays is singular."""
        kept = np.flatnonzero(~gone[self.labels])
        factor = scipy.linalg.cho_factor(self.hessian[np.ix_(kept, kept)], check_finite=False)
        solved = scipy.linalg.cho_solve(factor, self.pull[kept], check_finite=False)
        return self.constant - 0.5 * float(self.pull[kept] @ solved)

    def moves(self, gone: Mask, exchanges: bool = True) -> tuple[Array, Array]:
        """With all kept weights refitted; the inverse of H_SS gives the one and the other."""
        kept = np.flatnonzero(~gone[self.labels])
        inverse = np.asarray(np.linalg.inv(self.hessian[np.ix_(kept, kept)]), dtype=np.float64)
        solution: Array = inverse @ self.pull[kept]
        if self.single:
            return self._single_moves(gone, kept, inverse, solution)
        flips = np.zeros(self.items)
        place = np.full(self.labels.size, -1)
        place[kept] = np.arange(kept.size)
        outside, inside = np.flatnonzero(gone), np.flatnonzero(~gone)
        flips[outside] = self._gains(outside, kept, inverse, solution)
        swaps = np.empty((outside.size, inside.size))
        for column, item in enumerate(inside.tolist()):
            own = place[self.members[item]]
            solved = np.linalg.solve(inverse[np.ix_(own, own)], inverse[own])
            flips[item] = 0.5 * float(solution[own] @ np.linalg.solve(inverse[np.ix_(own, own)], solution[own]))
            if not exchanges:
                continue
            rest = np.setdiff1d(np.arange(kept.size), own)
            less = inverse[np.ix_(rest, rest)] - inverse[np.ix_(rest, own)] @ solved[:, rest]
            moved = solution[rest] - solution[own] @ solved[:, rest]
            swaps[:, column] = flips[item] + self._gains(outside, kept[rest], less, moved)
        return flips, swaps

    def _single_moves(self, gone: Mask, kept: Index, inverse: Array, solution: Array) -> tuple[Array, Array]:
        out = np.flatnonzero(gone[self.labels])
        cross = self.hessian[np.ix_(out, kept)]
        mixed = cross @ inverse
        bend = np.diag(self.hessian)[out] - (mixed * cross).sum(1)
        force = self.pull[out] - cross @ solution
        diagonal = np.diag(inverse)
        drops = 0.5 * solution**2 / diagonal
        after = (force[:, None] + mixed * (solution / diagonal)) ** 2
        swaps = drops - 0.5 * after / np.maximum(bend[:, None] + mixed**2 / diagonal, 1e-14)
        flips = np.zeros(self.items)
        flips[self.labels[kept]] = drops
        flips[self.labels[out]] = -0.5 * force**2 / np.maximum(bend, 1e-14)
        # Items in rising order, as their weights need not be.
        rows, columns = np.argsort(self.labels[out]), np.argsort(self.labels[kept])
        return flips, swaps[np.ix_(rows, columns)]

    def _gains(self, items: Index, kept: Index, inverse: Array, solution: Array) -> Array:
        """What taking each of `items` back changes, none of it positive."""
        found = np.empty(items.size)
        for at, item in enumerate(items.tolist()):
            own = self.members[item]
            cross = self.hessian[np.ix_(own, kept)]
            bend = self.hessian[np.ix_(own, own)] - cross @ inverse @ cross.T
            force = self.pull[own] - cross @ solution
            found[at] = -0.5 * float(force @ np.linalg.lstsq(bend, force, rcond=1e-12)[0])
        return found
