"""Products of a float32 factor on the CPU with float64 vectors, accumulated in float64.

Converting the factor to float64 would double the memory traffic that bounds these products; here the
conversion happens in registers. Rows are shared out to as many threads as torch uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import numpy.typing as npt
import torch

Single = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _project_rows(factor: Single, x: Double, out: Double) -> None:
    """out = A x for a range of rows."""
    for row in range(factor.shape[0]):
        total = 0.0
        for column in range(factor.shape[1]):
            total += np.float64(factor[row, column]) * x[column]
        out[row] = total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _back_project_rows(factor: Single, z: Double, out: Double) -> None:
    """out += Aᵀ z over a range of rows, four rows at a time."""
    rows, columns = factor.shape
    row = 0
    while row + 4 <= rows:
        a, b, c, d = z[row], z[row + 1], z[row + 2], z[row + 3]
        for column in range(columns):
            out[column] += (
                a * np.float64(factor[row, column])
                + b * np.float64(factor[row + 1, column])
                + c * np.float64(factor[row + 2, column])
                + d * np.float64(factor[row + 3, column])
            )
        row += 4
    while row < rows:
        for column in range(columns):
            out[column] += z[row] * np.float64(factor[row, column])
        row += 1


def supported(factor: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether these kernels take the factor: float32 on the CPU with contiguous rows, and one vector."""
    return x.ndim == 1 and factor.dtype == torch.float32 and factor.device.type == "cpu" and factor.stride(1) == 1


def _row_ranges(rows: int, columns: int) -> Iterator[slice]:
    """One range of rows per thread; a single one where threads would not pay."""
    parts = min(torch.get_num_threads(), rows) if rows * columns > 1 << 20 else 1
    edges = np.linspace(0, rows, parts + 1).astype(int)
    for start, stop in pairwise(edges):
        yield slice(int(start), int(stop))


def project(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x, float64 (r,)."""
    matrix, vector = factor.numpy(), np.ascontiguousarray(x.numpy(), dtype=np.float64)
    out = np.empty(matrix.shape[0])
    ranges = list(_row_ranges(*matrix.shape))
    if len(ranges) == 1:
        _project_rows(matrix, vector, out)
    else:
        with ThreadPoolExecutor(len(ranges)) as pool:
            list(pool.map(lambda part: _project_rows(matrix[part], vector, out[part]), ranges))
    return torch.from_numpy(out)


def back_project(factor: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Aᵀ z, float64 (n,)."""
    matrix, vector = factor.numpy(), np.ascontiguousarray(z.numpy(), dtype=np.float64)
    ranges = list(_row_ranges(*matrix.shape))
    partial = np.zeros((len(ranges), matrix.shape[1]))
    if len(ranges) == 1:
        _back_project_rows(matrix, vector, partial[0])
    else:
        with ThreadPoolExecutor(len(ranges)) as pool:
            jobs = zip(ranges, partial, strict=True)
            list(pool.map(lambda job: _back_project_rows(matrix[job[0]], vector[job[0]], job[1]), jobs))
    return torch.from_numpy(partial.sum(0))
