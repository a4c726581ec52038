"""Any budget as linear rows over items, the form that exact solvers and searches of mixed moves share.

    low ≤ A z ≤ high ,     z ∈ {0, 1}^G ,     P = ∪ {items g with z_g = 1} ,     A ≥ 0 ,

where an item is a weight, or a group of weights that goes or stays whole. Every budget of this package is of this form:
counts have low = high, floors and ceilings bound what goes of each group, a limit on costs is a least cost of
what goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.arrays import Array, Index, Mask


@dataclass(frozen=True, eq=False)
class LinearRows:
    """Rows over items, and which weights an item is.

    Attributes
    ----------
    labels : int64 (n,)
        Item of each weight.
    matrix : float64 (m, G), none negative
    low, high : float64 (m,)
        Of what goes; −inf and inf where nothing is asked. What rounding may add to a sum of costs is allowed for.
    """

    labels: Index
    matrix: Array
    low: Array
    high: Array

    @classmethod
    def single(cls, matrix: Array, low: Array, high: Array) -> LinearRows:
        """Rows over single weights."""
        return cls(np.arange(matrix.shape[1]), matrix, low, high)

    @property
    def items(self) -> int:
        """Number of items G."""
        return int(self.matrix.shape[1])

    @property
    def grouped(self) -> bool:
        """Whether items are not just the weights, in their order."""
        return not np.array_equal(self.labels, np.arange(self.items))

    def widen(self, gone: Mask) -> Mask:
        """The mask of weights (n,) of a mask of items (G,)."""
        return np.asarray(gone[self.labels])

    def narrow(self, pruned: Mask) -> Mask:
        """The mask of items (G,) of a mask of weights (n,) that cuts none."""
        found = np.zeros(self.items, dtype=bool)
        found[self.labels] = pruned
        return found

    def holds(self, gone: Mask) -> bool:
        """Whether a mask of items keeps all rows."""
        return bool(self.fits(self.matrix @ gone))

    def fits(self, activity: Array) -> Mask:
        """Whether A z lies within the limits, for A z of shape (m, …); bool of the other shape."""
        shape = (-1,) + (1,) * (activity.ndim - 1)
        return np.asarray(((activity >= self.low.reshape(shape)) & (activity <= self.high.reshape(shape))).all(0))
