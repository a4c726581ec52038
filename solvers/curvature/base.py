"""What a curvature is: the matrix H of a block, symmetric and positive semidefinite, as an operator.

Every kind answers the same questions — products, diagonal, columns, solves, solves on a kept set — in the way that is
cheap for it, and keeps what is expensive (factorisations) for all masks and sparsities. Arrays stay on the curvature's
device; products take and return float64.

Algorithms that need inner structure use the *factored view*, which every kind has:

    H_ij = f_i · f_j + ridge_i δ_ij    for weights of one component, and 0 across components,

with vectors f_i of `rank` numbers. `LowRank` is one component with f_i the columns of A and ridge λ; a `Kronecker`
curvature has one component per row of its layer; a diagonal one has rank 0.

A new kind is one file: derive from `Curvature`, implement what is abstract, and test it with
`solvers.testing.check_curvature`, which holds it to its dense float64 twin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch

from solvers.curvature.restricted import DenseRestricted, Restricted
from solvers.linalg import Apply, cholesky_solve, inverse_diagonal_of, strict_cholesky

Index = torch.Tensor | npt.NDArray[Any]


class Curvature(ABC):
    """H of a block of n weights.

    Attributes
    ----------
    n : int
        Number of weights.
    damping : float ≥ 0
        λ, what was added to the diagonal of what was measured.
    n_components, rank : int
        Of the factored view.
    """

    n: int
    damping: float = 0.0
    n_components: int = 1
    rank: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the arrays lie."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the arrays as stored; results are float64."""

    @abstractmethod
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """H x for x of shape (n,) or (n, m), float64."""

    @abstractmethod
    def project(self, x: torch.Tensor) -> torch.Tensor:
        """F x, component after component, float64 (n_components·rank,) or (…, m) for x (n,) or (n, m)."""

    @abstractmethod
    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        """Fᵀ z, float64 (n,) or (n, m) for z (n_components·rank,) or (…, m)."""

    @abstractmethod
    def factor_columns(self, index: torch.Tensor) -> torch.Tensor:
        """f_i for the weights `index` (m,), as columns (rank, m), in the stored dtype or float64."""

    @property
    @abstractmethod
    def ridge(self) -> torch.Tensor:
        """The diagonal part, float64 (n,)."""

    @abstractmethod
    def with_damping(self, damping: float) -> Curvature:
        """The same measurement with another λ; what does not depend on λ is shared."""

    @abstractmethod
    def select(self, index: torch.Tensor) -> Curvature:
        """The curvature of the weights `index` (m,) alone, ``H[index][:, index]``, of a kind that is cheap for it."""

    @abstractmethod
    def digest_arrays(self) -> tuple[torch.Tensor, ...]:
        """The arrays that define H, for digests and copies."""

    # -- derived; kinds override what they can do better ---------------------------------------------------------------

    @property
    def measured(self) -> bool:
        """Whether there is an H at all; False for `Unmeasured` alone."""
        return True

    def index_of(self, index: Index) -> torch.Tensor:
        """Positions (m,) or a mask (n,) as positions on the curvature's device."""
        chosen = torch.as_tensor(index, device=self.device)
        return chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen

    def component_of(self, index: torch.Tensor) -> torch.Tensor:
        """The component of each of the weights `index` (m,), int64 (m,); components are consecutive, of equal size."""
        return torch.div(index, self.n // self.n_components, rounding_mode="floor")

    def split(self) -> list[Curvature]:
        """One curvature per component, in order; what they share is not copied."""
        if self.n_components == 1:
            return [self]
        raise NotImplementedError(f"{type(self).__name__} has several components and must say how to split them")

    def quadratic(self, x: torch.Tensor) -> torch.Tensor:
        """½ xᵀHx for x of shape (n,), a float64 scalar; a sum of squares, so never negative."""
        return 0.5 * self.project(x).square().sum() + 0.5 * (self.ridge * x.square()).sum()

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """H_ii, float64 (n,)."""
        parts = torch.split(torch.arange(self.n, device=self.device), 4096)
        return torch.cat([self.factor_columns(part).double().square().sum(0) for part in parts]) + self.ridge

    def columns(self, index: Index) -> torch.Tensor:
        """H[:, index], float64 (n, m)."""
        chosen = self.index_of(index)
        unit = torch.zeros((self.n, chosen.numel()), dtype=torch.float64, device=self.device)
        unit[chosen, torch.arange(chosen.numel(), device=self.device)] = 1.0
        return self.multiply(unit)

    def submatrix(self, rows: Index, columns: Index) -> torch.Tensor:
        """``H[rows][:, columns]``, float64 (m, k)."""
        first, second = self.index_of(rows), self.index_of(columns)
        left = self.factor_columns(first).double()
        product = left.T @ (left if columns is rows else self.factor_columns(second).double())
        if self.n_components > 1:
            product[self.component_of(first).unsqueeze(1) != self.component_of(second)] = 0.0
        same = first.unsqueeze(1) == second
        return torch.where(same, product + self.ridge[first].unsqueeze(1), product)

    def dense(self) -> torch.Tensor:
        """H, float64 (n, n); for small n."""
        everything = torch.arange(self.n, device=self.device)
        return self.submatrix(everything, everything)

    @cached_property
    def cholesky(self) -> torch.Tensor:
        """Lower Cholesky factor of the dense H, float64 (n, n); raises SingularHessianError."""
        return strict_cholesky(self.dense(), f"H of {self.n} weights (damping {self.damping:g})")

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """H⁻¹ x for x of shape (n,) or (n, m), float64; raises SingularHessianError."""
        return cholesky_solve(self.cholesky, x)

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        """diag(H⁻¹), float64 (n,); raises SingularHessianError."""
        return inverse_diagonal_of(self.cholesky)

    def shifted_inverse(self, ridge: torch.Tensor) -> Apply:
        """x ↦ (H + diag(ridge))⁻¹ x for x and ridge ≥ 0 (n,); raises SingularHessianError."""
        shifted = self.dense()
        shifted.diagonal().add_(ridge)
        factor = strict_cholesky(shifted, "H + ridge")
        return lambda x: cholesky_solve(factor, x)

    def penalised(self, metric: torch.Tensor) -> Callable[[float], Apply]:
        """ρ ↦ (x ↦ (D⁻¹HD⁻¹ + ρI)⁻¹x), D = diag(metric), for vectors (n,) of the metric's dtype and ρ > 0.

        What does not depend on ρ is done once. Raises SingularHessianError.
        """
        wide = metric.double()

        def at(penalty: float) -> Apply:
            inverse = self.shifted_inverse(penalty * wide.square())
            return lambda x: (wide * inverse(wide * x.double())).to(metric.dtype)

        return at

    def restrict(self, kept: torch.Tensor) -> Restricted:
        """H_SS for the kept weights, a bool mask (n,), ready to be multiplied with and solved."""
        index = kept.nonzero().squeeze(1)
        return DenseRestricted(self.submatrix(index, index), index)
