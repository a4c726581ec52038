"""Completing the square: CBS as best-subset regression on a root of H."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.problem import Array, ProblemArrays

#: Singular values below this fraction of the largest count as zero.
_RANK = 1e-13
#: A gradient counts as outside the range of H when this fraction of it is (as in `solvers.refit`).
_OUTSIDE = 1e-6


@dataclass(frozen=True, eq=False)
class Completed:
    """CBS with the square completed: ½‖root·v − target‖² + constant, over v with v_P = 0.

    Attributes
    ----------
    root : (m, n), m ≤ n
        Triangular factor of H.
    centre : (n,)
        c = w + d₀, the unconstrained minimiser.
    target : (m,)
        root·c
    constant : float
        −½ d₀ᵀ H d₀
    """

    root: Array
    centre: Array
    target: Array
    constant: float


def hessian_root(arrays: ProblemArrays) -> Array:
    """R (m, n) with RᵀR = H and m ≤ n, without forming H."""
    damped = arrays.damping > 0
    stacked = np.vstack([arrays.factor, np.diag(np.sqrt(arrays.damping))[damped]])
    return np.asarray(np.linalg.qr(stacked, mode="r")) if stacked.shape[0] > stacked.shape[1] else stacked


def complete_square(arrays: ProblemArrays) -> Completed | None:
    """The joint objective as best-subset regression; None where it is unbounded below for some mask."""
    root = hessian_root(arrays)
    gradient = arrays.gradient
    if not gradient.any():
        return Completed(root, arrays.weights, root @ arrays.weights, 0.0)
    left, singular, right = np.linalg.svd(root, full_matrices=False)
    keep = singular > _RANK * max(float(singular[0]), np.finfo(float).tiny)
    left, singular, right = left[:, keep], singular[keep], right[keep]
    inner = right @ gradient
    if np.linalg.norm(gradient - right.T @ inner) > _OUTSIDE * np.linalg.norm(gradient):
        return None
    image = -left @ (inner / singular)
    step = -right.T @ (inner / singular**2)
    constant = -0.5 * float(image @ image)
    return Completed(root, arrays.weights + step, root @ arrays.weights + image, constant)
