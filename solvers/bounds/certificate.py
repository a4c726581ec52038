"""A lower bound together with what is needed to recompute it.

A bound is only worth what its certificate proves. `Bound.verify` evaluates the certificate afresh, from the problem's
own factors and by code that shares nothing with the search that found it; a certificate with any entries, however
bad the search, gives a valid bound.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from solvers.errors import BackendError
from solvers.problem import Array, SelectionProblem

EPS = float(np.finfo(np.float64).eps)


class Certificate(ABC):
    """What proves a bound."""

    @abstractmethod
    def value(self, problem: SelectionProblem) -> float:
        """The bound it proves for `problem`, rounded to the safe side."""


@dataclass(frozen=True, eq=False)
class ImageCertificate(Certificate):
    """A point of the image space of the factored view.

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


@dataclass(frozen=True, eq=False)
class Bound:
    """A proven lower bound on the optimal objective.

    Attributes
    ----------
    value : float
    method : str
    seconds : float
        Wall time of the search for the certificate.
    iterations : int
    certificate : Certificate
    converged : bool
        Whether the method reached the best bound of its kind; a bound cut short by time is valid all the same.
    """

    value: float
    method: str
    seconds: float
    iterations: int
    certificate: Certificate
    converged: bool = True

    def verify(self, problem: SelectionProblem) -> float:
        """The bound recomputed from the certificate.

        Raises
        ------
        BackendError
            If the certificate proves less than `value`, rounding apart.
        """
        proven = self.certificate.value(problem)
        if not proven >= self.value - 1e-9 * abs(self.value):
            raise BackendError(
                f"{self.method} claims the lower bound {self.value!r}, its certificate proves {proven!r}"
            )
        return proven

    def gap(self, objective: float) -> float:
        """The relative gap of a mask's objective."""
        return relative_gap(objective, self.value)


def relative_gap(objective: float, bound: float) -> float:
    """(objective − bound)/|objective|; 0 where they are equal, inf where only the objective is 0."""
    if objective == bound:
        return 0.0
    return (objective - bound) / abs(objective) if objective else math.inf


def smallest_sum(costs: Array, count: int) -> float:
    """The sum of the `count` smallest entries: min over the capped simplex of costsᵀs."""
    if count == 0:
        return 0.0
    if count == costs.size:
        return float(costs.sum())
    return float(np.partition(costs, count - 1)[:count].sum())
