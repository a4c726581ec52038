"""Consecutive groups of weights, rows of a layer or whole layers, each of which loses an exact number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from solvers.arrays import Index, Mask
from solvers.budget.base import Budget
from solvers.budget.cardinality import Cardinality
from solvers.budget.linear import LinearRows
from solvers.errors import ProblemError
from solvers.ranking import smallest_of_rows


class GroupReach(NamedTuple):
    """Groups among m weights in ascending order, for compiled code.

    `of` (m,) is the number of the group of each weight, `low` to before `high` (m,) are the positions of all its
    members, `quotas` (groups,) what each group loses; int64.
    """

    of: Index
    low: Index
    high: Index
    quotas: Index

    @property
    def several(self) -> bool:
        """Whether there is more than one group, so that a number alone does not say it."""
        return self.quotas.size > 1

    @property
    def reach(self) -> tuple[Index, Index]:
        """`low` and `high`."""
        return self.low, self.high

    def among(self, index: Index) -> GroupReach:
        """The same for some of these weights, `index` ascending."""
        group = self.of[index]
        if not self.several:
            return GroupReach(group, group, np.full_like(group, group.size), self.quotas)
        return GroupReach(
            group, np.searchsorted(group, group), np.searchsorted(group, group, side="right"), self.quotas
        )


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

    sizes: Sequence[int] | Index
    counts: Sequence[int] | Index
    #: `sizes` and `counts` as int64 (groups,).
    lengths: Index = field(init=False, repr=False, compare=False)
    quotas: Index = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, kept in (("sizes", "lengths"), ("counts", "quotas")):
            array = _integers(getattr(self, name), name)
            object.__setattr__(self, name, tuple(array.tolist()))
            # As of N:M there may be many groups, they are turned into an array once.
            object.__setattr__(self, kept, array)
        if len(self.sizes) != len(self.counts) or not self.sizes:
            raise ProblemError(f"a partition needs one count for each group, not {len(self.counts)} for "
                               f"{len(self.sizes)} groups, and at least one group")  # fmt: skip
        sizes, counts = self.lengths, self.quotas
        wrong = np.flatnonzero((sizes < 1) | (counts < 0) | (counts > sizes))
        if wrong.size:
            group = int(wrong[0])
            raise ProblemError(
                f"group {group} of a partition has {sizes[group]} weights and is to lose {counts[group]}; a group has "
                "at least one weight and loses none to all of them"
            )

    @classmethod
    def even(cls, groups: int, size: int, count: int) -> Partitioned:
        """`groups` groups of one size that lose equally many: the rows of a layer."""
        return cls((size,) * groups, (count,) * groups)

    @cached_property
    def starts(self) -> Index:
        """First weight of each group, and the number of all weights at the end: int64 (groups + 1,)."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def group_of(self) -> Index:
        """Number of the group of each weight, int64 (n,)."""
        return np.repeat(np.arange(self.lengths.size), self.lengths)

    @cached_property
    def groups(self) -> GroupReach:
        """For compiled code."""
        group = self.group_of
        return GroupReach(group, self.starts[:-1][group], self.starts[1:][group], self.quotas)

    @property
    def n_prune(self) -> int:
        return int(self.quotas.sum())

    def check(self, n: int) -> None:
        if self.starts[-1] != n:
            raise ProblemError(f"the groups of the partition hold {self.starts[-1]} weights, but there are {n}")

    def violation(self, pruned: Mask) -> str:
        found = np.add.reduceat(pruned, self.starts[:-1], dtype=np.int64)
        wrong = np.flatnonzero(found != self.quotas)
        if not wrong.size:
            return ""
        first = int(wrong[0])
        return (
            f"it removes {found[first]} weights of group {first}, where exactly {self.counts[first]} are to go "
            f"({wrong.size} of {len(self.sizes)} groups are wrong)"
        )

    def only_mask(self, n: int) -> Mask | None:
        if ((self.quotas > 0) & (self.quotas < self.lengths)).any():
            return None
        return np.repeat(self.quotas > 0, self.lengths)

    def cheapest(self, scores: torch.Tensor) -> torch.Tensor:
        pruned = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        for first, last in self.runs:
            where = slice(int(self.starts[first]), int(self.starts[last]))
            counts = torch.from_numpy(self.quotas[first:last]).to(scores.device)
            pruned[where] = smallest_of_rows(scores[where].view(last - first, -1), counts).view(-1)
        return pruned

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Ranges of groups of one size, which are handled together."""
        edges = [0, *(np.flatnonzero(np.diff(self.lengths)) + 1).tolist(), self.lengths.size]
        return list(pairwise(edges))

    def linear(self, n: int) -> LinearRows:
        counts = self.quotas.astype(np.float64)
        return LinearRows.single(
            (self.group_of == np.arange(self.lengths.size)[:, None]).astype(np.float64), counts, counts
        )

    def part(self, start: int, stop: int) -> Budget | None:
        """The budget of the weights from `start` to before `stop`; None where this range cuts a group in two."""
        first, last = np.searchsorted(self.starts, (start, stop))
        if self.starts[first] != start or self.starts[last] != stop:
            return None
        if last == first + 1:
            return Cardinality(self.counts[first])
        return Partitioned(self.sizes[first:last], self.counts[first:last])


def _integers(values: Sequence[int], name: str) -> Index:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ProblemError(f"{name} of a partition must be integers in a row, not {values!r}")
    return array.astype(np.int64)


def places(group: Index) -> Index:
    """How many entries of the same group come before each, int64 (m,), for the groups of entries (m,) in any order."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    found = np.empty(group.size, dtype=np.int64)
    found[order] = np.arange(group.size) - np.searchsorted(ordered, ordered)
    return found


def as_partition(budget: Budget, n: int) -> Partitioned:
    """The budget as groups: one of all `n` weights where it is a number; raises ProblemError for other kinds."""
    if isinstance(budget, Partitioned):
        return budget
    if not isinstance(budget, Cardinality):
        raise ProblemError(f"a {type(budget).__name__} budget is not made of groups of consecutive weights")
    return Partitioned((n,), (budget.k,))
