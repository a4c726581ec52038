"""The selection objective under swaps, never forming H.

With x = w on P and 0 on S, z = A x (kept up to date) and c_i = ½ H_ii w_i², let

    s_i = w_i (a_iᵀ z + λ x_i) − g_i w_i .

Putting back i ∈ P lowers the objective by α_i = s_i − c_i, removing j ∈ S raises it by β_j = s_j + c_j, and
with γ_ij = w_i H_ij w_j the swap of both changes it by exactly

    β_j − α_i − γ_ij .

A pass over all weights costs one product Aᵀz; a swap costs two columns. Several blocks share one numbering and
have γ = 0 across each other. (DESIGN's symbols; Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from solvers import linalg
from solvers.problem import Array, Mask, SelectionProblem

Index = npt.NDArray[np.int64]


class SwapState:
    """A mask of a selection problem with its exact objective, updated swap by swap.

    Attributes
    ----------
    pruned : numpy bool (n,)
    value : float
        The selection objective of `pruned`, float64.
    images : float64 (blocks, R)
        z of every block, padded with zeros to the largest number of rows R.
    curvature : float64 (n,)
        c_i = ½ H_ii w_i².
    linear : float64 (n,)
        g_i w_i.
    block_of : int64 (n,)
    """

    def __init__(self, problem: SelectionProblem, pruned: Mask) -> None:
        self.problem = problem
        self.pruned = pruned.copy()
        self.weights = problem.weights
        self.curvature: Array = 0.5 * problem.diagonal * self.weights**2
        gradient = problem.gradient
        self.linear: Array = np.zeros(problem.n) if gradient is None else gradient * self.weights
        blocks = problem.blocks
        self.block_of: Index = np.repeat(np.arange(len(blocks)), [b.n for b in blocks])
        self._offsets: Index = np.array([where.start for where in problem.slices])
        self.rows = max(b.n_rows for b in blocks)
        self.images: Array = np.zeros((len(blocks), self.rows))
        self.value = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Recompute z and the objective from the mask, so that rounding cannot accumulate."""
        self.value = 0.0
        for index, (block, where) in enumerate(zip(self.problem.blocks, self.problem.slices, strict=True)):
            removed = np.where(self.pruned[where], self.weights[where], 0.0)
            image = block.project(block.tensor_of(removed)).cpu().numpy()
            self.images[index, : image.shape[0]] = image
            self.value += 0.5 * float(image @ image) + 0.5 * block.damping * float(removed @ removed)
        self.value -= float(self.linear[self.pruned].sum())

    def forces(self) -> Array:
        """s_i of every weight, float64 (n,): one product Aᵀz per block."""
        out = np.empty(self.problem.n)
        for index, (block, where) in enumerate(zip(self.problem.blocks, self.problem.slices, strict=True)):
            pulled = block.back_project(block.tensor_of(self.images[index, : block.n_rows])).cpu().numpy()
            weights = self.weights[where]
            out[where] = weights * (pulled + block.damping * np.where(self.pruned[where], weights, 0.0))
        return out - self.linear

    def interaction(self, i: int) -> Array:
        """γ(i, ·) = w_i H_ij w_j within the block of `i` and 0 elsewhere, float64 (n,); the entry of `i` is 2 c_i."""
        index = int(self.block_of[i])
        block, where = self.problem.blocks[index], self.problem.slices[index]
        column = block.factor[:, i - where.start].double()
        out = np.zeros(self.problem.n)
        out[where] = self.weights[i] * self.weights[where] * block.back_project(column).cpu().numpy()
        out[i] = 2.0 * self.curvature[i]
        return out

    def columns(self, index: Index) -> Array:
        """Columns of A as contiguous rows, float64 (m, R), padded with zeros; `index` in the common numbering."""
        out = np.zeros((index.shape[0], self.rows))
        owner = self.block_of[index]
        for number in np.unique(owner):
            block = self.problem.blocks[number]
            mine = np.flatnonzero(owner == number)
            local = torch.as_tensor(index[mine] - self._offsets[number], device=block.device)
            gathered: npt.NDArray[Any] = linalg.gather_columns(block.factor, local).T.cpu().numpy()
            out[mine, : block.n_rows] = gathered
        return out

    def swap(self, i: int, j: int, column_i: Array, column_j: Array, change: float) -> None:
        """Put back `i`, remove `j`; the columns are (R,) rows of `columns`, `change` the swap's exact change."""
        self.pruned[i] = False
        self.pruned[j] = True
        self.images[self.block_of[i]] -= self.weights[i] * column_i
        self.images[self.block_of[j]] += self.weights[j] * column_j
        self.value += change
