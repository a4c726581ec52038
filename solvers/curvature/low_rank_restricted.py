"""The kept part of a low-rank curvature, solved through whichever of its equivalent forms is smallest.

For H_SS = A_SᵀA_S + λI they are

* ``primal``    Cholesky of H_SS                                       |S| × |S|
* ``woodbury``  H_SS⁻¹ = (I − A_SᵀK_S⁻¹A_S) / λ,  K_S = λI + A_SA_Sᵀ, r × r
                (K_S from the kept columns, or from the cached full Gram matrix less the removed ones)
* ``dual``      H_SS⁻¹ = [H⁻¹]_SS − [H⁻¹]_SP [(H⁻¹)_PP]⁻¹ [H⁻¹]_PS with the factor of the full K that is cached across
                masks, |P| × |P|
* ``cg``        conjugate gradients preconditioned by a float32 Cholesky factor (or the diagonal) beyond
"""

from __future__ import annotations

from typing import Protocol

import torch

from solvers.curvature.factor_products import back_project, gram_of, project
from solvers.curvature.restricted import DIRECT_LIMIT, DOUBLE_LIMIT, PIVOT_FLOOR, FactorisedRestricted
from solvers.linalg import Apply, cholesky, cholesky_solve, lower_gram, relative_pivots

#: λ relative to the trace of H_SS below which it counts as none (as for the full matrix).
_DAMPING_FLOOR = 1e-13


class Whole(Protocol):
    """What is needed of the unrestricted curvature."""

    factor: torch.Tensor
    damping: float
    n: int
    rank: int

    @property
    def diagonal(self) -> torch.Tensor: ...
    @property
    def gram(self) -> torch.Tensor: ...
    @property
    def woodbury(self) -> torch.Tensor: ...
    def project(self, x: torch.Tensor) -> torch.Tensor: ...
    def back_project(self, z: torch.Tensor) -> torch.Tensor: ...
    def factor_columns(self, index: torch.Tensor) -> torch.Tensor: ...


class LowRankRestricted(FactorisedRestricted):
    """The kept part of a low-rank curvature; `kept` is a bool mask (n,)."""

    def __init__(self, whole: Whole, kept: torch.Tensor) -> None:
        self.whole, self.kept = whole, kept.nonzero().squeeze(1)
        self.removed = (~kept).nonzero().squeeze(1)
        self.n_kept, self.damping = int(self.kept.numel()), whole.damping
        # The kept columns are gathered once when that is affordable; otherwise products go through all of A.
        self._columns = whole.factor.index_select(1, self.kept) if 4 * self.n_kept <= 3 * whole.n else None

    @property
    def columns(self) -> torch.Tensor:
        """A_S in the dtype of A."""
        return self._columns if self._columns is not None else self.whole.factor.index_select(1, self.kept)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._columns is not None:
            return back_project(self._columns, project(self._columns, x)) + self.damping * x
        full = torch.zeros(self.whole.n, dtype=torch.float64, device=x.device)
        full[self.kept] = x
        return self.whole.back_project(self.whole.project(full))[self.kept] + self.damping * x

    def factorise(self) -> tuple[str, Apply | None]:
        whole, rows = self.whole, self.whole.rank
        damped = self.damping > _DAMPING_FLOOR * float(whole.diagonal[self.kept].sum())
        if self.n_kept <= rows or not damped:
            if self.n_kept > rows and not damped:
                return "minimum norm", None
            return self._primal()
        if self.removed.numel() < rows // 2 and rows <= DOUBLE_LIMIT and whole.n > rows:
            dual = self._dual()
            if dual is not None:
                return "dual", dual
        return self._woodbury()

    def _primal(self) -> tuple[str, Apply | None]:
        columns = self.columns
        if self.n_kept > DOUBLE_LIMIT:
            factor = self._single_precision(columns.T)
            if factor is not None:
                return "cg (float32 primal)", lambda x: cholesky_solve(factor, x)
            if self.n_kept > DIRECT_LIMIT:
                return "cg (diagonal)", self._by_diagonal()
        dense = columns.double()
        hessian = dense.T @ dense
        hessian.diagonal().add_(self.damping)
        double, info = torch.linalg.cholesky_ex(hessian)
        if int(info) != 0 or not bool((relative_pivots(double, hessian) > PIVOT_FLOOR).all()):
            return "minimum norm", None
        return "primal", lambda x: cholesky_solve(double, x)

    def _woodbury(self) -> tuple[str, Apply]:
        rows = self.whole.rank
        if rows > DOUBLE_LIMIT:
            factor = self._single_precision(self.columns)
            if factor is not None:
                return "cg (float32 woodbury)", self._through_rows(factor)
            if rows > DIRECT_LIMIT:
                return "cg (diagonal)", self._by_diagonal()
        if "gram" in self.whole.__dict__ and self.removed.numel() < self.n_kept:
            removed = self.whole.factor_columns(self.removed).double()
            gram = self.whole.gram - removed @ removed.T
        else:
            gram = gram_of(self.columns)
        gram.diagonal().add_(self.damping)
        return "woodbury", self._through_rows(cholesky(gram, "λI + A_S A_Sᵀ"))

    def _by_diagonal(self) -> Apply:
        diagonal = self.whole.diagonal[self.kept]
        return lambda x: x / diagonal

    def _single_precision(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Float32 Cholesky factor of λI + M Mᵀ; None where float32 cannot hold it."""
        gram = lower_gram(rows.float())
        gram.diagonal().add_(self.damping)
        factor: torch.Tensor
        factor, info = torch.linalg.cholesky_ex(gram)
        return factor if int(info) == 0 else None

    def _through_rows(self, factor: torch.Tensor) -> Apply:
        """x ↦ (x − A_SᵀK_S⁻¹A_S x) / λ with the Cholesky factor of K_S."""
        columns = self.columns

        def apply(x: torch.Tensor) -> torch.Tensor:
            inner = cholesky_solve(factor, project(columns, x))
            return (x - back_project(columns, inner)) / self.damping

        return apply

    def _dual(self) -> Apply | None:
        """None where rounding has made (H⁻¹)_PP indefinite; the larger ``woodbury`` form is stable there."""
        whole, full_factor, removed = self.whole, self.whole.woodbury, self.removed
        half = torch.linalg.solve_triangular(full_factor, whole.factor_columns(removed).double(), upper=False)
        inner = -(half.T @ half)
        inner.diagonal().add_(1.0)
        inner_factor, info = torch.linalg.cholesky_ex(inner)
        if int(info) != 0:
            return None

        def inverse(x: torch.Tensor) -> torch.Tensor:
            return (x - whole.back_project(cholesky_solve(full_factor, whole.project(x)))) / self.damping

        def apply(x: torch.Tensor) -> torch.Tensor:
            full = torch.zeros(whole.n, dtype=torch.float64, device=x.device)
            full[self.kept] = x
            first = inverse(full)
            correction = torch.zeros_like(full)
            correction[removed] = cholesky_solve(inner_factor, first[removed])
            return (first - self.damping * inverse(correction))[self.kept]

        return apply

    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        columns = self.columns.double()
        _, singular, right = torch.linalg.svd(columns, full_matrices=False)
        values = singular.square()
        kept = values > max(columns.shape) * 2.3e-16 * float(values.max()) if values.numel() else values > 0
        return values[kept] + self.damping, right[kept].T, self.damping
