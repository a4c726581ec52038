"""H = AᵀA + λI from the rows of a factor A (r, n), never formed.

Everything rests on the push-through identity, with K = λI + AAᵀ of size r × r:

    H⁻¹ = (I − AᵀK⁻¹A) / λ ,      H⁻¹Aᵀ = AᵀK⁻¹ ,      [H⁻¹]_ii = (1 − a_iᵀK⁻¹a_i) / λ .

A is the empirical Fisher's factor where its rows are gradients divided by the square root of their number (Singh and
Alistarh, *WoodFisher*, NeurIPS 2020, for the identity's use in pruning).
"""

from __future__ import annotations

from functools import cached_property

import torch

from solvers.arguments import real_tensor, ridge_of
from solvers.curvature.base import Curvature, Index
from solvers.curvature.factor_products import (
    CHUNK_ENTRIES,
    back_project,
    column_chunks,
    column_squares,
    gather_columns,
    gram_of,
    project,
)
from solvers.curvature.restricted import DIRECT_LIMIT, DOUBLE_LIMIT, PIVOT_FLOOR, FactorisedRestricted
from solvers.errors import ProblemError, SingularHessianError
from solvers.linalg import Apply, cholesky, cholesky_solve, lower_gram, relative_pivots

#: Smallest λ relative to the trace of AAᵀ at which float64 still resolves 1 − a_iᵀK⁻¹a_i.
RELATIVE_DAMPING_FLOOR = 1e-13


class LowRank(Curvature):
    """AᵀA + λI.

    Parameters
    ----------
    factor : (r, n) tensor, float32 or float64, r ≥ 1
        A; kept as it is, without a copy.
    damping : float ≥ 0
        λ.
    """

    def __init__(self, factor: torch.Tensor, damping: float = 0.0) -> None:
        self.factor, self.damping = real_tensor(factor, "a factor"), ridge_of(damping)
        if self.factor.ndim != 2 or self.factor.shape[1] == 0:
            raise ProblemError(f"a factor must have rows and columns, not shape {tuple(self.factor.shape)}")
        self.rank, self.n = int(self.factor.shape[0]), int(self.factor.shape[1])

    def __repr__(self) -> str:
        return f"LowRank(rows={self.rank}, n={self.n}, damping={self.damping:g}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.factor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.factor.dtype

    @property
    def ridge(self) -> torch.Tensor:
        return torch.full((self.n,), self.damping, dtype=torch.float64, device=self.device)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """A x, float64 (r,) or (r, m)."""
        return project(self.factor, x)

    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        """Aᵀ z, float64 (n,) or (n, m)."""
        return back_project(self.factor, z)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.back_project(self.project(x)) + self.damping * x

    def quadratic(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.project(x).square().sum() + 0.5 * self.damping * x.square().sum()

    def factor_columns(self, index: torch.Tensor) -> torch.Tensor:
        """A[:, index] in the dtype of A, (r, m)."""
        return gather_columns(self.factor, index)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        return column_squares(self.factor) + self.damping

    def columns(self, index: Index) -> torch.Tensor:
        chosen = self.index_of(index)
        out = self.back_project(self.factor_columns(chosen).double())
        out[chosen, torch.arange(chosen.numel(), device=self.device)] += self.damping
        return out

    def submatrix(self, rows: Index, columns: Index) -> torch.Tensor:
        if rows is not columns:
            return super().submatrix(rows, columns)
        part = self.factor_columns(self.index_of(rows)).double()
        out = part.T @ part
        out.diagonal().add_(self.damping)
        return out

    def with_damping(self, damping: float) -> LowRank:
        other = LowRank(self.factor, damping)
        if "gram" in self.__dict__:
            other.__dict__["gram"] = self.gram
        return other

    def select(self, index: torch.Tensor) -> LowRank:
        return LowRank(self.factor_columns(index), self.damping)

    def digest_arrays(self) -> tuple[torch.Tensor, ...]:
        return (self.factor,)

    @cached_property
    def gram(self) -> torch.Tensor:
        """A Aᵀ, float64 (r, r)."""
        return gram_of(self.factor)

    @cached_property
    def woodbury(self) -> torch.Tensor:
        """Lower Cholesky factor of K = λI + AAᵀ, float64 (r, r).

        Raises
        ------
        SingularHessianError
            If λ = 0, or λ is too small against AAᵀ for float64.
        """
        ceiling = float(self.gram.diagonal().sum())
        if self.damping <= RELATIVE_DAMPING_FLOOR * ceiling:
            raise SingularHessianError(
                f"H⁻¹ is needed but damping {self.damping:g} is zero or negligible against trace(AAᵀ) = "
                f"{ceiling:.3g}, and with {self.rank} rows for {self.n} weights AᵀA alone is not invertible; pass a "
                "larger damping"
            )
        kernel = self.gram.clone()
        kernel.diagonal().add_(self.damping)
        return cholesky(kernel, "λI + AAᵀ")

    def dense(self) -> torch.Tensor:
        factor = self.factor.double()
        hessian = factor.T @ factor
        hessian.diagonal().add_(self.damping)
        return hessian

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        if self.n <= self.rank:
            return super().solve(x)
        inner = torch.cholesky_solve(self.project(x).reshape(self.rank, -1), self.woodbury)
        return (x - self.back_project(inner.reshape(self.rank, *x.shape[1:]))) / self.damping

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        if self.n <= self.rank:
            return super().inverse_diagonal
        parts = []
        for chunk in column_chunks(self.factor):
            half = torch.linalg.solve_triangular(self.woodbury, self.factor[:, chunk].double(), upper=False)
            parts.append(1.0 - half.square_().sum(0))
        # 1 − a_iᵀK⁻¹a_i lies in [λ/(λ + |a_i|²), 1]; rounding must not push it below.
        return torch.maximum(torch.cat(parts), self.damping / self.diagonal) / self.damping

    def shifted_inverse(self, ridge: torch.Tensor) -> Apply:
        """Through the r × r system I + A(λI + diag(ridge))⁻¹Aᵀ."""
        total = ridge + self.damping
        if bool((total == total[0]).all()):
            kernel = self.gram / total[0]
        else:
            kernel = torch.zeros((self.rank, self.rank), dtype=torch.float64, device=self.device)
            root = total.rsqrt()
            width = max(1, min(4096, CHUNK_ENTRIES // self.rank))
            for start in range(0, self.n, width):
                part = slice(start, start + width)
                kernel += lower_gram(self.factor[:, part] * root[part].to(self.dtype), panel=256)
        kernel.diagonal().add_(1.0)
        inner = cholesky(kernel, "I + A(λI + ridge)⁻¹Aᵀ")

        def apply(x: torch.Tensor) -> torch.Tensor:
            scaled = x / total
            return scaled - self.back_project(cholesky_solve(inner, self.project(scaled))) / total

        return apply

    def restrict(self, kept: torch.Tensor) -> LowRankRestricted:
        return LowRankRestricted(self, kept)


class LowRankRestricted(FactorisedRestricted):
    """The kept part of a low-rank curvature; `kept` is a bool mask (n,).

    H_SS = A_SᵀA_S + λI is solved through whichever of its equivalent forms is smallest:

    * ``primal``    Cholesky of H_SS                                       |S| × |S|
    * ``woodbury``  H_SS⁻¹ = (I − A_SᵀK_S⁻¹A_S) / λ,  K_S = λI + A_SA_Sᵀ, r × r
                    (K_S from the kept columns, or from the cached full Gram matrix less the removed ones)
    * ``dual``      H_SS⁻¹ = [H⁻¹]_SS − [H⁻¹]_SP [(H⁻¹)_PP]⁻¹ [H⁻¹]_PS with the factor of the full K that is cached
                    across masks, |P| × |P|
    * ``cg``        conjugate gradients preconditioned by a float32 Cholesky factor (or the diagonal) beyond
    """

    def __init__(self, whole: LowRank, kept: torch.Tensor) -> None:
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
        damped = self.damping > RELATIVE_DAMPING_FLOOR * float(whole.diagonal[self.kept].sum())
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
