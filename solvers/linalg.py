"""Dense linear algebra that says when it fails: Cholesky factors and preconditioned conjugate gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from solvers.errors import SingularHessianError

Apply = Callable[[torch.Tensor], torch.Tensor]

_RESIDUAL_TARGET = 1e-13
_MAX_CG = 2000


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put the block's name in front of what a factorisation complains about."""
    try:
        yield
    except SingularHessianError as error:
        raise SingularHessianError(f"block {name!r}: {error}") from error


def cholesky(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Lower Cholesky factor; raises SingularHessianError naming `what` instead of returning a broken one."""
    factor: torch.Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise SingularHessianError(
            f"{what} is singular or indefinite to float64 (leading minor {int(info)} of {matrix.shape[0]}); "
            "use a larger damping"
        )
    return factor


def relative_pivots(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Squared pivots relative to their own diagonal entries, (…, n); blind to how rows and columns are scaled.

    Pivot i is what is left of H_ii once the weights before it are eliminated; nan, above no floor, where H_ii is 0.
    """
    return factor.diagonal(dim1=-2, dim2=-1).square() / matrix.diagonal(dim1=-2, dim2=-1)


def strict_cholesky(matrix: torch.Tensor, what: str, floor: float = 1e-14) -> torch.Tensor:
    """`cholesky`, refusing relative pivots of `floor` and less too; raises SingularHessianError."""
    factor = cholesky(matrix, what)
    pivots = relative_pivots(factor, matrix)
    if not bool((pivots > floor).all()):
        raise SingularHessianError(
            f"{what} is singular to float64 (relative pivot {float(pivots.min()):.3g}); use a larger damping"
        )
    return factor


def cholesky_solve(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(L Lᵀ)⁻¹ x for x of shape (n,) or (n, m), computed in the precision of L, float64."""
    right = x.to(factor.dtype)
    if x.ndim > 1:
        return torch.cholesky_solve(right, factor).double()
    return torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1).double()


def triangular_inverse(factor: torch.Tensor, panel: int = 128) -> torch.Tensor:
    """L⁻¹ of a lower triangular L (n, n), by halves: a third of the work of solving for the identity, as products."""
    size = factor.shape[0]
    if size <= panel:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        solved: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return solved
    half = size // 2
    out = torch.zeros_like(factor)
    out[:half, :half] = triangular_inverse(factor[:half, :half], panel)
    out[half:, half:] = triangular_inverse(factor[half:, half:], panel)
    out[half:, :half] = -(out[half:, half:] @ (factor[half:, :half] @ out[:half, :half]))
    return out


def inverse_diagonal_of(factor: torch.Tensor) -> torch.Tensor:
    """diag((L Lᵀ)⁻¹), (n,)."""
    return triangular_inverse(factor).square().sum(0)


def lower_gram(rows: torch.Tensor, panel: int = 1024) -> torch.Tensor:
    """The lower triangle of M Mᵀ in the dtype of M (m, k), by panels: half the work of the full product.

    What lies above the diagonal panels is zero; a Cholesky factorisation reads only the lower triangle.
    """
    size = rows.shape[0]
    out = torch.zeros((size, size), dtype=rows.dtype, device=rows.device)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        torch.mm(rows[start:stop], rows[:stop].T, out=out[start:stop, :stop])
    return out


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """F (q, n) with FᵀF = M to rounding, q the rank to float64, for M (n, n) positive semidefinite.

    M is scaled to unit diagonal first, so that each entry is accurate relative to its own row and column.
    """
    scale = matrix.diagonal().clamp_min(0.0).sqrt()
    safe = torch.where(scale > 0.0, scale, 1.0)
    values, vectors = torch.linalg.eigh(matrix / safe.unsqueeze(0) / safe.unsqueeze(1))
    kept = values > matrix.shape[0] * 2.3e-16 * values[-1].clamp_min(0.0)
    root: torch.Tensor = (vectors[:, kept] * values[kept].sqrt()).T * scale
    return root


def conjugate_gradients(
    multiply: Apply, right: torch.Tensor, precondition: Apply, tolerance: float = _RESIDUAL_TARGET
) -> tuple[torch.Tensor, float]:
    """Solve multiply(x) = right; (x, ‖residual‖/‖right‖).

    Flexible preconditioned conjugate gradients; returns the best iterate once `tolerance` is reached or the
    residual has stopped falling, which after an exact factorisation is one or two steps.

    Raises
    ------
    SingularHessianError
        If the residual is not finite.
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
        stalled = 0 if size < 0.7 * best_residual else stalled + 1
        if size < best_residual:
            best, best_residual = x, size
    true = float((right - multiply(best)).norm()) / norm
    if not math.isfinite(true):
        raise SingularHessianError("the refit system could not be solved in float64; use a larger damping")
    return best, true
