"""The factored view of a whole problem, in the common numbering of its blocks.

Every curvature reads H_ij = f_i · f_j + ridge_i δ_ij within a component and 0 across (`solvers.curvature.base`); for a
low-rank block f_i is column i of A and the ridge is λ. Here the components of all blocks are numbered through, and the
image F x of a vector is one row per component, padded with zeros to the largest rank R.
"""

from __future__ import annotations

import numpy as np
import torch

from solvers.arrays import Array, Index
from solvers.problem import SelectionProblem


class FactoredView:
    """F, the ridge and the vectors of a problem as numpy arrays.

    Attributes
    ----------
    n_components, rows : int
        Of all blocks; R.
    component_of : int64 (n,)
    weights, ridge : float64 (n,)
    linear : float64 (n,)
        g_i w_i.
    """

    def __init__(self, problem: SelectionProblem) -> None:
        self.problem = problem
        self.weights = problem.weights
        self.linear: Array = np.zeros(problem.n) if problem.gradient is None else problem.gradient * self.weights
        curvatures = [block.curvature for block in problem.blocks]
        self._first: Index = np.cumsum([0, *(c.n_components for c in curvatures)])
        self.n_components = int(self._first[-1])
        sizes = [c.n // c.n_components for c in curvatures for _ in range(c.n_components)]
        self.component_of: Index = np.repeat(np.arange(self.n_components), sizes)
        self.block_of: Index = np.repeat(np.arange(len(curvatures)), [c.n for c in curvatures])
        self.ridge: Array = np.concatenate([c.ridge.cpu().numpy() for c in curvatures])
        self.rows = max(1, *(c.rank for c in curvatures))

    def split(self, images: Array) -> tuple[Array, ...]:
        """Images (components, R) by blocks and without the padding, copies of shape (n_components·rank,)."""
        ranks = [block.curvature.rank for block in self.problem.blocks]
        bounds = zip(self._first, self._first[1:], ranks, strict=False)
        return tuple(images[first:last, :rank].flatten() for first, last, rank in bounds)

    def project(self, x: Array) -> Array:
        """F x for x (n,), float64 (components, R)."""
        images = np.zeros((self.n_components, self.rows))
        for number, (block, where) in enumerate(zip(self.problem.blocks, self.problem.slices, strict=True)):
            image = block.curvature.project(block.tensor_of(x[where])).cpu().numpy()
            part = images[self._first[number] : self._first[number + 1], : block.curvature.rank]
            part[:] = image.reshape(part.shape)
        return images

    def back_project(self, images: Array) -> Array:
        """Fᵀ z, float64 (n,), for images (components, R)."""
        pairs = zip(self.problem.blocks, self.split(images), strict=True)
        return np.concatenate([b.curvature.back_project(b.tensor_of(part)).cpu().numpy() for b, part in pairs])

    def columns(self, index: Index) -> Array:
        """f_i as contiguous rows, float64 (m, R), padded with zeros."""
        out = np.zeros((index.shape[0], self.rows))
        owner = self.block_of[index]
        for number in np.unique(owner):
            block, where = self.problem.blocks[number], self.problem.slices[number]
            mine = np.flatnonzero(owner == number)
            local = torch.as_tensor(index[mine] - where.start, device=block.device)
            out[mine, : block.curvature.rank] = block.curvature.factor_columns(local).T.cpu().numpy()
        return out
