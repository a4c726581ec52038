"""Products of a float32 factor on the CPU with float64 vectors, accumulated in float64.

Converting the factor to float64 would double the memory traffic that bounds these products; here the
conversion happens in registers. Rows are shared out to as many threads as torch uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch


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
    from solvers.curvature.matvec_kernels import project_rows

    matrix, vector = factor.numpy(), np.ascontiguousarray(x.numpy(), dtype=np.float64)
    out = np.empty(matrix.shape[0])
    ranges = list(_row_ranges(*matrix.shape))
    if len(ranges) == 1:
        project_rows(matrix, vector, out)
    else:
        with ThreadPoolExecutor(len(ranges)) as pool:
            list(pool.map(lambda part: project_rows(matrix[part], vector, out[part]), ranges))
    return torch.from_numpy(out)


def back_project(factor: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Aᵀ z, float64 (n,)."""
    from solvers.curvature.matvec_kernels import back_project_rows

    matrix, vector = factor.numpy(), np.ascontiguousarray(z.numpy(), dtype=np.float64)
    ranges = list(_row_ranges(*matrix.shape))
    partial = np.zeros((len(ranges), matrix.shape[1]))
    if len(ranges) == 1:
        back_project_rows(matrix, vector, partial[0])
    else:
        with ThreadPoolExecutor(len(ranges)) as pool:
            jobs = zip(ranges, partial, strict=True)
            list(pool.map(lambda job: back_project_rows(matrix[job[0]], vector[job[0]], job[1]), jobs))
    return torch.from_numpy(partial.sum(0))
