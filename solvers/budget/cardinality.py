"""Exactly k weights are removed, whichever they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from solvers.arguments import integer
from solvers.arrays import Mask
from solvers.budget.base import Budget
from solvers.budget.linear import LinearRows
from solvers.errors import ProblemError
from solvers.ranking import smallest


@dataclass(frozen=True)
class Cardinality(Budget):
    """|P| = k.

    Attributes
    ----------
    k : int ≥ 0

    Raises
    ------
    ProblemError
        If `k` is not an integer, or negative.
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", integer("n_prune", self.k, 0, error=ProblemError))

    @property
    def n_prune(self) -> int:
        return self.k

    def check(self, n: int) -> None:
        if self.k > n:
            raise ProblemError(f"n_prune must lie in [0, {n}], the number of weights, not {self.k}")

    def violation(self, pruned: Mask) -> str:
        count = int(pruned.sum())
        return "" if count == self.k else f"it removes {count} weights, where exactly {self.k} are to go"

    def cheapest(self, scores: torch.Tensor) -> torch.Tensor:
        return smallest(scores, self.k)

    def linear(self, n: int) -> LinearRows:
        count = np.array([float(self.k)])
        return LinearRows.single(np.ones((1, n)), count, count)
