"""The perspective bound of the joint objective, at any size, from the damping alone.

With u = v − w, CBS is min over u of gᵀu + ½‖Au‖² + ½λ‖u‖² with u_P = −w_P. For any y ∈ Rʳ, ½‖Au‖² ≥ yᵀAu − ½‖y‖²; what
remains separates over the weights. With s = g + Aᵀy a kept weight contributes min over u_i of s_iu_i + ½λu_i² =
−s_i²/(2λ), a removed one −s_iw_i + ½λw_i², which is (λw_i − s_i)²/(2λ) more. Hence for every y

    bound(y) = −½‖y‖² − Σ s_i²/(2λ) + sum of the n_prune smallest (λw_i − s_i)²/(2λ) ,

the dual of the perspective relaxation of λ‖u‖², and y is the certificate. (λ may differ from weight to weight: it is
the ridge of the factored view, whatever the curvature.) Here it is maximised by alternation: z, the relaxed choice,
moves towards the n_prune cheapest weights with Frank–Wolfe steps, and y towards its best reply, the solution of
(I + A diag((1 − z)/λ) Aᵀ) y = −A((1 − z) g/λ + z∘w), by conjugate gradients.

For λ ≪ ‖A‖² the bound is weak; for n up to a few hundred `branch_bound` or an optimal diagonal does far better.

References
----------
Günlük & Linderoth (2010), "Perspective reformulations of mixed integer nonlinear programs with indicator variables";
Hazimeh, Mazumder & Saab (2022), "Sparse regression at scale".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from solvers.bounds.certificate import EPS, Bound, ImageCertificate, smallest_sum
from solvers.errors import CapabilityError
from solvers.factored import FactoredView
from solvers.problem import Array, SelectionProblem
from solvers.solver import Deadline

_CONJUGATE_STEPS = 30


class PerspectiveCertificate(ImageCertificate):
    """y, for the joint objective."""

    def value(self, problem: SelectionProblem) -> float:
        """bound(y), less a rounding margin."""
        total, costs = 0.0, []
        for y, pulled, weights, gradient, ridge, norms in self.terms(problem):
            slope = pulled + gradient
            # Rounding of s_i: a few units in the last place of ‖a_i‖‖y‖.
            error = 16.0 * EPS * (norms * float(np.linalg.norm(y)) + np.abs(slope))
            half = 0.5 / ridge
            kept = half * (np.abs(slope) + error) ** 2
            distance = np.abs(ridge * weights - slope)
            removed = half * np.maximum(0.0, distance - error - EPS * ridge * np.abs(weights)) ** 2
            total -= 0.5 * float(y @ y) + float(kept.sum())
            costs.append(removed)
        least = smallest_sum(np.concatenate(costs), problem.n_prune)
        return total + least - 64.0 * EPS * (least - total)


def perspective_bound(
    problem: SelectionProblem, *, tolerance: float = 1e-3, time_limit: float | None = None, max_iterations: int = 200
) -> Bound:
    """The perspective bound of the joint objective; parameters as `frank_wolfe_bound`'s.

    Raises
    ------
    CapabilityError
        If a block has no damping: the relaxation then bounds nothing.
    """
    view = FactoredView(problem)
    damping, weights = view.ridge, view.weights
    gradient = np.zeros(problem.n) if problem.gradient is None else problem.gradient
    if not damping.all():
        raise CapabilityError(
            "the bound of the joint objective comes from the damping, and a block has damping=0; pass a positive one"
        )
    deadline = Deadline(time_limit)

    def dual(y: Array) -> tuple[float, Array]:
        slope = gradient + view.back_project(y)
        costs = 0.5 * (damping * weights - slope) ** 2 / damping
        value = -0.5 * float(np.vdot(y, y)) - float((0.5 * slope**2 / damping).sum())
        return value + smallest_sum(costs, problem.n_prune), costs

    z = np.full(problem.n, problem.n_prune / problem.n)
    y = np.zeros((view.n_components, view.rows))
    best_y, (best, costs) = y, dual(y)
    iterations, converged = 0, False
    while iterations < max_iterations and not deadline.expired():
        iterations += 1
        scaling = (1.0 - z) / damping
        right = -view.project(scaling * gradient + z * weights)

        def system(x: Array, by: Array = scaling) -> Array:
            return x + view.project(by * view.back_project(x))

        y = _conjugate_gradients(system, right, y, deadline)
        value, costs = dual(y)
        if value > best:
            best_y, best = y, value
        vertex = np.zeros(problem.n)
        vertex[np.argsort(costs, kind="stable")[: problem.n_prune]] = 1.0
        # At y's best reply to z the two values differ by the Frank–Wolfe gap.
        if float(costs @ (z - vertex)) <= tolerance * abs(best):
            converged = True
            break
        z = z + (2.0 / (iterations + 2.0)) * (vertex - z)
    certificate = PerspectiveCertificate(view.split(best_y))
    return Bound(certificate.value(problem), "frank_wolfe", deadline.elapsed(), iterations, certificate, converged)


def _conjugate_gradients(operator: Callable[[Array], Array], right: Array, x: Array, deadline: Deadline) -> Array:
    """A few steps on operator(x) = right from x; inexactness costs tightness only."""
    residual = right - operator(x)
    direction, square = residual, float(np.vdot(residual, residual))
    goal = 1e-6 * float(np.vdot(right, right))
    for _ in range(_CONJUGATE_STEPS):
        if square <= goal or deadline.expired():
            break
        image = operator(direction)
        step = square / float(np.vdot(direction, image))
        x, residual = x + step * direction, residual - step * image
        square, before = float(np.vdot(residual, residual)), square
        direction = residual + (square / before) * direction
    return x
