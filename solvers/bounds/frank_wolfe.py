"""The convex relaxation of a selection problem of any size, matrix-free, with a dual certificate.

With B = F diag(w), F the factor of the factored view (`solvers.curvature.base`; A for a low-rank block) and λ its
ridge, z ∈ {0, 1}ⁿ the removed weights and z_i² = z_i, CBS-S is

    min ½ ‖Bz‖² + qᵀz,   1ᵀz = n_prune,      q_i = ½ λ w_i² − g_i w_i :

the damping, being diagonal, becomes linear and costs nothing in the relaxation to 0 ≤ z ≤ 1. For any u ∈ Rʳ,
½ ‖Bz‖² ≥ uᵀBz − ½ ‖u‖², hence the bound of Frank and Wolfe's linearisation at Bz = u,

    bound(u) = −½ ‖u‖² + sum of the n_prune smallest entries of Bᵀu + q ,

and u, r numbers, is the whole certificate. It is maximised by a proximal-point method, z⁺ minimising ½‖Bz‖² + qᵀz +
‖z − z_t‖²/(2σ), whose dual in u is smooth; semismooth Newton steps on it solve the r × r system
I + σ B_F (I − 11ᵀ/|F|) B_Fᵀ, F the weights strictly between their bounds, one system per component and the mean over
F by Sherman–Morrison. One step costs r²|F| and two products with A.

With r ≪ n and many weights to remove, convex combinations cancel one another nearly perfectly: the relaxation is then
close to Σ q and says little. That is the relaxation's weakness, not the solver's.

References
----------
Frank & Wolfe (1956); Li, Sun & Toh (2018), "A highly efficient semismooth Newton augmented Lagrangian method for
solving lasso problems", SIAM J. Optim. 28(1).
"""

from __future__ import annotations

import math

import numpy as np
import scipy

from solvers.arrays import Array, Index
from solvers.bounds.certificate import EPS, Bound, ImageCertificate, smallest_sum
from solvers.factored import FactoredView
from solvers.problem import SelectionProblem
from solvers.solver import Deadline

_NEWTON_STEPS = 30
_COLUMNS = 4096


class ResidualCertificate(ImageCertificate):
    """u, for the selection objective."""

    def value(self, problem: SelectionProblem) -> float:
        """−½ ‖u‖² + the sum of the n_prune smallest entries of Bᵀu + q, less a rounding margin."""
        total, costs, size = 0.0, [], 0.0
        for u, pulled, weights, gradient, ridge, norms in self.terms(problem):
            square = 0.5 * float(u @ u)
            # |a_i·u| is computed to within a few units in the last place of ‖a_i‖‖u‖ (pairwise sums).
            worst = np.partition(np.abs(weights) * norms, max(0, weights.size - problem.n_prune))
            size += 16.0 * float(worst[-problem.n_prune :].sum()) * math.sqrt(2.0 * square) + square * u.size
            costs.append(weights * pulled + 0.5 * ridge * weights**2 - gradient * weights)
            total -= square
        least = smallest_sum(np.concatenate(costs), problem.n_prune)
        return total + least - EPS * (size + 64.0 * abs(least))


def frank_wolfe_bound(
    problem: SelectionProblem, *, tolerance: float = 1e-3, time_limit: float | None = None, max_iterations: int = 60
) -> Bound:
    """The bound of the convex relaxation, to a relative gap of `tolerance` to the relaxation's own optimum.

    It is valid whenever the time or the number of proximal-point steps ends the search.
    """
    deadline = Deadline(time_limit)
    relaxation = _Relaxation(problem)
    diagonal = (problem.diagonal - relaxation.ridge) * problem.weights**2
    z = np.full(problem.n, problem.n_prune / problem.n)
    u = relaxation.image(z)
    # u = 0 proves the sum of the smallest q, positive without a gradient.
    best_u = np.zeros_like(u)
    best = relaxation.dual(best_u)
    size = float(diagonal.mean())
    # Without interactions the relaxation is linear, and u = 0 its dual optimum; far below the costs, as good as.
    linear = size <= max(1e-200, 1e-16 * float(np.abs(relaxation.cost).max()))
    sigma = 10.0 if linear else 10.0 / size
    iterations, converged = 0, linear
    while not linear and iterations < max_iterations and not deadline.expired():
        iterations += 1
        z, u = relaxation.proximal_step(z, u, sigma, deadline)
        image = relaxation.image(z)
        primal = 0.5 * float(np.vdot(image, image)) + float(relaxation.cost @ z)
        for candidate in (u, image):
            value = relaxation.dual(candidate)
            if value > best:
                best_u, best = candidate, value
        if primal - best <= tolerance * abs(primal):
            converged = True
            break
        sigma *= 4.0
    certificate = ResidualCertificate(relaxation.split(best_u))
    return Bound(certificate.value(problem), "frank_wolfe", deadline.elapsed(), iterations, certificate, converged)


class _Relaxation(FactoredView):
    """min ½‖Bz‖² + qᵀz over the capped simplex; points u of the image space have one row per component."""

    def __init__(self, problem: SelectionProblem) -> None:
        super().__init__(problem)
        self.cost: Array = 0.5 * self.ridge * self.weights**2 - self.linear

    def image(self, z: Array) -> Array:
        """B z."""
        return self.project(self.weights * z)

    def slope(self, u: Array) -> Array:
        """Bᵀu + q."""
        return self.weights * self.back_project(u) + self.cost

    def dual(self, u: Array) -> float:
        """bound(u)."""
        return -0.5 * float(np.vdot(u, u)) + smallest_sum(self.slope(u), self.problem.n_prune)

    def proximal_step(self, anchor: Array, u: Array, sigma: float, deadline: Deadline) -> tuple[Array, Array]:
        """argmin ½‖Bz‖² + qᵀz + ‖z − anchor‖²/(2σ) and its dual point, by semismooth Newton."""
        smooth, z = self._smooth_dual(u, anchor, sigma)
        for _ in range(_NEWTON_STEPS):
            residual = self.image(z) - u
            if float(np.linalg.norm(residual)) <= 1e-6 * (float(np.linalg.norm(u)) + 1e-300) or deadline.expired():
                break
            direction = self._newton(residual, np.flatnonzero((z > 0.0) & (z < 1.0)), sigma)
            slope, step = float(np.vdot(residual, direction)), 1.0
            while step > 1e-6:
                trial, trial_z = self._smooth_dual(u + step * direction, anchor, sigma)
                if trial >= smooth + 1e-4 * step * slope:
                    break
                step *= 0.5
            else:
                break
            u, smooth, z = u + step * direction, trial, trial_z
        return z, u

    def _smooth_dual(self, u: Array, anchor: Array, sigma: float) -> tuple[float, Array]:
        slope = self.slope(u)
        z = project_capped_simplex(anchor - sigma * slope, self.problem.n_prune)
        step = z - anchor
        return -0.5 * float(np.vdot(u, u)) + float(slope @ z) + 0.5 / sigma * float(step @ step), z

    def _newton(self, residual: Array, free: Index, sigma: float) -> Array:
        """[I + σ B_F (I − 11ᵀ/|F|) B_Fᵀ]⁻¹ residual."""
        if free.size < 2:
            return residual
        x, y, b = residual.copy(), np.zeros_like(residual), np.zeros_like(residual)
        owner = self.component_of[free]
        for c in np.unique(owner):
            kernel = np.eye(self.rows)
            inside = free[slice(*np.searchsorted(owner, (c, c + 1)))]
            for index in np.split(inside, range(_COLUMNS, inside.size, _COLUMNS)):
                columns = self.columns(index) * self.weights[index, None]
                kernel += sigma * (columns.T @ columns)
                b[c] += columns.sum(0)
            factor = scipy.linalg.cho_factor(kernel, overwrite_a=True, check_finite=False)
            x[c], y[c] = scipy.linalg.cho_solve(factor, residual[c]), scipy.linalg.cho_solve(factor, b[c])
        # Sherman–Morrison for the mean over F, which couples the components.
        ratio = sigma / free.size
        bottom = 1.0 - ratio * float(np.vdot(b, y))
        return x if bottom <= 1e-12 else x + y * (ratio * float(np.vdot(b, x)) / bottom)


def project_capped_simplex(x: Array, count: int) -> Array:
    """The nearest point with 0 ≤ z ≤ 1 and 1ᵀz = count; x float64 (n,), exact up to rounding."""
    # Σ clip(x − t, 0, 1) falls from n to 0 in between; what is missing is spread over the last piece.
    low, high = float(x.min() - max(2.0, 4.0 * np.spacing(np.abs(x).max()))), float(x.max())
    t = scipy.optimize.brentq(
        lambda t: float(np.clip(x - t, 0.0, 1.0).sum()) - count, low, high, xtol=1e-14, maxiter=200, disp=False
    )
    z = np.clip(x - t, 0.0, 1.0)
    inside = (z > 0.0) & (z < 1.0)
    if inside.any():
        z[inside] = np.clip(z[inside] + (count - z.sum()) / inside.sum(), 0.0, 1.0)
    return np.asarray(z)
