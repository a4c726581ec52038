"""The semidefinite (QCR) bound for selection problems of up to a few hundred weights.

The diagonal shift d of `solvers.bounds.shift`, optimal for the root, with the certificate of convexity: for any z with
1ᵀz = k and any d with Q − diag d ⪰ 0 on 1^⊥,

    f_d(z) + min over the capped simplex of ∇f_d(z)ᵀ(s − z),     f_d(z) = ½ zᵀ(Q − diag d)z + (½ d − c)ᵀz .

Verification takes d and z only: it recomputes Q, its smallest eigenvalue on 1^⊥ (lowering d where that is negative)
and the linearisation.

References
----------
Billionnet, Elloumi & Plateau (2009), "Improving the performance of standard solvers for quadratic 0-1 programs by a
tight convex reformulation: the QCR method".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.bounds.certificate import EPS, Bound, Certificate, smallest_sum
from solvers.bounds.shift import best_shift, safe_shift, unit_of
from solvers.errors import CapabilityError
from solvers.problem import Array, SelectionProblem
from solvers.solver import Deadline

#: An interior-point step costs about 60 n³ operations.
MAX_WEIGHTS = 1000


@dataclass(frozen=True, eq=False)
class ShiftCertificate(Certificate):
    """A diagonal shift and a point.

    Attributes
    ----------
    diagonal : float64 (n,)
    point : float64 (n,)
    """

    diagonal: Array
    point: Array

    def value(self, problem: SelectionProblem) -> float:
        """The linearisation of f_d at the point, minimised over the capped simplex, less a rounding margin."""
        quadratic, linear = problem.arrays().selection_form
        if not linear.any() and not quadratic.any():
            return 0.0
        d = safe_shift(quadratic, self.diagonal)
        z = self.point + (problem.n_prune - self.point.sum()) / problem.n
        shifted = quadratic - np.diag(d)
        constant_part = 0.5 * d - linear
        slope = shifted @ z + constant_part
        value = 0.5 * float(z @ shifted @ z) + float(constant_part @ z)
        size = float(np.abs(z) @ (np.abs(shifted) @ np.abs(z)) + np.abs(constant_part) @ np.abs(z))
        roots = np.sqrt(np.maximum(np.diag(quadratic), 0.0))
        size += float(np.sort(roots)[-problem.n_prune :].sum() if problem.n_prune else 0.0) * float(roots @ np.abs(z))
        least = smallest_sum(slope, problem.n_prune)
        bound = value - float(slope @ z) + least - 16.0 * EPS * (size + abs(least))
        return bound if linear.any() else max(bound, 0.0)


def qcr_bound(problem: SelectionProblem, *, tolerance: float = 1e-6, time_limit: float | None = None) -> Bound:
    """The bound to a relative duality gap of `tolerance`; raises CapabilityError beyond `MAX_WEIGHTS` weights."""
    if problem.n > MAX_WEIGHTS:
        raise CapabilityError(
            f"the qcr bound takes at most {MAX_WEIGHTS} weights, the problem has {problem.n}; use "
            "method='frank_wolfe', or 'lagrangian' for several blocks"
        )
    deadline = Deadline(time_limit)
    quadratic, linear = problem.arrays().selection_form
    unit = unit_of(quadratic, linear)
    # An iteration begun, and the certificate, take as long at least.
    spare = 5e-10 * problem.n**3
    shift = best_shift(
        quadratic / unit,
        linear / unit,
        problem.n_prune,
        tolerance=tolerance,
        expired=lambda: deadline.remaining() <= spare,
    )
    certificate = ShiftCertificate(unit * shift.diagonal, shift.point)
    return Bound(certificate.value(problem), "qcr", deadline.elapsed(), shift.iterations, certificate, shift.converged)
