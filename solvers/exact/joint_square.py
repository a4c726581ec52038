"""CBS in the units of the joint tree: the square completed, H scaled to unit diagonal, the energy to one.

With H d₀ = −g, c = w + d₀ and N = diag(‖columns of the root of H‖), u = N v,

    CBS(P) = unit · min over u, u_P = 0, of ½ (u − ĉ)ᵀ Ĥ (u − ĉ)  − ½ d₀ᵀH d₀ ,     Ĥ = N⁻¹HN⁻¹,  unit = ½ cᵀHc ,

so that tolerances are relative and any scale of weights and gradients is the same problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.errors import ProblemError
from solvers.exact.completion import complete_square
from solvers.problem import Array, Mask, ProblemArrays

#: A correlation matrix with a smaller eigenvalue than this is treated as singular and gets `RIDGE` on its diagonal.
SINGULAR = 3e-12
RIDGE = 1e-11
_EPS = float(np.finfo(np.float64).eps)


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
    smallest: float
    """Least eigenvalue of the Hessian, as float64 sees it, before a ridge."""
    ridge: float
    slope_error: float = 0.0
    """Norm of the gradient that is left at the computed centre, in the units of the scaled problem."""

    @property
    def linear(self) -> Array:
        """Ĥĉ, (n,)."""
        return self.hessian @ self.centre

    def value(self, pruned: Mask) -> float:
        """The joint objective of a mask, by least squares on the triangular root of H (accurate, not fast)."""
        kept = ~pruned
        right = self.root[:, pruned] @ self.exact_centre[pruned]
        if kept.any() and pruned.any():
            columns = self.root[:, kept] / self.norms[kept]
            right = right - columns @ np.linalg.lstsq(columns, right, rcond=1e-13)[0]
        return 0.5 * float(right @ right) + self.constant

    def removal_costs(self) -> Array:
        """½ ĉ_i²/(Ĥ⁻¹)_ii, (n,): what the removal of i costs at least, whatever else is removed; zeros with a ridge."""
        if self.ridge > 0.0:
            return np.zeros(self.centre.size)
        values, vectors = np.linalg.eigh(self.hessian)
        inverse = ((vectors**2) / values).sum(1)
        return np.asarray(0.5 * self.centre**2 / inverse * (1.0 - self.error))

    @property
    def error(self) -> float:
        """Relative error of any value because H is rounded: n ε / λ_min, as dᵀEd ≤ ‖E‖/λ_min · dᵀHd for all d."""
        if self.ridge > 0.0:
            return 1.0
        return min(1.0, 4.0 * self.centre.size * _EPS / max(self.smallest, 1e-300))

    def safe(self, height: float, upper: float) -> float:
        """A bound on the objective from a bound `height` above the unconstrained minimum, and masks of value `upper`.

        Both are heights in units of the objective. The gradient q that rounding leaves at the centre changes a mask's
        value by qᵀd, and ‖d‖ ≤ √(2 height/λ_min). Where H is singular to float64 nothing is left of the bound.
        """
        slope = self.slope_error * math.sqrt(2.0 * max(upper, 0.0) / self.smallest) if self.ridge == 0.0 else 0.0
        if self.ridge > 0.0 and self.constant != 0.0:
            return -math.inf
        return max(height * (1.0 - self.error), 0.0) - slope - 8.0 * _EPS * abs(self.constant) + self.constant

    def keeping(self, stays: Mask) -> Square:
        """The problem of the other weights when the weights in `stays` (n,) are kept and refitted freely."""
        basis = np.linalg.qr(self.root[:, stays] / self.norms[stays])[0]
        rest = self.root[:, ~stays]
        for _ in range(2):
            # Twice is enough (Parlett): the second pass removes what rounding left of the first.
            rest = rest - basis @ (basis.T @ rest)
        return _scaled(rest, self.exact_centre[~stays], self.constant)


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
    scaled = _scaled(square.root, square.centre, square.constant)
    if not arrays.gradient.any():
        return scaled
    left = arrays.gradient + square.root.T @ (square.root @ (square.centre - weights))
    noise = 8.0 * _EPS * math.sqrt(n) * float(np.linalg.norm(arrays.gradient / scaled.norms))
    return replace(scaled, slope_error=float(np.linalg.norm(left / scaled.norms)) + noise)


def _scaled(root: Array, exact_centre: Array, constant: float) -> Square:
    n = exact_centre.shape[0]
    if root.shape[0] > n:
        root = np.asarray(np.linalg.qr(root, mode="r"))
    norms = np.linalg.norm(root, axis=0)
    norms[norms == 0.0] = 1.0
    scaled = root / norms
    hessian = scaled.T @ scaled
    target = root @ exact_centre
    unit = 0.5 * float(target @ target)
    smallest = float(np.linalg.eigvalsh(hessian)[0])
    ridge = RIDGE if smallest < SINGULAR else 0.0
    if ridge > 0.0:
        hessian[np.diag_indices(n)] += ridge
        scaled = np.linalg.qr(np.vstack([scaled, math.sqrt(ridge) * np.eye(n)]), mode="r")
    centre = exact_centre * norms / math.sqrt(unit) if unit > 0.0 else np.zeros(n)
    return Square(
        hessian, np.ascontiguousarray(scaled), centre, unit, constant, root, exact_centre, norms, smallest, ridge
    )


def first_diagonal(square: Square) -> Array:
    """A D to start from: half the smallest eigenvalue everywhere."""
    return np.full(square.centre.size, 0.5 * max(square.smallest, SINGULAR))
