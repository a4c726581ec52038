"""Products with a factor A (r, n), float32 or float64, accumulated in float64 without a float64 copy of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from solvers.curvature import matvec

#: Entries of a float32 factor that are converted to float64 at a time.
CHUNK_ENTRIES = 1 << 24
#: Up to this many vectors go one by one: converting the factor costs more.
_FEW = 4


def column_chunks(factor: torch.Tensor) -> Iterator[slice]:
    """Ranges of columns small enough to be converted to float64 at a time."""
    rows, columns = factor.shape
    width = max(1, CHUNK_ENTRIES // max(1, rows))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def project(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x for x (n,) or (n, m); float64, accumulated in float64."""
    if factor.dtype == torch.float64:
        return factor @ x
    if matvec.supported(factor, x):
        return matvec.project(factor, x)
    total = torch.zeros((factor.shape[0], *x.shape[1:]), dtype=torch.float64, device=factor.device)
    for chunk in column_chunks(factor):
        total += factor[:, chunk].double() @ x[chunk]
    return total


def back_project(factor: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Aᵀ z for z (r,) or (r, m); float64, accumulated in float64."""
    if factor.dtype == torch.float64:
        return factor.T @ z
    if matvec.supported(factor, z):
        return matvec.back_project(factor, z)
    if z.ndim == 2 and z.shape[1] <= _FEW and matvec.supported(factor, z[:, 0]):
        return torch.stack([matvec.back_project(factor, column) for column in z.T], dim=1)
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
