"""CBS in the units of the joint tree: the square completed, H scaled to unit diagonal, the energy to one.

With H d₀ = −g, c = w + d₀ and N = diag(‖columns of the root of H‖), u = N v,

    CBS(P) = unit · min over u, u_P = 0, of ½ (u − ĉ)ᵀ Ĥ (u − ĉ)  − ½ d₀ᵀH d₀ ,     Ĥ = N⁻¹HN⁻¹,  unit = ½ cᵀHc ,

so that tolerances are relative and any scale of weights and gradients is the same problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from solvers.errors import ProblemError
from solvers.exact.formulation import complete_square
from solvers.problem import Array, Mask, ProblemArrays

#: A correlation matrix with a smaller eigenvalue than this is treated as singular and gets `RIDGE` on its diagonal.
SINGULAR = 3e-12
RIDGE = 1e-11


@dataclass(frozen=True, eq=False)
class Square:
    """The problem with unit-diagonal Hessian: value = unit · ½ (u − centre)ᵀ hessian (u − centre) + constant."""

    hessian: Array
    scaled_root: Array
    centre: Array
    unit: float
    constant: float
    root: Array
    exact_centre: Array
    norms: Array
    ridge: float

    def value(self, pruned: Mask) -> float:
        """The joint objective of a mask, by least squares on the triangular root of H (accurate, not fast)."""
        kept = ~pruned
        right = self.root[:, pruned] @ self.exact_centre[pruned]
        if kept.any() and pruned.any():
            columns = self.root[:, kept] / self.norms[kept]
            right = right - columns @ np.linalg.lstsq(columns, right, rcond=1e-13)[0]
        return 0.5 * float(right @ right) + self.constant


def prepare(weights: Array, factor: Array, damping: float | Array, gradient: Array | None) -> Square:
    """Complete the square and scale; ProblemError where the objective is unbounded below."""
    weights = np.asarray(weights, dtype=np.float64)
    n = weights.shape[0]
    arrays = ProblemArrays(
        weights,
        np.asarray(factor, dtype=np.float64),
        np.broadcast_to(np.asarray(damping, dtype=np.float64), (n,)).copy(),
        np.zeros(n) if gradient is None else np.asarray(gradient, dtype=np.float64),
    )
    square = complete_square(arrays)
    if square is None:
        raise ProblemError(
            "the joint objective is unbounded below: H is singular and the gradient leaves its range; use a damping > 0"
        )
    norms = np.linalg.norm(square.root, axis=0)
    norms[norms == 0.0] = 1.0
    scaled = square.root / norms
    hessian = scaled.T @ scaled
    centre = square.centre * norms
    energy = 0.5 * float(square.target @ square.target)
    smallest = float(np.linalg.eigvalsh(hessian)[0])
    ridge = RIDGE if smallest < SINGULAR else 0.0
    if ridge > 0.0:
        hessian[np.diag_indices(n)] += ridge
        scaled = np.linalg.qr(np.vstack([scaled, math.sqrt(ridge) * np.eye(n)]), mode="r")
    unit = energy
    scaled_centre = centre / math.sqrt(unit) if unit > 0.0 else np.zeros(n)
    return Square(
        hessian,
        np.ascontiguousarray(scaled),
        scaled_centre,
        unit,
        square.constant,
        square.root,
        square.centre,
        norms,
        ridge,
    )


def first_diagonal(hessian: Array) -> Array:
    """A D to start from: half the smallest eigenvalue everywhere."""
    smallest = max(float(np.linalg.eigvalsh(hessian)[0]), SINGULAR)
    return np.full(hessian.shape[0], 0.5 * smallest)


def ridge_cost(square: Square, mask: Mask) -> float:
    """½ ε ‖d‖² of the refit of a mask, in units of `square.unit`: what the ridge may have raised the bound by."""
    if square.ridge == 0.0:
        return 0.0
    kept = ~mask
    change = np.where(mask, -square.centre, 0.0)
    if kept.any():
        block = square.hessian[np.ix_(kept, kept)]
        change[kept] = np.linalg.solve(block, square.hessian[np.ix_(kept, mask)] @ square.centre[mask])
    return square.ridge * float(change @ change)
