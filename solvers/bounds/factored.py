"""The factored view of a whole problem: H = FᵀF + diag(ridge), F block-diagonal over components, in one numbering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from solvers.bounds.certificate import Certificate
from solvers.problem import Array, SelectionProblem


@dataclass(frozen=True, eq=False)
class ImageCertificate(Certificate):
    """A point of the image space of F.

    Attributes
    ----------
    residuals : tuple of float64 (n_components·rank,), one per block
    """

    residuals: tuple[Array, ...]

    def terms(self, problem: SelectionProblem) -> Iterator[tuple[Array, ...]]:
        """(y, Fᵀy, w, g, ridge, √diag H) of each block, from the curvature itself."""
        for block, y in zip(problem.blocks, self.residuals, strict=True):
            pulled = block.curvature.back_project(block.tensor_of(y)).cpu().numpy()
            weights, norms = block.weights.cpu().numpy(), np.sqrt(block.diagonal.cpu().numpy())
            gradient = np.zeros(block.n) if block.gradient is None else block.gradient.cpu().numpy()
            yield y, pulled, weights, gradient, block.curvature.ridge.cpu().numpy(), norms


class FactoredProblem:
    """F, w, g and the ridge of a problem as numpy arrays.

    Attributes
    ----------
    weights, gradient, ridge : float64 (n,)
    size : int
        Dimension of the image space.
    components : list of (number of the block, slice of the weights, slice of the image space)
    """

    def __init__(self, problem: SelectionProblem) -> None:
        self.problem, self.count = problem, problem.n_prune
        self.weights: Array = problem.weights
        self.gradient: Array = np.zeros(problem.n) if problem.gradient is None else problem.gradient
        curvatures = [block.curvature for block in problem.blocks]
        self.ridge: Array = np.concatenate([c.ridge.cpu().numpy() for c in curvatures])
        self._ends = [0, *np.cumsum([c.n_components * c.rank for c in curvatures]).tolist()]
        self.size = self._ends[-1]
        self.components: list[tuple[int, slice, slice]] = []
        for number, (curvature, where) in enumerate(zip(curvatures, problem.slices, strict=True)):
            width, rank, first = curvature.n // curvature.n_components, curvature.rank, self._ends[number]
            for c in range(curvature.n_components):
                start = where.start + c * width
                image = slice(first + c * rank, first + (c + 1) * rank)
                self.components.append((number, slice(start, start + width), image))

    def split(self, y: Array) -> tuple[Array, ...]:
        """A point of the image space by blocks, copied."""
        return tuple(y[a:b].copy() for a, b in pairwise(self._ends))

    def project(self, x: Array) -> Array:
        """F x for x (n,)."""
        pairs = zip(self.problem.blocks, self.problem.slices, strict=True)
        return np.concatenate([b.curvature.project(b.tensor_of(x[s])).cpu().numpy() for b, s in pairs])

    def back_project(self, y: Array) -> Array:
        """Fᵀ y, float64 (n,)."""
        pairs = zip(self.problem.blocks, self.split(y), strict=True)
        return np.concatenate([b.curvature.back_project(b.tensor_of(part)).cpu().numpy() for b, part in pairs])
