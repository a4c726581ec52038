"""What a budget is: which sets of removed weights are allowed.

A budget belongs to a problem and speaks of the weights of all its blocks in their common numbering. A new kind is one
file: derive from `Budget`; solvers say which kinds they take (`Solver.budgets`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch

from solvers.arrays import Array, Mask
from solvers.budget.linear import LinearRows


class Budget(ABC):
    """Which masks over n weights are feasible."""

    @abstractmethod
    def check(self, n: int) -> None:
        """Raise ProblemError if no mask over n weights can meet it."""

    @abstractmethod
    def violation(self, pruned: Mask) -> str:
        """What is wrong with a mask (n,), in words; empty if it is feasible."""

    @property
    def n_prune(self) -> int | None:
        """How many weights every feasible mask removes; None where that is not settled."""
        return None

    def only_mask(self, n: int) -> Mask | None:
        """The feasible mask if there is just one, (n,), so that nothing is to be chosen; else None."""
        count = self.n_prune
        return np.full(n, count > 0) if count is not None and count in (0, n) else None

    def cheapest(self, scores: torch.Tensor) -> torch.Tensor:
        """The feasible mask with the least sum of scores (n,), bool (n,) on their device; ties to the lower index.

        Raises
        ------
        NotImplementedError
            By a kind for which this is not easy; solvers that rank do not take it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not rank single weights")

    def linear(self, n: int) -> LinearRows:
        """The same for `n` weights as linear rows over items.

        Raises
        ------
        NotImplementedError
            By a kind that has no such form; exact solvers do not take it.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a matter of linear rows")

    @property
    def over_items(self) -> Budget:
        """The same over the items of `linear`, each a weight of its own."""
        return self

    def cheapest_of(self, scores: Array) -> Mask:
        """The same for a numpy array."""
        return np.asarray(self.cheapest(torch.from_numpy(scores)).numpy())
