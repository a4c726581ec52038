"""The selection objective under swaps, never forming H.

With x = w on P and 0 on S, z = A x (kept up to date) and c_i = ½ H_ii w_i², let

    s_i = w_i (a_iᵀ z + λ x_i) − g_i w_i .

Putting back i ∈ P lowers the objective by α_i = s_i − c_i, removing j ∈ S raises it by β_j = s_j + c_j, and
with γ_ij = w_i H_ij w_j the swap of both changes it by exactly

    β_j − α_i − γ_ij .

A pass over all weights costs one product Aᵀz; a swap costs two columns. For other curvatures than AᵀA + λI read
their factored view (`solvers.curvature.base`): a_i is f_i, λ the ridge of i. All components of all blocks share one
numbering and have γ = 0 across each other. (DESIGN's symbols; Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022.)
"""

from __future__ import annotations

import numpy as np
import torch

from solvers.arrays import Array, Index, Mask
from solvers.problem import SelectionProblem


class SwapState:
    """A mask of a selection problem with its exact objective, updated swap by swap.

    Attributes
    ----------
    pruned : numpy bool (n,)
    value : float
        The selection objective of `pruned`, float64.
    images : float64 (components, R)
        z of every component, padded with zeros to the largest rank R.
    ridge : float64 (n,)
        λ of every weight.
    curvature : float64 (n,)
        c_i = ½ H_ii w_i².
    linear : float64 (n,)
        g_i w_i.
    component_of : int64 (n,)
    """

    def __init__(self, problem: SelectionProblem, pruned: Mask) -> None:
        self.problem = problem
        self.pruned = pruned.copy()
        self.weights = problem.weights
        self.curvature: Array = 0.5 * problem.diagonal * self.weights**2
        gradient = problem.gradient
        self.linear: Array = np.zeros(problem.n) if gradient is None else gradient * self.weights
        curvatures = [block.curvature for block in problem.blocks]
        counts = [curvature.n_components for curvature in curvatures]
        self._first: Index = np.cumsum([0, *counts])
        self.n_components = sum(counts)
        sizes = [c.n // c.n_components for c in curvatures for _ in range(c.n_components)]
        self.component_of: Index = np.repeat(np.arange(self.n_components), sizes)
        self._block_of: Index = np.repeat(np.arange(len(curvatures)), [c.n for c in curvatures])
        self._offsets: Index = np.array([where.start for where in problem.slices])
        self.ridge: Array = np.concatenate([c.ridge.cpu().numpy() for c in curvatures])
        self.rows = max(1, *(c.rank for c in curvatures))
        self.images: Array = np.zeros((self.n_components, self.rows))
        self.value = 0.0
        self.refresh()

    def _images_of(self, number: int) -> Array:
        """The images of one block, a view (components of it, its rank)."""
        rank = self.problem.blocks[number].curvature.rank
        return self.images[self._first[number] : self._first[number + 1], :rank]

    def refresh(self) -> None:
        """Recompute z and the objective from the mask, so that rounding cannot accumulate."""
        self.value = 0.0
        for number, (block, where) in enumerate(zip(self.problem.blocks, self.problem.slices, strict=True)):
            removed = np.where(self.pruned[where], self.weights[where], 0.0)
            images = self._images_of(number)
            images[:] = block.curvature.project(block.tensor_of(removed)).cpu().numpy().reshape(images.shape)
            self.value += 0.5 * float((images * images).sum()) + 0.5 * float(self.ridge[where] @ (removed * removed))
        self.value -= float(self.linear[self.pruned].sum())

    def forces(self) -> Array:
        """s_i of every weight, float64 (n,): one product Aᵀz per block."""
        out = np.empty(self.problem.n)
        for number, (block, where) in enumerate(zip(self.problem.blocks, self.problem.slices, strict=True)):
            image = block.tensor_of(self._images_of(number).reshape(-1))
            pulled = block.curvature.back_project(image).cpu().numpy()
            weights = self.weights[where]
            out[where] = weights * (pulled + self.ridge[where] * np.where(self.pruned[where], weights, 0.0))
        return out - self.linear

    def sides(self, forces: Array) -> tuple[Index, Array, Index, Array]:
        """(P, its α, S, its β), P and S ascending."""
        inside, outside = np.flatnonzero(self.pruned), np.flatnonzero(~self.pruned)
        return inside, forces[inside] - self.curvature[inside], outside, forces[outside] + self.curvature[outside]

    def interaction(self, i: int) -> Array:
        """γ(i, ·) = w_i H_ij w_j within the block of `i` and 0 elsewhere, float64 (n,); the entry of `i` is 2 c_i."""
        number = int(self._block_of[i])
        block, where = self.problem.blocks[number], self.problem.slices[number]
        column = block.curvature.columns(np.array([i - where.start])).squeeze(1).cpu().numpy()
        out = np.zeros(self.problem.n)
        out[where] = self.weights[i] * self.weights[where] * column
        out[i] = 2.0 * self.curvature[i]
        return out

    def columns(self, index: Index) -> Array:
        """f_i as contiguous rows, float64 (m, R), padded with zeros; `index` in the common numbering."""
        out = np.zeros((index.shape[0], self.rows))
        owner = self._block_of[index]
        for number in np.unique(owner):
            block = self.problem.blocks[number]
            mine = np.flatnonzero(owner == number)
            local = torch.as_tensor(index[mine] - self._offsets[number], device=block.device)
            out[mine, : block.curvature.rank] = block.curvature.factor_columns(local).T.cpu().numpy()
        return out

    def swap(self, i: int, j: int, column_i: Array, column_j: Array, change: float) -> None:
        """Put back `i`, remove `j`; the columns are (R,) rows of `columns`, `change` the swap's exact change."""
        self.pruned[i] = False
        self.pruned[j] = True
        self.images[self.component_of[i]] -= self.weights[i] * column_i
        self.images[self.component_of[j]] += self.weights[j] * column_j
        self.value += change
