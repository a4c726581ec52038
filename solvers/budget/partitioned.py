"""Consecutive groups of weights, rows of a layer or whole layers, each of which loses an exact number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch

from solvers.arrays import Index, Mask
from solvers.budget.base import Budget
from solvers.budget.cardinality import Cardinality
from solvers.errors import ProblemError
from solvers.ranking import smallest_of_rows


@dataclass(frozen=True)
class Partitioned(Budget):
    """|P ∩ G_i| = k_i for groups G_i of consecutive weights that together are all of them.

    Attributes
    ----------
    sizes : sequence of int ≥ 1
        Weights of each group, in order.
    counts : sequence of int ≥ 0
        How many of them go.

    Raises
    ------
    ProblemError
        If they are not integers, not of one length, or a group loses more than it has.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("sizes", "counts"):
            object.__setattr__(self, name, _integers(getattr(self, name), name))
        if len(self.sizes) != len(self.counts) or not self.sizes:
            raise ProblemError(f"a partition needs one count for each group, not {len(self.counts)} for "
                               f"{len(self.sizes)} groups, and at least one group")  # fmt: skip
        for group, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size < 1 or not 0 <= count <= size:
                raise ProblemError(f"group {group} of a partition has {size} weights and is to lose {count}; a group "
                                   "has at least one weight and loses none to all of them")  # fmt: skip

    @classmethod
    def even(cls, groups: int, size: int, count: int) -> Partitioned:
        """`groups` groups of one size that lose equally many: the rows of a layer."""
        return cls((size,) * groups, (count,) * groups)

    @cached_property
    def starts(self) -> Index:
        """First weight of each group, and the number of all weights at the end: int64 (groups + 1,)."""
        return np.cumsum([0, *self.sizes])

    @property
    def n_prune(self) -> int:
        return sum(self.counts)

    def check(self, n: int) -> None:
        if self.starts[-1] != n:
            raise ProblemError(f"the groups of the partition hold {self.starts[-1]} weights, but there are {n}")

    def violation(self, pruned: Mask) -> str:
        found = np.add.reduceat(pruned, self.starts[:-1], dtype=np.int64)
        wrong = np.flatnonzero(found != np.array(self.counts))
        if not wrong.size:
            return ""
        first = int(wrong[0])
        return (
            f"it removes {found[first]} weights of group {first}, where exactly {self.counts[first]} are to go "
            f"({wrong.size} of {len(self.sizes)} groups are wrong)"
        )

    def only_mask(self, n: int) -> Mask | None:
        if any(count not in (0, size) for size, count in zip(self.sizes, self.counts, strict=True)):
            return None
        return np.repeat(np.array(self.counts) > 0, self.sizes)

    def cheapest(self, scores: torch.Tensor) -> torch.Tensor:
        pruned = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        for first, last in self._runs():
            where = slice(int(self.starts[first]), int(self.starts[last]))
            counts = torch.tensor(self.counts[first:last], device=scores.device)
            pruned[where] = smallest_of_rows(scores[where].view(last - first, -1), counts).view(-1)
        return pruned

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Ranges of groups of one size, which are handled together."""
        first = 0
        for _, members in groupby(self.sizes):
            last = first + sum(1 for _ in members)
            yield first, last
            first = last

    def part(self, start: int, stop: int) -> Budget | None:
        """The budget of the weights from `start` to before `stop`; None where this range cuts a group in two."""
        first, last = np.searchsorted(self.starts, (start, stop))
        if self.starts[first] != start or self.starts[last] != stop:
            return None
        if last == first + 1:
            return Cardinality(self.counts[first])
        return Partitioned(self.sizes[first:last], self.counts[first:last])


def _integers(values: Sequence[int], name: str) -> tuple[int, ...]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ProblemError(f"{name} of a partition must be integers in a row, not {values!r}")
    return tuple(array.tolist())
