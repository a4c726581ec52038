"""The diagonal that makes the perspective relaxation of the joint objective as tight as it can be.

For any D = diag(d) ≥ 0 with S = H − D ⪰ 0 the joint objective with n_kept survivors is at least

    φ(D) = min over v, y ∈ [0, 1]ⁿ, Σ y = n_kept of  ½ (v−c)ᵀS(v−c) + ½ Σ d_i (v_i²/y_i − 2 c_i v_i + c_i²).

Dualising the coordinates, −½ y_i β_i²/d_i = min_v ½ d_i v²/y_i − β_i v, gives with r = Hc − β

    φ(D) = max over β of  ½ cᵀHc − ½ rᵀS⁻¹r − ½ (sum of the n_kept largest β_i²/d_i),

which is jointly concave in (β, d). It is maximised here over both, by a primal barrier method in 2n + 1 variables

    minimise  M [½ rᵀS⁻¹r + ½ n_kept τ + ½ Σ u_i] − log det S − Σ log u_i − Σ log(d_i (u_i + τ) − β_i²)

with u eliminated. This is the dual of the semidefinite relaxation (Zheng, Sun & Li, INFORMS J. Comput. 2014; Dong, Chen
& Linderoth, 2015) at O(n³) per Newton step. Any d it stops at is valid; accuracy only makes the bound tighter.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import scipy

from solvers.problem import Array
from solvers.solver import Deadline

_GROWTH = 6.0
_RELATIVE_GAP = 2e-3
_MAX_NEWTON = 400


def optimal_diagonal(
    hessian: Array, centre: Array, n_kept: int, unit: float, deadline: Deadline | None = None
) -> tuple[Array, float]:
    """The best diagonal to split off, and the root bound it gives.

    Parameters
    ----------
    hessian : float64 (n, n), positive definite
    centre : float64 (n,)
        c, the unconstrained minimiser.
    n_kept : int
    unit : float > 0
        Size of the objective that matters (an incumbent's value); the barrier stops at 2e-3 of it.
    deadline : Deadline, optional
        Stop early, with a valid but weaker diagonal.

    Returns
    -------
    d : float64 (n,)
        H − diag(d) is positive definite to rounding.
    bound : float
        φ(d) as the barrier method saw it: not safe, for choosing between diagonals only.

    Raises
    ------
    numpy.linalg.LinAlgError
        If H is not positive definite to rounding.
    """
    n = centre.shape[0]
    norms = np.sqrt(np.diag(hessian))
    scaled = hessian / np.outer(norms, norms)
    target = scaled @ (centre * norms) / np.sqrt(unit)
    value = float((centre * norms / np.sqrt(unit)) @ target)
    smallest = float(np.linalg.eigvalsh(scaled)[0])
    if smallest <= 0:
        raise np.linalg.LinAlgError("H is not positive definite")
    state = _State(scaled, target, float(n_kept))
    d = np.full(n, 0.5 * smallest)
    beta = 0.5 * smallest * np.linalg.solve(scaled, target)
    tau = float(np.max(beta**2 / d)) + 1.0
    u = np.ones(n)
    multiplier = 1.0 / max(value, 1.0)
    steps = 0
    # Where rounding leaves no Newton step any more, the last point serves: it is inside the domain like all before it.
    with suppress(np.linalg.LinAlgError):
        while steps < _MAX_NEWTON and (deadline is None or not deadline.expired()):
            for _ in range(30):
                steps += 1
                moved, d, beta, tau, u, decrement = state.newton(multiplier, d, beta, tau, u)
                if not moved or decrement < 1e-2 or (deadline is not None and deadline.expired()):
                    break
            if 4 * n / multiplier < _RELATIVE_GAP:
                break
            multiplier *= _GROWTH
    bound = 0.5 * value - state.objective(d, beta, tau, u)
    return d * norms**2 * (1 - 1e-9), bound * unit


class _State:
    """The barrier function of one problem in units where diag(H) = 1."""

    def __init__(self, hessian: Array, target: Array, n_kept: float) -> None:
        self.hessian, self.target, self.n_kept = hessian, target, n_kept

    def objective(self, d: Array, beta: Array, tau: float, u: Array) -> float:
        """½ rᵀS⁻¹r + ½ n_kept τ + ½ Σ u."""
        residual = self.target - beta
        solved = np.linalg.solve(self.hessian - np.diag(d), residual)
        return float(0.5 * residual @ solved + 0.5 * self.n_kept * tau + 0.5 * u.sum())

    def _merit(self, multiplier: float, d: Array, beta: Array, tau: float, u: Array) -> float:
        """The barrier function; inf outside its domain."""
        cone = d * (u + tau) - beta**2
        if u.min() <= 0 or d.min() <= 0 or cone.min() <= 0:
            return np.inf
        try:
            factor = np.linalg.cholesky(self.hessian - np.diag(d))
        except np.linalg.LinAlgError:
            return np.inf
        half = scipy.linalg.solve_triangular(factor, self.target - beta, lower=True, check_finite=False)
        value = 0.5 * half @ half + 0.5 * self.n_kept * tau + 0.5 * u.sum()
        barrier = 2 * np.log(np.diag(factor)).sum() + np.log(u).sum() + np.log(cone).sum()
        return float(multiplier * value - barrier)

    def newton(
        self, multiplier: float, d: Array, beta: Array, tau: float, u: Array
    ) -> tuple[bool, Array, Array, float, Array, float]:
        """One damped Newton step; (moved, d, β, τ, u, squared Newton decrement)."""
        n = d.shape[0]
        inverse = np.linalg.inv(self.hessian - np.diag(d))
        s = inverse @ (self.target - beta)
        t = u + tau
        cone = d * t - beta**2
        # −log(dt − β²): gradient −(t, −2β, d)/cone in (d, β, t).
        gd, gb, gt = -t / cone, 2 * beta / cone, -d / cone
        hdd, hbb, htt = t**2 / cone**2, 2 / cone + gb**2, d**2 / cone**2
        hdb, hbt, hdt = -2 * beta * t / cone**2, -2 * beta * d / cone**2, beta**2 / cone**2
        grad_d = multiplier * 0.5 * s**2 + np.diag(inverse) + gd
        grad_b = -multiplier * s + gb
        grad_u = 0.5 * multiplier - 1 / u + gt
        grad_t = 0.5 * multiplier * self.n_kept + float(gt.sum())
        huu = htt + 1 / u**2
        system = np.zeros((2 * n + 1, 2 * n + 1))
        system[:n, :n] = multiplier * np.outer(s, s) * inverse + inverse**2
        system[n : 2 * n, n : 2 * n] = multiplier * inverse
        system[n : 2 * n, :n] = -multiplier * inverse * s
        system[:n, n : 2 * n] = system[n : 2 * n, :n].T
        index = np.arange(n)
        system[index, index] += hdd - hdt**2 / huu
        system[n + index, n + index] += hbb - hbt**2 / huu
        system[index, n + index] += hdb - hdt * hbt / huu
        system[n + index, index] += hdb - hdt * hbt / huu
        system[2 * n, :n] = system[:n, 2 * n] = hdt - hdt * htt / huu
        system[2 * n, n : 2 * n] = system[n : 2 * n, 2 * n] = hbt - hbt * htt / huu
        system[2 * n, 2 * n] = float((htt - htt**2 / huu).sum())
        right = -np.concatenate(
            [grad_d - hdt / huu * grad_u, grad_b - hbt / huu * grad_u, [grad_t - float((htt / huu * grad_u).sum())]]
        )
        step = np.linalg.solve(system, right)
        dd, db, dt = step[:n], step[n : 2 * n], float(step[2 * n])
        du = -(grad_u + hdt * dd + hbt * db + htt * dt) / huu
        slope = float(grad_d @ dd + grad_b @ db + grad_t * dt + grad_u @ du)
        now = self._merit(multiplier, d, beta, tau, u)
        length = 1.0
        for _ in range(50):
            new = (d + length * dd, beta + length * db, tau + length * dt, u + length * du)
            if self._merit(multiplier, *new) <= now + 1e-2 * length * slope:
                return True, *new, -slope
            length *= 0.6
        return False, d, beta, tau, u, -slope
