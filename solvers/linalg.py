"""Linear algebra with H = AᵀA + λI that never forms H.

Everything rests on the push-through identity, with K = λI + AAᵀ of size r × r:

    H⁻¹ = (I − AᵀK⁻¹A) / λ ,      H⁻¹Aᵀ = AᵀK⁻¹ ,      [H⁻¹]_ii = (1 − a_iᵀK⁻¹a_i) / λ .
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from solvers import matvec
from solvers.errors import SingularHessianError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from solvers.problem import QuadraticBlock

#: Entries of a float32 factor that are converted to float64 at a time.
CHUNK_ENTRIES = 1 << 24

#: Smallest λ relative to the largest eigenvalue of AAᵀ at which float64 still resolves 1 − a_iᵀK⁻¹a_i.
RELATIVE_DAMPING_FLOOR = 1e-13


def column_chunks(factor: torch.Tensor) -> Iterator[slice]:
    """Ranges of columns small enough to be converted to float64 at a time."""
    rows, columns = factor.shape
    width = max(1, CHUNK_ENTRIES // rows)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def project(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x for A (r, n) in float32 or float64 and x (n,) or (n, m); float64, accumulated in float64."""
    if factor.dtype == torch.float64:
        return factor @ x
    if matvec.supported(factor, x):
        return matvec.project(factor, x)
    total = torch.zeros((factor.shape[0], *x.shape[1:]), dtype=torch.float64, device=factor.device)
    for chunk in column_chunks(factor):
        total += factor[:, chunk].double() @ x[chunk]
    return total


def back_project(factor: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Aᵀ z for A (r, n) in float32 or float64 and z (r,) or (r, m); float64, accumulated in float64."""
    if factor.dtype == torch.float64:
        return factor.T @ z
    if matvec.supported(factor, z):
        return matvec.back_project(factor, z)
    return torch.cat([factor[:, chunk].double().T @ z for chunk in column_chunks(factor)])


def gather_columns(factor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A[:, index] in the factor's dtype, (r, m).

    On the CPU ``index_select`` copies all of a factor that is not contiguous, such as one layer's columns of a larger
    matrix; here only the wanted columns are read.
    """
    if factor.is_contiguous() or factor.device.type != "cpu":
        return factor.index_select(1, index)
    if factor.T.is_contiguous():
        return factor.T.index_select(0, index).T
    return torch.from_numpy(factor.numpy()[:, index.numpy()])


def column_squares(factor: torch.Tensor) -> torch.Tensor:
    """diag(AᵀA), float64 (n,); a few rows at a time, so that the conversion stays in a CPU's cache."""
    height = max(1, (CHUNK_ENTRIES if factor.is_cuda else 1 << 19) // factor.shape[1])
    total = torch.zeros(factor.shape[1], dtype=torch.float64, device=factor.device)
    for start in range(0, factor.shape[0], height):
        total += factor[start : start + height].double().square().sum(0)
    return total


def gram_of(factor: torch.Tensor) -> torch.Tensor:
    """A Aᵀ, float64 (r, r)."""
    rows = factor.shape[0]
    total = torch.zeros((rows, rows), dtype=torch.float64, device=factor.device)
    for chunk in column_chunks(factor):
        part = factor[:, chunk].double()
        total.addmm_(part, part.T)
    return total


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


def woodbury_cholesky(block: QuadraticBlock) -> torch.Tensor:
    """Cholesky factor of K = λI + AAᵀ, float64 (r, r).

    Raises
    ------
    SingularHessianError
        If λ = 0, or λ is too small against AAᵀ for float64.
    """
    ceiling = float(block.gram.diagonal().sum())
    if block.damping <= RELATIVE_DAMPING_FLOOR * ceiling:
        raise SingularHessianError(
            f"block {block.name!r}: H⁻¹ is needed but damping {block.damping:g} is zero or negligible against "
            f"trace(AAᵀ) = {ceiling:.3g}, and with {block.n_rows} rows for {block.n} weights AᵀA alone is not "
            "invertible; pass a larger damping"
        )
    kernel = block.gram.clone()
    kernel.diagonal().add_(block.damping)
    return cholesky(kernel, f"block {block.name!r}: λI + AAᵀ")


def apply_inverse(block: QuadraticBlock, x: torch.Tensor) -> torch.Tensor:
    """H⁻¹ x for x of shape (n,) or (n, m), float64; raises SingularHessianError."""
    if block.n <= block.n_rows:
        factor = _dense_cholesky(block)
        solved: torch.Tensor = torch.cholesky_solve(x.reshape(block.n, -1), factor)
        return solved.reshape(x.shape)
    factor = block.woodbury_factor
    inner = torch.cholesky_solve(block.project(x).reshape(block.n_rows, -1), factor)
    return (x - block.back_project(inner.reshape(block.n_rows, *x.shape[1:]))) / block.damping


def inverse_diagonal(block: QuadraticBlock) -> torch.Tensor:
    """diag(H⁻¹), float64 (n,); raises SingularHessianError."""
    if block.n <= block.n_rows:
        factor = _dense_cholesky(block)
        identity = torch.eye(block.n, dtype=torch.float64, device=block.device)
        inverse: torch.Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
        return inverse.square().sum(0)
    factor = block.woodbury_factor
    parts = []
    for chunk in column_chunks(block.factor):
        columns = block.factor[:, chunk].double()
        half = torch.linalg.solve_triangular(factor, columns, upper=False)
        parts.append(1.0 - half.square_().sum(0))
    shrink = torch.cat(parts)
    # 1 − a_iᵀK⁻¹a_i lies in [λ/(λ + |a_i|²), 1]; rounding must not push it below.
    floor = block.damping / block.diagonal
    return torch.maximum(shrink, floor) / block.damping


def _dense_cholesky(block: QuadraticBlock) -> torch.Tensor:
    """Cholesky factor of the dense H (n ≤ r), refusing a numerically singular one."""
    dense = block.factor.double()
    hessian = dense.T @ dense
    hessian.diagonal().add_(block.damping)
    factor = cholesky(hessian, f"block {block.name!r}: H")
    pivots = factor.diagonal().square()
    if float(pivots.min()) <= 1e-14 * float(hessian.diagonal().max()):
        raise SingularHessianError(
            f"block {block.name!r}: H is singular to float64 (pivot {float(pivots.min()):.3g}) with damping "
            f"{block.damping:g}; use a larger damping"
        )
    return factor
