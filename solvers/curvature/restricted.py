"""H_SS of a kept set S: products, solves and the diagonal of its inverse.

Every solve is finished by preconditioned conjugate gradients on the true system until its residual is at the level of
float64, so that all ways of factorising agree. Where H_SS is singular to float64 the minimum-norm solution is taken
and said to be a repair, or None is returned where the right-hand side leaves the range and there is no solution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from solvers.linalg import (
    Apply,
    cholesky_solve,
    conjugate_gradients,
    inverse_diagonal_of,
    relative_pivots,
    strict_cholesky,
)

#: Up to this size a matrix is factorised in float64; beyond it a float32 factor preconditions CG, which is faster and,
#: polished, as accurate. Where float32 cannot hold the matrix, float64 is used up to the second size.
DOUBLE_LIMIT = 4000
DIRECT_LIMIT = 20000
#: A relative pivot of this size and less means singular to float64.
PIVOT_FLOOR = 1e-15
#: A component of the right-hand side outside the range of H_SS, relative, that counts as none.
INSIDE = 1e-6


@dataclass(frozen=True, eq=False)
class Solved:
    """H_SS x = right.

    Attributes
    ----------
    x : float64 (s,) or None
        None where there is no solution: H_SS is singular and the right-hand side leaves its range.
    method : str
        Which factorisation.
    residual : float
        ‖H_SS x − right‖ / ‖right‖; of the part outside the range where x is None.
    repair : str
        What was done otherwise than a plain solve, in words; empty if nothing was.
    """

    x: torch.Tensor | None
    method: str
    residual: float
    repair: str = ""


class Restricted(ABC):
    """H_SS as an operator.

    Attributes
    ----------
    kept : int64 (s,)
        Positions of S.
    """

    kept: torch.Tensor

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """H_SS x for x of shape (s,), float64."""

    @abstractmethod
    def solve(self, right: torch.Tensor) -> Solved:
        """Solve for one right-hand side (s,); raises SingularHessianError where float64 fails altogether."""

    def inverse_diagonal(self) -> torch.Tensor:
        """diag(H_SS⁻¹), float64 (s,); raises SingularHessianError."""
        identity = torch.eye(self.kept.numel(), dtype=torch.float64, device=self.kept.device)
        matrix = torch.stack([self.multiply(row) for row in identity])
        return inverse_diagonal_of(strict_cholesky(matrix, "H of the kept weights"))


class FactorisedRestricted(Restricted):
    """One that is solved by a factorisation, polished by conjugate gradients."""

    @abstractmethod
    def factorise(self) -> tuple[str, Apply | None]:
        """(method, x ↦ H_SS⁻¹x up to rounding); None where H_SS is singular to float64."""

    @abstractmethod
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(eigenvalues (q,), eigenvectors (s, q), eigenvalue of the complement) of H_SS where it is singular."""

    def solve(self, right: torch.Tensor) -> Solved:
        if self.kept.numel() == 0 or not bool(right.any()):
            return Solved(torch.zeros_like(right), "none", 0.0)
        method, precondition = self.factorise()
        if precondition is None:
            return self._minimum_norm(right, method)
        x, residual = conjugate_gradients(self.multiply, right, precondition)
        repair = "" if residual < 1e-8 else f"CBS-U stopped at relative residual {residual:.1e}"
        return Solved(x, method, residual, repair)

    def _minimum_norm(self, right: torch.Tensor, method: str) -> Solved:
        values, basis, complement = self.spectrum()
        coordinates = basis.T @ right
        outside = right - basis @ coordinates
        norm = float(right.norm())
        share = float(outside.norm()) / norm
        x = basis @ (coordinates / values)
        # With damping the complement of the range is λI; without it, a component there is unbounded descent.
        if complement > 0.0 and share > 1e-9:
            x = x + outside / complement
        elif share > INSIDE:
            return Solved(
                None,
                method,
                share,
                "H of the kept weights is singular and the gradient leaves its range, so the refit objective is "
                "unbounded below; use a larger damping",
            )
        residual = float((self.multiply(x) - right).norm()) / norm
        return Solved(
            x,
            method,
            residual,
            f"H of the kept weights is singular to float64 (rank {values.numel()} of {self.kept.numel()}); "
            "the minimum-norm update was taken",
        )


class DenseRestricted(FactorisedRestricted):
    """H_SS held as a matrix (s, s), for kinds without a cheaper form."""

    def __init__(self, matrix: torch.Tensor, kept: torch.Tensor) -> None:
        self.matrix, self.kept = matrix, kept

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix @ x

    def factorise(self) -> tuple[str, Apply | None]:
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if int(info) != 0 or not bool((relative_pivots(factor, self.matrix) > PIVOT_FLOOR).all()):
            return "minimum norm", None
        return "primal", lambda x: cholesky_solve(factor, x)

    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        values, vectors = torch.linalg.eigh(self.matrix)
        kept = values > self.kept.numel() * 2.3e-16 * values[-1]
        return values[kept], vectors[:, kept], 0.0

    def inverse_diagonal(self) -> torch.Tensor:
        return inverse_diagonal_of(strict_cholesky(self.matrix, f"H of {self.kept.numel()} kept weights"))
