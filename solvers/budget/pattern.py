"""Budgets that are said before the sizes of a problem are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from solvers.arguments import number
from solvers.budget.base import Budget
from solvers.budget.cardinality import Cardinality
from solvers.errors import ProblemError


class Pattern(ABC):
    """What becomes a budget once the problem is known; `solvers.SelectionProblem` sees to it."""

    @property
    @abstractmethod
    def kept(self) -> float:
        """About which share of the weights stays."""

    @abstractmethod
    def __str__(self) -> str:
        """Its text form."""

    @abstractmethod
    def resolve(self, rows: Sequence[tuple[int, int]]) -> Budget:
        """The budget of blocks of `rows` (number of rows, weights of each); raises ProblemError if it does not fit."""


@dataclass(frozen=True)
class Sparsity(Pattern):
    """All but int(n·(1 − share)) of n weights go, over all blocks."""

    share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", number("sparsity", self.share, least=0.0, most=1.0, error=ProblemError))

    @property
    def kept(self) -> float:
        return 1.0 - self.share

    def __str__(self) -> str:
        return f"sparsity:{self.share:g}"

    def resolve(self, rows: Sequence[tuple[int, int]]) -> Cardinality:
        n = sum(count * length for count, length in rows)
        return Cardinality(n - int(n * (1.0 - self.share)))
