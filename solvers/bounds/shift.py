"""The diagonal shift of a cardinality-constrained binary quadratic programme, by semidefinite programming.

With z ∈ {0, 1}ⁿ marking the removed weights, Q = diag(w) H diag(w) and c = g·w, selection is

    min ½ zᵀQz − cᵀz   subject to   1ᵀz = k .

Because z_i² = z_i, any d may be taken off the diagonal of Q and put into the linear term: f_d(z) = ½ zᵀ(Q − diag d)z +
(½ d − c)ᵀz equals the objective on binary points, and its minimum over the capped simplex is a lower bound
whenever Q − diag d is positive semidefinite on the vectors that sum to zero (the products of 1ᵀz = k with each z_i are
worth exactly this restriction: full QCR). The best d is the dual of the semidefinite relaxation

    min ⟨C, Y⟩,  Y = [1 zᵀ; z X] ⪰ 0,  diag X = z,  Y (−k; 1) = 0 ,       C = ½ [0 −cᵀ; −c Q] .

The last row says Y = U Z Uᵀ, U an orthonormal basis of (−k; 1)^⊥, which restores interior points. A primal-dual
interior-point method (HKM direction) follows both sides from strictly feasible starts, so that every dual iterate is
a valid shift. Each constraint has rank two, so a step costs a few products of n × n matrices.

References
----------
Billionnet, Elloumi & Plateau (2009), "Improving the performance of standard solvers for quadratic 0-1 programs by a
tight convex reformulation: the QCR method"; Helmberg, Rendl, Vanderbei & Wolkowicz (1996), "An interior-point
method for semidefinite programming".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

from solvers.problem import Array

_STEP = 0.95
_CENTRING = 0.1


@dataclass(frozen=True, eq=False)
class Shift:
    """A dual point of the semidefinite relaxation.

    Attributes
    ----------
    diagonal : float64 (n,)
        d; Q − diag d is positive semidefinite on 1^⊥ up to rounding (see `safe_shift`).
    point : float64 (n,)
        The relaxed indicator z, in (0, 1), summing to k.
    value : float
        The dual value: the lower bound before rounding errors are accounted for.
    iterations : int
    converged : bool
        Whether the duality gap or the target was reached.
    """

    diagonal: Array
    point: Array
    value: float
    iterations: int
    converged: bool


def best_shift(
    quadratic: Array,
    linear: Array,
    count: int | None,
    *,
    tolerance: float = 1e-4,
    target: float = np.inf,
    max_iterations: int = 100,
    expired: Callable[[], bool] = lambda: False,
) -> Shift:
    """The shift d that maximises the bound.

    Parameters
    ----------
    quadratic : float64 (n, n), symmetric; its largest diagonal entry should be of the order of one
    linear : float64 (n,)
    count : int, 0 < k < n, or None
        None drops the cardinality: z is then any binary vector, and Q − diag d ⪰ 0 on the whole space.
    tolerance : float
        Duality gap, relative to the value, at which to stop.
    target : float
        Stop as soon as the dual value exceeds this.
    max_iterations : int
    expired : callable
        Whether time is up; the last dual point is then as valid as any.

    Returns
    -------
    Shift
    """
    n = quadratic.shape[0]
    cost = np.zeros((n + 1, n + 1))
    cost[1:, 1:] = 0.5 * quadratic
    cost[0, 1:] = cost[1:, 0] = -0.5 * linear
    basis = np.eye(n + 1) if count is None else _complement(np.concatenate([[-float(count)], np.ones(n)]))
    reduced = basis.T @ cost @ basis
    reduced = 0.5 * (reduced + reduced.T)
    primal, duals, slack = _start(reduced, basis, n, count)
    point = np.full(n, 0.5 if count is None else count / n)
    rhs = np.zeros(n + 1)
    rhs[0] = 1.0
    iterations, converged = 0, False
    while iterations < max_iterations and not expired():
        iterations += 1
        gap = float(np.sum(primal * slack))
        if gap <= tolerance * abs(duals[0]) or duals[0] > target or gap <= 1e-13:
            converged = True
            break
        barrier = _CENTRING * gap / primal.shape[0]
        try:
            inverse = np.linalg.inv(slack)
            inverse = 0.5 * (inverse + inverse.T)
            lifted, lifted_inverse = basis @ primal @ basis.T, basis @ inverse @ basis.T
            system = _schur(lifted, lifted_inverse)
            # Two weights make the constraints linearly dependent; the dual point stays feasible whatever the step.
            system[np.diag_indices(n + 1)] *= 1.0 + 1e-13
            direction = scipy.linalg.cho_solve(
                scipy.linalg.cho_factor(system), rhs - barrier * _constraints(lifted_inverse)
            )
            change_slack = -_adjoint(direction, basis)
            change = barrier * inverse - primal - primal @ change_slack @ inverse
            change = 0.5 * (change + change.T)
            step_primal, step_dual = _step(primal, change), _step(slack, change_slack)
        except (np.linalg.LinAlgError, ValueError):
            # The end of what float64 resolves; the last dual point is as valid as any.
            break
        primal = primal + step_primal * change
        duals = duals + step_dual * direction
        slack = reduced - _adjoint(duals, basis)
        slack = 0.5 * (slack + slack.T)
        point = (basis @ (primal @ basis[0]))[1:]
        if max(step_primal, step_dual) < 1e-5:
            break
    return Shift(2.0 * duals[1:], np.clip(point, 0.0, 1.0), float(duals[0]), iterations, converged)


def unit_of(quadratic: Array, linear: Array) -> float:
    """A power of two of the size of the largest entry: dividing by it is exact."""
    size = max(float(np.abs(np.diag(quadratic)).max(initial=0.0)), float(np.abs(linear).max(initial=0.0)))
    return float(2.0 ** np.floor(np.log2(size))) if size > 0.0 else 1.0


def safe_shift(quadratic: Array, diagonal: Array, slack: float = 0.0, *, whole_space: bool = False) -> Array:
    """`diagonal` (n,) lowered until Q − diag d is safely positive definite on 1^⊥, or on the whole space.

    `slack` is the smallest eigenvalue wanted beyond the rounding margin.
    """
    n = quadratic.shape[0]
    if n < 2 and not whole_space:
        return diagonal
    shifted = quadratic - np.diag(diagonal)
    if whole_space:
        values = scipy.linalg.eigvalsh(shifted)
    else:
        basis = _complement(np.ones(n))
        values = scipy.linalg.eigvalsh(basis.T @ shifted @ basis)
    # Backward error of the product and of the eigenvalues: a small multiple of n eps times the norm.
    norm = max(abs(float(values[0])), abs(float(values[-1])), float(np.abs(shifted).max()))
    margin = 8.0 * n * np.finfo(np.float64).eps * norm
    lowered = diagonal - max(0.0, slack + margin - float(values[0]))
    return np.asarray(lowered, dtype=np.float64)


def _complement(v: Array) -> Array:
    """Orthonormal basis, (n, n − 1), of the vectors orthogonal to v: the columns of a Householder reflection."""
    unit = v / np.linalg.norm(v)
    unit[0] += 1.0 if unit[0] >= 0 else -1.0
    reflection = np.eye(v.shape[0]) - np.outer(unit, unit) * (2.0 / float(unit @ unit))
    return np.ascontiguousarray(reflection[:, 1:])


def _adjoint(duals: Array, basis: Array) -> Array:
    """Uᵀ (y₀E₀₀ + Σ y_i A_i) U with A_i = e_ie_iᵀ − ½(e₀e_iᵀ + e_ie₀ᵀ)."""
    arrow = duals[1:]
    scaled = basis * duals[:, None]
    scaled[1:] -= 0.5 * arrow[:, None] * basis[0]
    scaled[0] -= 0.5 * (arrow @ basis[1:])
    out = basis.T @ scaled
    return np.asarray(0.5 * (out + out.T))


def _constraints(lifted: Array) -> Array:
    """(Y₀₀, Y_ii − Y₀i)."""
    return np.concatenate([lifted[:1, 0], np.diag(lifted)[1:] - lifted[0, 1:]])


def _schur(lifted: Array, inverse: Array) -> Array:
    """⟨A_i, Y A_j T⟩, with A_i = ½(e_i f_iᵀ + f_i e_iᵀ), f_i = e_i − e₀; (n + 1, n + 1)."""
    n = lifted.shape[0] - 1
    ee, te = lifted[1:, 1:], inverse[1:, 1:]
    ef, tf = ee - lifted[1:, :1], te - inverse[1:, :1]
    ff = ef - lifted[:1, 1:] + lifted[0, 0]
    tt = tf - inverse[:1, 1:] + inverse[0, 0]
    out = np.empty((n + 1, n + 1))
    out[1:, 1:] = 0.25 * (ee * tt + ff * te + ef * tf.T + ef.T * tf)
    e0, t0 = lifted[0, 1:], inverse[0, 1:]
    out[0, 1:] = 0.5 * (e0 * (t0 - inverse[0, 0]) + (e0 - lifted[0, 0]) * t0)
    out[1:, 0] = out[0, 1:]
    out[0, 0] = lifted[0, 0] * inverse[0, 0]
    return out


def _start(reduced: Array, basis: Array, n: int, count: int | None) -> tuple[Array, Array, Array]:
    """Strictly feasible: the mean of all (k-)subsets, and a shift far below the smallest eigenvalue."""
    p, both = 0.5, 0.25
    if count is not None:
        p = count / n
        both = count * (count - 1) / (n * (n - 1)) if n > 1 else p
    average = np.full((n + 1, n + 1), both)
    average[np.arange(1, n + 1), np.arange(1, n + 1)] = p
    average[0, 1:] = average[1:, 0] = p
    average[0, 0] = 1.0
    primal = basis.T @ average @ basis
    duals = np.zeros(n + 1)
    lowest = float(scipy.linalg.eigvalsh(reduced, subset_by_index=[0, 0])[0])
    duals[1:] = -(0.1 + max(0.0, -lowest))
    duals[0] = -1.0
    while True:
        slack = reduced - _adjoint(duals, basis)
        try:
            np.linalg.cholesky(slack)
        except np.linalg.LinAlgError:
            duals[0] *= 2.0
            continue
        return 0.5 * (primal + primal.T), duals, slack


def _step(matrix: Array, change: Array) -> float:
    """The longest step in (0, 1] that keeps matrix + step·change positive definite, with a margin."""
    factor = np.linalg.cholesky(matrix)
    inner = scipy.linalg.solve_triangular(factor, change, lower=True)
    inner = scipy.linalg.solve_triangular(factor, inner.T, lower=True)
    lowest = float(scipy.linalg.eigvalsh(0.5 * (inner + inner.T), subset_by_index=[0, 0])[0])
    return 1.0 if lowest > -_STEP else _STEP / -lowest
