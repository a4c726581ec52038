"""The loops of `matvec`, compiled: in a file of their own so that numba is loaded by their first use only."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Single = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def project_rows(factor: Single, x: Double, out: Double) -> None:
    """out = A x for a range of rows."""
    for row in range(factor.shape[0]):
        total = 0.0
        for column in range(factor.shape[1]):
            total += np.float64(factor[row, column]) * x[column]
        out[row] = total


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def back_project_rows(factor: Single, z: Double, out: Double) -> None:
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
