"""H = M + λI with M held as a matrix: for small blocks whose Hessian comes from somewhere else."""

from __future__ import annotations

from functools import cached_property

import torch

from solvers.arguments import real_tensor, ridge_of
from solvers.curvature.base import Curvature, Index
from solvers.errors import ProblemError
from solvers.linalg import cholesky, symmetric_root, triangular_inverse

#: An eigenvalue below zero by more than this, relative to the largest, is no rounding.
_INDEFINITE = 1e-9


class Dense(Curvature):
    """A symmetric positive semidefinite matrix with damping.

    Parameters
    ----------
    matrix : (n, n) tensor, float32 or float64
        M.
    damping : float ≥ 0
        λ.

    Raises
    ------
    ProblemError
        If it is not square, symmetric, or positive semidefinite (the last when its root is first needed).
    """

    def __init__(self, matrix: torch.Tensor, damping: float = 0.0) -> None:
        matrix, damping = real_tensor(matrix, "a dense curvature"), ridge_of(damping)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise ProblemError(f"a dense curvature must be a square matrix, not shape {tuple(matrix.shape)}")
        whole = matrix.double()
        skew = float((whole - whole.T).abs().max())
        if skew > 1e-6 * float(whole.abs().max()):
            raise ProblemError(f"a dense curvature must be symmetric; H − Hᵀ has an entry of {skew:.3g}")
        self.measured_part = 0.5 * (whole + whole.T)
        self._dtype, self.n, self.damping = matrix.dtype, int(matrix.shape[0]), damping
        self.matrix = self.measured_part.clone()
        self.matrix.diagonal().add_(self.damping)

    def __repr__(self) -> str:
        return f"Dense(n={self.n}, damping={self.damping:g}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def ridge(self) -> torch.Tensor:
        return torch.full((self.n,), self.damping, dtype=torch.float64, device=self.device)

    @cached_property
    def root(self) -> torch.Tensor:
        """F (rank, n) with FᵀF = M, float64; raises ProblemError where M is indefinite."""
        root = symmetric_root(self.measured_part)
        scale = self.measured_part.diagonal().clamp_min(0.0).sqrt()
        error = (root.T @ root - self.measured_part).abs()
        if bool((error > _INDEFINITE * (scale.unsqueeze(0) * scale.unsqueeze(1))).any()):
            raise ProblemError("a dense curvature must be positive semidefinite; this one has a negative eigenvalue")
        return root

    @cached_property
    def inverse(self) -> torch.Tensor:
        """H⁻¹ (n, n), float64; raises SingularHessianError."""
        return torch.cholesky_inverse(self.cholesky)

    @cached_property
    def inverse_root(self) -> torch.Tensor:
        """U upper triangular with UᵀU = H⁻¹, float64 (n, n); raises SingularHessianError.

        U = J L⁻¹ J where JHJ = LLᵀ and J turns the order of the weights round, so that no inverse is factorised.
        """
        factor = cholesky(self.matrix.flip(0, 1), f"H of {self.n} weights (damping {self.damping:g})")
        return triangular_inverse(factor).flip(0, 1)

    @property
    def rank(self) -> int:  # type: ignore[override]
        return int(self.root.shape[0])

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix @ x

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.root @ x

    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        return self.root.T @ z

    def factor_columns(self, index: torch.Tensor) -> torch.Tensor:
        return self.root.index_select(1, index)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        return self.matrix.diagonal().clone()

    def columns(self, index: Index) -> torch.Tensor:
        return self.matrix[:, self.index_of(index)]

    def submatrix(self, rows: Index, columns: Index) -> torch.Tensor:
        return self.matrix[self.index_of(rows)][:, self.index_of(columns)]

    def dense(self) -> torch.Tensor:
        return self.matrix.clone()

    def with_damping(self, damping: float) -> Dense:
        other = Dense(self.measured_part, damping)
        if "root" in self.__dict__:
            other.__dict__["root"] = self.root
        return other

    def select(self, index: torch.Tensor) -> Dense:
        return Dense(self.measured_part[index][:, index], self.damping)

    def digest_arrays(self) -> tuple[torch.Tensor, ...]:
        return (self.measured_part,)
