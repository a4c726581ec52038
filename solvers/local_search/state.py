"""The selection objective under swaps, never forming H.

With x = w on P and 0 on S, z = A x (kept up to date) and c_i = ½ H_ii w_i², let

    s_i = w_i (a_iᵀ z + λ x_i) − g_i w_i .

Putting back i ∈ P lowers the objective by α_i = s_i − c_i, removing j ∈ S raises it by β_j = s_j + c_j, and
with γ_ij = w_i H_ij w_j the swap of both changes it by exactly

    β_j − α_i − γ_ij .

A pass over all weights costs one product Aᵀz; a swap costs two columns. For other curvatures than AᵀA + λI read
their factored view (`solvers.factored`): a_i is f_i, λ the ridge of i, and γ = 0 across components.
(DESIGN's symbols; Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022.)
"""

from __future__ import annotations

import numpy as np

from solvers.arrays import Array, Index, Mask
from solvers.budget import as_partition
from solvers.factored import FactoredView
from solvers.problem import SelectionProblem


class SwapState(FactoredView):
    """A mask of a selection problem with its exact objective, updated swap by swap.

    Attributes
    ----------
    pruned : numpy bool (n,)
    value : float
        The selection objective of `pruned`, float64.
    images : float64 (components, R)
        z of every component.
    curvature : float64 (n,)
        c_i = ½ H_ii w_i².
    partition : Partitioned
        The budget; swaps stay within its groups.
    """

    def __init__(self, problem: SelectionProblem, pruned: Mask) -> None:
        super().__init__(problem)
        self.pruned = pruned.copy()
        self.partition = as_partition(problem.budget, problem.n)
        self.grouped = len(self.partition.sizes) > 1
        self.curvature: Array = 0.5 * problem.diagonal * self.weights**2
        self.refresh()

    def refresh(self) -> None:
        """Recompute z and the objective from the mask, so that rounding cannot accumulate."""
        removed = np.where(self.pruned, self.weights, 0.0)
        self.images = self.project(removed)
        square = float((self.images * self.images).sum()) + float(self.ridge @ (removed * removed))
        self.value = 0.5 * square - float(self.linear[self.pruned].sum())

    def forces(self) -> Array:
        """s_i of every weight, float64 (n,): one product Aᵀz per block."""
        removed = np.where(self.pruned, self.weights, 0.0)
        return self.weights * (self.back_project(self.images) + self.ridge * removed) - self.linear

    def sides(self, forces: Array) -> tuple[Index, Array, Index, Array]:
        """(P, its α, S, its β), P and S ascending."""
        inside, outside = np.flatnonzero(self.pruned), np.flatnonzero(~self.pruned)
        return inside, forces[inside] - self.curvature[inside], outside, forces[outside] + self.curvature[outside]

    def interaction(self, i: int) -> Array:
        """γ(i, ·) = w_i H_ij w_j within the block of `i` and 0 elsewhere, float64 (n,); the entry of `i` is 2 c_i."""
        number = int(self.block_of[i])
        block, where = self.problem.blocks[number], self.problem.slices[number]
        column = block.curvature.columns(np.array([i - where.start])).squeeze(1).cpu().numpy()
        out = np.zeros(self.problem.n)
        out[where] = self.weights[i] * self.weights[where] * column
        out[i] = 2.0 * self.curvature[i]
        return out

    def swap(self, i: int, j: int, column_i: Array, column_j: Array, change: float) -> None:
        """Put back `i`, remove `j`; the columns are (R,) rows of `columns`, `change` the swap's exact change."""
        self.pruned[i] = False
        self.pruned[j] = True
        self.images[self.component_of[i]] -= self.weights[i] * column_i
        self.images[self.component_of[j]] += self.weights[j] * column_j
        self.value += change
