"""Lagrangian decomposition of one budget over the blocks of a selection problem.

Only 1ᵀz = n_prune couples the blocks. With a multiplier θ for it,

    max over θ of  θ n_prune + Σ_b φ_b(θ),    φ_b(θ) ≤ min over z_b ∈ {0, 1} of ½ z_bᵀQ_bz_b − (c_b + θ)ᵀz_b ,

where each φ_b is the semidefinite bound of an unconstrained binary quadratic programme (`solvers.bounds.shift` without
the cardinality), so that every block has the diagonal shift that suits it at θ. The sum is concave in θ with slope
n_prune − Σ 1ᵀz_b(θ): θ is bisected. The certificate is θ with each block's shift and point.

References
----------
Geoffrion (1974), "Lagrangean relaxation for integer programming"; Billionnet, Elloumi & Plateau (2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from solvers.bounds.certificate import EPS, Bound, Certificate
from solvers.bounds.shift import best_shift, safe_shift, unit_of
from solvers.errors import CapabilityError
from solvers.problem import Array, SelectionProblem
from solvers.solver import Deadline

#: Largest block.
MAX_BLOCK = 600
_BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class LagrangianCertificate(Certificate):
    """θ, and a shift and a point for each block.

    Attributes
    ----------
    multiplier : float
    diagonals : tuple of float64 (n_b,)
    points : tuple of float64 (n_b,)
    """

    multiplier: float
    diagonals: tuple[Array, ...]
    points: tuple[Array, ...]

    def value(self, problem: SelectionProblem) -> float:
        """θ n_prune + the linearised bounds of the blocks over the box, less a rounding margin."""
        total = self.multiplier * problem.n_prune
        size = abs(total)
        for block, diagonal, z in zip(problem.blocks, self.diagonals, self.points, strict=True):
            quadratic, linear = block.arrays().selection_form
            d = safe_shift(quadratic, diagonal, whole_space=True)
            shifted = quadratic - np.diag(d)
            price = 0.5 * d - linear - self.multiplier
            slope = shifted @ z + price
            least = np.minimum(-slope * z, slope * (1.0 - z))
            total += 0.5 * float(z @ shifted @ z) + float(price @ z) + float(least.sum())
            size += float(z @ (np.abs(shifted) @ z) + np.abs(price).sum() + np.abs(least).sum())
            roots = np.sqrt(np.maximum(np.diag(quadratic), 0.0))
            size += float(roots @ z) * float(roots.sum())
        return total - 16.0 * EPS * size


def lagrangian_bound(problem: SelectionProblem, *, tolerance: float = 1e-4, time_limit: float | None = None) -> Bound:
    """The bound, each block's semidefinite programme solved to a relative duality gap of `tolerance`.

    Under a time limit every block gets its share of what is left. Raises CapabilityError for a block of more than
    `MAX_BLOCK` weights.
    """
    largest = max(block.n for block in problem.blocks)
    if largest > MAX_BLOCK:
        raise CapabilityError(
            f"the lagrangian bound takes blocks of at most {MAX_BLOCK} weights, the largest has {largest}; "
            "use smaller blocks or method='frank_wolfe'"
        )
    deadline = Deadline(time_limit)
    forms = [block.arrays().selection_form for block in problem.blocks]
    # Beyond these no block keeps, or removes, anything.
    reach = [np.abs(quadratic).sum(1) for quadratic, _ in forms]
    low = min(float((-linear - r).min()) for (_, linear), r in zip(forms, reach, strict=True))
    high = max(float((r - linear).max()) for (_, linear), r in zip(forms, reach, strict=True))
    best, best_value, steps, converged = None, -np.inf, 0, False
    while steps < _BISECTIONS and not (deadline.expired() and best is not None):
        steps += 1
        theta = 0.5 * (low + high)
        diagonals, points, hurried = [], [], False
        for (quadratic, linear), seconds in zip(forms, deadline.shares(len(forms)), strict=True):
            share = Deadline(None if math.isinf(seconds) else seconds)
            unit = unit_of(quadratic, linear + theta)
            shift = best_shift(
                quadratic / unit, (linear + theta) / unit, None, tolerance=tolerance, expired=share.expired
            )
            hurried |= share.expired()
            diagonals.append(unit * shift.diagonal)
            points.append(shift.point)
        candidate = LagrangianCertificate(theta, tuple(diagonals), tuple(points))
        value = candidate.value(problem)
        if value > best_value:
            best, best_value = candidate, value
        removed = sum(float(point.sum()) for point in points)
        if not hurried and abs(removed - problem.n_prune) <= 1e-3:
            converged = True
            break
        low, high = (theta, high) if removed < problem.n_prune else (low, theta)
    assert best is not None
    return Bound(best_value, "lagrangian", deadline.elapsed(), steps, best, converged)
