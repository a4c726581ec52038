"""CBS-U of one mask for many dampings at once, to search the damping by calibration loss.

For a mask with kept weights S the update solves (A_SᵀA_S + λI) d_S = b with b = H_SP w_P − g_S, where the damping drops
out of b because H_SP has no diagonal. One eigendecomposition of the smaller Gram matrix serves every λ:

    |S| ≤ r    A_SᵀA_S = U diag(e) Uᵀ     d_S = U diag(1/(e + λ)) Uᵀ b
    |S| > r    A_SA_Sᵀ = U diag(e) Uᵀ     d_S = (b − A_Sᵀ U diag(1/(e + λ)) Uᵀ A_S b) / λ

For one λ alone `solvers.refit` does the same to higher accuracy; here products with A run in the factor's precision,
which is enough for steps that are judged by the loss of the network itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from solvers import QuadraticBlock, SelectionProblem
from solvers.errors import OptionError

#: Columns of the factor that are looked at together.
_COLUMNS = 8192
#: Smallest e + λ relative to the largest e, so that rounding in the Gram matrix does not become a direction.
_FLOOR = {torch.float32: 1e-9, torch.float64: 1e-14}


class DampedRefits:
    """Steps d(λ) of one mask.

    Parameters
    ----------
    problem : SelectionProblem
        Dampings of its blocks are the unit: λ is given relative to them.
    pruned : numpy bool (n,)
    """

    def __init__(self, problem: SelectionProblem, pruned: npt.NDArray[np.bool_]) -> None:
        if pruned.shape != (problem.n,):
            raise OptionError(f"the mask has shape {pruned.shape}, the problem {problem.n} weights")
        self._slices = problem.slices
        self._pruned = pruned
        self._parts = [_Part(b, b.tensor_of(pruned[s])) for b, s in zip(problem.blocks, problem.slices, strict=True)]
        #: w with the removed weights at zero: where every step starts.
        self.start: npt.NDArray[np.float64] = np.where(pruned, 0.0, problem.weights)

    def step(self, ratio: float) -> npt.NDArray[np.float64]:
        """d for dampings ``ratio`` times those of the blocks, float64 (n,); zero where pruned."""
        out = np.zeros(len(self._pruned))
        for part, where in zip(self._parts, self._slices, strict=True):
            out[where] = part.step(ratio).cpu().numpy()
        return out


class _Part:
    """One block."""

    def __init__(self, block: QuadraticBlock, mask: Tensor) -> None:
        self._n = block.n
        self._damping = block.damping
        self._kept = (~mask).nonzero().squeeze(1)
        removed = (mask & (block.weights != 0)).nonzero().squeeze(1)
        columns = block.factor if self._kept.numel() == block.n else block.factor.index_select(1, self._kept)
        self._columns = columns
        right = torch.zeros(self._kept.numel(), dtype=torch.float64, device=block.device)
        if block.gradient is not None:
            right -= block.gradient[self._kept]
        if removed.numel():
            image = _project(block.factor, block.weights[removed], removed)
            right += _back_project(columns, image)
        self._right = right
        self._primal = self._kept.numel() <= block.factor.shape[0]
        if self._primal:
            values, self._basis = torch.linalg.eigh((columns.T @ columns).double())
            self._coordinates = self._basis.T @ right
        else:
            values, self._basis = torch.linalg.eigh(_gram(columns))
            self._coordinates = self._basis.T @ _project(columns, right, None)
        self._values = values.clamp_min_(0.0)
        largest = float(self._values[-1]) if values.numel() else 0.0
        self._floor = _FLOOR[block.factor.dtype] * largest

    def step(self, ratio: float) -> Tensor:
        damping = max(self._damping * ratio, self._floor, 1e-300)
        inner = self._basis @ (self._coordinates / (self._values + damping))
        out = torch.zeros(self._n, dtype=torch.float64, device=self._right.device)
        out[self._kept] = inner if self._primal else (self._right - _back_project(self._columns, inner)) / damping
        return out


def _gram(columns: Tensor) -> Tensor:
    """A Aᵀ, products in the precision of A, sums over pieces in float64."""
    total = torch.zeros((columns.shape[0], columns.shape[0]), dtype=torch.float64, device=columns.device)
    for start in range(0, columns.shape[1], _COLUMNS):
        piece = columns[:, start : start + _COLUMNS]
        total += piece @ piece.T
    return total


def _project(factor: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """A[:, index] x in float64."""
    total = torch.zeros(factor.shape[0], dtype=torch.float64, device=factor.device)
    for start in range(0, x.numel(), _COLUMNS):
        stop = start + _COLUMNS
        piece = factor[:, start:stop] if index is None else factor.index_select(1, index[start:stop])
        total += piece @ x[start:stop].to(factor.dtype)
    return total


def _back_project(factor: Tensor, z: Tensor) -> Tensor:
    """Aᵀ z in float64."""
    return (factor.T @ z.to(factor.dtype)).double()
