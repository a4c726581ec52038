"""CBS-U: the best values of the kept weights for a fixed mask, in closed form.

With d = v − w, d_P = −w_P and S the kept weights, minimising gᵀd + ½ dᵀHd over d_S gives

    H_SS d_S = H_SP w_P − g_S ,

and with g = 0 equally d = −H⁻¹E_P [(H⁻¹)_PP]⁻¹ w_P (Yu et al., ICML 2022, eq. 8). The system is
solved through whichever of its equivalent forms is smallest:

* ``primal``    Cholesky of H_SS                                       |S| × |S|
* ``woodbury``  d_S = A_SᵀK_S⁻¹(A_P w_P) − (I − A_SᵀK_S⁻¹A_S) g_S / λ,  K_S = λI + A_SA_Sᵀ, r × r
                (K_S from the kept columns, or from the cached full Gram matrix less the removed ones)
* ``dual``      through [(H⁻¹)_PP]⁻¹ and the factor of the full K that is cached across masks, |P| × |P|
* ``cg``        conjugate gradients preconditioned by a float32 Cholesky factor (or the diagonal) beyond

and every result is polished by preconditioned conjugate gradients on the true system until its
residual is at the level of float64, so that all forms agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from solvers import linalg
from solvers.errors import ProblemError, SingularHessianError
from solvers.problem import Array, Mask, QuadraticBlock, SelectionProblem

Apply = Callable[[torch.Tensor], torch.Tensor]

#: Up to this size a matrix is factorised in float64; beyond it a float32 factor preconditions CG, which is
#: faster and, polished, as accurate. Where float32 cannot hold the matrix, float64 is used up to the second size.
_DOUBLE_LIMIT = 4000
_DIRECT_LIMIT = 20000
_RESIDUAL_TARGET = 1e-13
_MAX_CG = 2000


@dataclass(frozen=True, eq=False)
class Refit:
    """The combinatorial update of a mask.

    Attributes
    ----------
    weights : numpy float64 (n,)
        v, zero where pruned.
    value : float
        gᵀ(v − w) + ½ (v − w)ᵀH(v − w); −inf where it is unbounded below (λ = 0 and g outside the range of H).
    methods : tuple of str
        The form used for each block.
    residual : float
        Largest ‖H_SS d_S − b‖ / ‖b‖ over the blocks.
    repairs : tuple of str
        Numerical repairs, e.g. a minimum-norm solution where H_SS is singular; empty if none was needed.
    """

    weights: Array
    value: float
    methods: tuple[str, ...]
    residual: float
    repairs: tuple[str, ...] = ()


def refit(problem: SelectionProblem, pruned: Mask) -> Refit:
    """CBS-U for a mask that may remove any number of weights.

    Parameters
    ----------
    problem : SelectionProblem
        Its objective and budget play no role.
    pruned : numpy bool (n,)

    Returns
    -------
    Refit

    Raises
    ------
    ProblemError
        If the mask does not fit.
    """
    if pruned.shape != (problem.n,) or pruned.dtype != np.bool_:
        raise ProblemError(f"the mask must be bool of shape ({problem.n},), not {pruned.dtype} {pruned.shape}")
    weights = np.empty(problem.n)
    value, residual = 0.0, 0.0
    methods: list[str] = []
    repairs: list[str] = []
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        mask = block.tensor_of(pruned[where])
        step, method, block_residual, repair = _block_step(block, mask)
        if step is None:
            value = -math.inf
            weights[where] = torch.where(mask, 0.0, block.weights).cpu().numpy()
        else:
            value += _model_value(block, step)
            new = torch.where(mask, 0.0, block.weights + step)
            weights[where] = new.cpu().numpy()
        methods.append(method)
        residual = max(residual, block_residual)
        if repair:
            repairs.append(repair)
    return Refit(weights, value, tuple(methods), residual, tuple(repairs))


def _model_value(block: QuadraticBlock, step: torch.Tensor) -> float:
    """gᵀd + ½ dᵀHd of a step d (n,)."""
    value = 0.5 * block.project(step).square().sum() + 0.5 * block.damping * step.square().sum()
    if block.gradient is not None:
        value = value + block.gradient @ step
    return float(value)


def _block_step(block: QuadraticBlock, mask: torch.Tensor) -> tuple[torch.Tensor | None, str, float, str]:
    """(d (n,) or None if unbounded, method, relative residual, repair) for one block."""
    removed = torch.where(mask, block.weights, 0.0)
    step = -removed
    kept = (~mask).nonzero().squeeze(1)
    right = block.back_project(block.project(removed))[kept]
    if block.gradient is not None:
        right = right - block.gradient[kept]
    if kept.numel() == 0 or not bool(right.any()):
        return step, "none", 0.0, ""
    system = _KeptSystem(block, mask, kept)
    method, precondition = system.factorise()
    if precondition is None:
        solution, residual, repair = system.minimum_norm(right)
        if solution is None:
            return None, method, residual, repair
    else:
        solution, residual = conjugate_gradients(system.multiply, right, precondition)
        repair = "" if residual < 1e-8 else f"block {block.name!r}: CBS-U stopped at relative residual {residual:.1e}"
    step = step.clone()
    step[kept] = solution
    return step, method, residual, repair


class _KeptSystem:
    """H_SS of one block and mask, as an operator with the cheapest exact factorisation."""

    def __init__(self, block: QuadraticBlock, mask: torch.Tensor, kept: torch.Tensor) -> None:
        self.block, self.mask, self.kept = block, mask, kept
        self.n_kept, self.n_removed = int(kept.numel()), block.n - int(kept.numel())
        self.damping = block.damping
        # The kept columns are gathered once when that is affordable; otherwise products go through all of A.
        self.columns = block.factor.index_select(1, kept) if 4 * self.n_kept <= 3 * block.n else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """H_SS x in float64."""
        if self.columns is None:
            full = torch.zeros(self.block.n, dtype=torch.float64, device=x.device)
            full[self.kept] = x
            return self.block.back_project(self.block.project(full))[self.kept] + self.damping * x
        columns = self.columns
        return linalg.back_project(columns, linalg.project(columns, x)) + self.damping * x

    def _kept_columns(self) -> torch.Tensor:
        return self.columns if self.columns is not None else self.block.factor.index_select(1, self.kept)

    def factorise(self) -> tuple[str, Apply | None]:
        """(method, x ↦ H_SS⁻¹x up to rounding); None where H_SS is singular to float64."""
        block, rows = self.block, self.block.n_rows
        trace = float(block.diagonal[self.kept].sum())
        damped = self.damping > linalg.RELATIVE_DAMPING_FLOOR * trace
        if self.n_kept <= rows or not damped:
            if self.n_kept > rows and not damped:
                return "minimum norm", None
            return self._primal()
        if damped and self.n_removed < rows // 2 and rows <= _DOUBLE_LIMIT and block.n > rows:
            dual = self._dual()
            if dual is not None:
                return "dual", dual
        return self._woodbury()

    def _primal(self) -> tuple[str, Apply | None]:
        columns = self._kept_columns()
        if self.n_kept > _DOUBLE_LIMIT:
            factor = self._single_precision(columns.T)
            if factor is not None:
                return "cg (float32 primal)", lambda x: _solve(factor, x)
            if self.n_kept > _DIRECT_LIMIT:
                diagonal = self.block.diagonal[self.kept]
                return "cg (diagonal)", lambda x: x / diagonal
        dense = columns.double()
        hessian = dense.T @ dense
        hessian.diagonal().add_(self.damping)
        double, info = torch.linalg.cholesky_ex(hessian)
        pivots = double.diagonal().square()
        if int(info) != 0 or float(pivots.min()) <= 1e-15 * float(hessian.diagonal().max()):
            return "minimum norm", None
        return "primal", lambda x: _solve(double, x)

    def _woodbury(self) -> tuple[str, Apply]:
        rows = self.block.n_rows
        if rows > _DOUBLE_LIMIT:
            factor = self._single_precision(self._kept_columns())
            if factor is not None:
                return "cg (float32 woodbury)", self._through_rows(factor)
            if rows > _DIRECT_LIMIT:
                diagonal = self.block.diagonal[self.kept]
                return "cg (diagonal)", lambda x: x / diagonal
        if "gram" in self.block.__dict__ and self.n_removed < self.n_kept:
            removed = self.block.columns(self.mask)
            gram = self.block.gram - removed @ removed.T
        else:
            gram = linalg.gram_of(self._kept_columns())
        gram.diagonal().add_(self.damping)
        return "woodbury", self._through_rows(linalg.cholesky(gram, f"block {self.block.name!r}: λI + A_S A_Sᵀ"))

    def _single_precision(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Float32 Cholesky factor of λI + M Mᵀ; None where float32 cannot hold it."""
        gram = linalg.lower_gram(rows.float())
        gram.diagonal().add_(self.damping)
        factor: torch.Tensor
        factor, info = torch.linalg.cholesky_ex(gram)
        return factor if int(info) == 0 else None

    def _through_rows(self, factor: torch.Tensor) -> Apply:
        """x ↦ (x − A_SᵀK_S⁻¹A_S x) / λ with the Cholesky factor of K_S."""
        columns = self._kept_columns()

        def apply(x: torch.Tensor) -> torch.Tensor:
            projected = linalg.project(columns, x).to(factor.dtype).unsqueeze(1)
            inner = torch.cholesky_solve(projected, factor).squeeze(1).double()
            return (x - linalg.back_project(columns, inner)) / self.damping

        return apply

    def _dual(self) -> Apply | None:
        """H_SS⁻¹ = [H⁻¹]_SS − [H⁻¹]_SP [(H⁻¹)_PP]⁻¹ [H⁻¹]_PS, with the factor of the full K cached on the block.

        None where rounding has made (H⁻¹)_PP indefinite; the larger ``woodbury`` form is stable there.
        """
        block = self.block
        full_factor = block.woodbury_factor
        removed = self.mask.nonzero().squeeze(1)
        half = torch.linalg.solve_triangular(full_factor, block.columns(removed), upper=False)
        inner = -(half.T @ half)
        inner.diagonal().add_(1.0)
        inner_factor, info = torch.linalg.cholesky_ex(inner)
        if int(info) != 0:
            return None

        def inverse(x: torch.Tensor) -> torch.Tensor:
            solved = torch.cholesky_solve(block.project(x).unsqueeze(1), full_factor).squeeze(1)
            return (x - block.back_project(solved)) / self.damping

        def apply(x: torch.Tensor) -> torch.Tensor:
            full = torch.zeros(block.n, dtype=torch.float64, device=x.device)
            full[self.kept] = x
            first = inverse(full)
            correction = torch.zeros_like(full)
            correction[removed] = torch.cholesky_solve(first[removed].unsqueeze(1), inner_factor).squeeze(1)
            return (first - self.damping * inverse(correction))[self.kept]

        return apply

    def minimum_norm(self, right: torch.Tensor) -> tuple[torch.Tensor | None, float, str]:
        """Minimum-norm solution where H_SS is singular; None if the objective is unbounded below."""
        columns = self._kept_columns().double()
        left, singular, right_vectors = torch.linalg.svd(columns, full_matrices=False)
        del left
        spectrum = singular.square()
        keep = spectrum > max(columns.shape) * 2.3e-16 * float(spectrum.max()) if spectrum.numel() else spectrum > 0
        basis = right_vectors[keep]
        coordinates = basis @ right
        outside = right - basis.T @ coordinates
        norm = float(right.norm())
        name = self.block.name
        # With damping the complement of the row space is λI; without it, a component there is unbounded descent.
        if self.damping > 0 and float(outside.norm()) > 1e-9 * norm:
            solution = basis.T @ (coordinates / (spectrum[keep] + self.damping)) + outside / self.damping
        elif float(outside.norm()) > 1e-6 * norm:
            return (
                None,
                float(outside.norm()) / norm,
                (
                    f"block {name!r}: H of the kept weights is singular and the gradient leaves its range, so the "
                    "refit objective is unbounded below; use a larger damping"
                ),
            )
        else:
            solution = basis.T @ (coordinates / (spectrum[keep] + self.damping))
        residual = float((self.multiply(solution) - right).norm()) / norm
        return (
            solution,
            residual,
            (
                f"block {name!r}: H of the kept weights is singular to float64 "
                f"(rank {int(keep.sum())} of {self.n_kept}); "
                "the minimum-norm update was taken"
            ),
        )


def _solve(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(L Lᵀ)⁻¹ x, computed in the precision of L, float64."""
    solved: torch.Tensor = torch.cholesky_solve(x.to(factor.dtype).unsqueeze(1), factor)
    return solved.squeeze(1).double()


def conjugate_gradients(
    multiply: Apply, right: torch.Tensor, precondition: Apply, tolerance: float = _RESIDUAL_TARGET
) -> tuple[torch.Tensor, float]:
    """Solve multiply(x) = right; (x, ‖residual‖/‖right‖).

    Flexible preconditioned conjugate gradients; returns the best iterate once `tolerance` is reached or the
    residual has stopped falling, which after an exact factorisation is one or two steps.
    """
    norm = float(right.norm())
    x = precondition(right)
    residual = right - multiply(x)
    best, best_residual = x, float(residual.norm()) / norm
    direction = torch.zeros_like(right)
    previous, inner_previous = residual, 1.0
    stalled = 0
    for iteration in range(_MAX_CG):
        if best_residual <= tolerance or stalled >= 3 + iteration // 10:
            break
        preconditioned = precondition(residual)
        inner = float(residual @ preconditioned)
        if not math.isfinite(inner) or inner <= 0.0:
            break
        beta = 0.0 if iteration == 0 else max(0.0, float((residual - previous) @ preconditioned) / inner_previous)
        direction = preconditioned + beta * direction
        image = multiply(direction)
        curvature = float(direction @ image)
        if not math.isfinite(curvature) or curvature <= 0.0:
            break
        x = x + (inner / curvature) * direction
        previous, inner_previous = residual, inner
        residual = residual - (inner / curvature) * image
        size = float(residual.norm()) / norm
        if size < 0.7 * best_residual:
            stalled = 0
        else:
            stalled += 1
        if size < best_residual:
            best, best_residual = x, size
    true = float((right - multiply(best)).norm()) / norm
    if not math.isfinite(true):
        raise SingularHessianError("the refit system could not be solved in float64; use a larger damping")
    return best, true
