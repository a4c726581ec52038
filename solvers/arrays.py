"""Names for the numpy arrays that the package hands around, and a problem made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ProblemArrays:
    """A small problem as dense numpy float64 arrays, for exact backends.

    Attributes
    ----------
    weights : (n,)
    factor : (R, n), that of the curvatures' factored view, block-diagonal over blocks and components
    damping : (n,), the diagonal part of the factored view: the damping of the block each weight belongs to
    gradient : (n,), zeros where no gradient is given
    """

    weights: Array
    factor: Array
    damping: Array
    gradient: Array

    @property
    def hessian(self) -> Array:
        """H = AᵀA + diag(damping), dense (n, n)."""
        return self.factor.T @ self.factor + np.diag(self.damping)

    @property
    def selection_form(self) -> tuple[Array, Array]:
        """Q = diag(w) H diag(w), (n, n), and c = g·w, (n,): removing z ∈ {0, 1}ⁿ costs ½ zᵀQz − cᵀz."""
        columns = self.factor * self.weights
        quadratic = columns.T @ columns
        quadratic[np.diag_indices(self.weights.size)] += self.damping * self.weights**2
        return quadratic, self.gradient * self.weights
