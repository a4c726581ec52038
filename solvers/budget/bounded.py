"""Exactly k weights are removed, and of each group at least, or at most, so many stay: floors and ceilings.

    |P| = k ,      l_i ≤ |G_i ∩ S| ≤ u_i      for groups G_i that together are all weights.

Without the second condition it is `Cardinality`, a relaxation: what is proven for it holds here. The least sum of
scores is found greedily: the l_i highest scores of each group stay, all but its u_i highest go, and of the others the
smallest go. Such kept sets S are the bases of a matroid, for which greedy is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from solvers.arguments import integer
from solvers.arrays import Array, Index, Mask
from solvers.budget.base import Budget
from solvers.budget.cardinality import Cardinality
from solvers.budget.linear import LinearRows
from solvers.errors import ProblemError
from solvers.ranking import prune_smallest, smallest


@dataclass(frozen=True, eq=False)
class Bounded(Budget):
    """|P| = k with floors, and ceilings, of what stays in each group.

    Attributes
    ----------
    k : int ≥ 0
    sizes : sequence of int ≥ 0
        Weights of each group, in order.
    min_kept : sequence of int ≥ 0
        How many of them stay at least.
    max_kept : sequence of int ≥ 0, optional
        How many of them stay at most; None sets no limit.
    order : int64 (n,), optional
        Place of each weight among the groups, which are consecutive ranges; None where it is its number.

    Raises
    ------
    ProblemError
        If they are not integers, not of one length, or cannot be kept, each alone or all together.
    """

    k: int
    sizes: Sequence[int] | Index
    min_kept: Sequence[int] | Index
    max_kept: Sequence[int] | Index | None = None
    order: Index | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", integer("n_prune", self.k, 0, error=ProblemError))
        given = (self.sizes, self.min_kept, self.sizes if self.max_kept is None else self.max_kept)
        arrays = [np.asarray(values) for values in given]
        whole = all(a.ndim == 1 and a.size and a.dtype.kind in "iu" for a in arrays)
        if not whole or len({a.size for a in arrays}) > 1:
            raise ProblemError("sizes, min_kept and max_kept must be integers in a row, one for each of the groups")
        sizes, least, most = arrays
        wrong = np.flatnonzero((least < 0) | (least > np.minimum(most, sizes)) | (sizes < 0))
        if wrong.size:
            at = int(wrong[0])
            raise ProblemError(
                f"of the {sizes[at]} weights of group {at} at least {least[at]} and at most {most[at]} are to stay, "
                "which no mask can do"
            )

    @cached_property
    def least(self) -> Index:
        """`min_kept` as int64 (groups,)."""
        return np.asarray(self.min_kept, dtype=np.int64)

    @cached_property
    def most(self) -> Index:
        """`max_kept`, or the sizes, as int64 (groups,)."""
        return np.asarray(self.sizes if self.max_kept is None else self.max_kept, dtype=np.int64)

    @cached_property
    def starts(self) -> Index:
        """First weight of each group, and the number of all weights at the end: int64 (groups + 1,)."""
        return np.concatenate([[0], np.cumsum(np.asarray(self.sizes, dtype=np.int64))])

    @property
    def n_prune(self) -> int:
        return self.k

    @property
    def relaxed(self) -> Cardinality:
        """The same without floors and ceilings."""
        return Cardinality(self.k)

    def check(self, n: int) -> None:
        self.relaxed.check(n)
        if self.starts[-1] != n or (self.order is not None and not _is_permutation(self.order, n)):
            raise ProblemError(f"the groups hold {self.starts[-1]} weights, each once, but there are {n}")
        kept, least, most = n - self.k, int(self.least.sum()), int(np.minimum(self.most, self.sizes).sum())
        if not least <= kept <= most:
            limit = f"at least {least}" if kept < least else f"at most {most}"
            raise ProblemError(
                f"{limit} weights are to stay in {len(self.least)} groups together, but {kept} of {n} stay where "
                f"{self.k} are removed; change one of the two"
            )

    def kept(self, pruned: Mask) -> Index:
        """How many weights of each group stay, int64 (groups,)."""
        found, some = np.zeros(len(self.least), dtype=np.int64), np.diff(self.starts) > 0
        if some.any():
            found[some] = np.add.reduceat(~self._to_groups(pruned), self.starts[:-1][some], dtype=np.int64)
        return found

    def violation(self, pruned: Mask) -> str:
        found = self.relaxed.violation(pruned)
        if found:
            return found
        kept = self.kept(pruned)
        wrong = np.flatnonzero((kept < self.least) | (kept > self.most))
        if not wrong.size:
            return ""
        at = int(wrong[0])
        limit = f"at least {self.least[at]}" if kept[at] < self.least[at] else f"at most {self.most[at]}"
        return (
            f"it keeps {kept[at]} weights of group {at}, where {limit} are to stay ({wrong.size} of {kept.size} groups "
            "are wrong)"
        )

    def linear(self, n: int) -> LinearRows:
        place = np.arange(n) if self.order is None else self.order
        group = np.searchsorted(self.starts[1:], place, side="right")
        sizes = np.diff(self.starts)
        bound = np.flatnonzero((self.least > 0) | (self.most < sizes))
        matrix = np.concatenate([np.ones((1, n)), (group == bound[:, None]).astype(np.float64)])
        low = np.concatenate([[self.k], np.maximum(sizes - self.most, 0)[bound]]).astype(np.float64)
        high = np.concatenate([[self.k], (sizes - self.least)[bound]]).astype(np.float64)
        return LinearRows.single(matrix, low, high)

    def cheapest(self, scores: torch.Tensor) -> torch.Tensor:
        pruned = smallest(scores, self.k)
        if not self.violation(pruned.cpu().numpy()):
            return pruned
        found = self._cheapest(scores.cpu().numpy(), np.arange(scores.numel()), self.k)
        return torch.from_numpy(found).to(scores.device)

    def _cheapest(self, scores: npt.NDArray[Any], index: Index, k: int) -> Mask:
        """Which k of some weights (m,) go, `index` ascending, floors and ceilings being those of all."""
        place = index if self.order is None else self.order[index]
        group = np.searchsorted(self.starts[1:], place, side="right")
        above = np.empty(group.size, dtype=np.int64)
        # In this order each group is a range, whose end less the place is the rank from above.
        order = np.lexsort((scores, group))
        above[order] = np.cumsum(np.bincount(group))[group[order]] - np.arange(group.size)
        pruned = above > self.most[group]
        free = np.flatnonzero(~pruned & (above > self.least[group]))
        pruned[free] = prune_smallest(scores[free], k - int(np.count_nonzero(pruned)))
        return pruned

    def repaired(self, pruned: Mask, saliency: Array) -> Mask:
        """A mask that removes k weights (n,), changed as little as floors and ceilings allow.

        Where too few stay the removed weights of highest saliency (n,) come back, where too many stay the kept ones of
        lowest go, and the number is made up for in the other groups in the same way.
        """
        kept = self.kept(pruned)
        # Where nothing has to go, removed weights of groups that are not short play no part.
        gaining = (kept < self.least) | bool((kept > self.most).any())
        member = np.repeat(gaining, self.sizes)
        index = np.flatnonzero(~pruned | (member if self.order is None else member[self.order]))
        rank = np.empty(index.size, dtype=np.int64)
        rank[np.lexsort((saliency[index], ~pruned[index]))] = np.arange(index.size)
        mask = pruned.copy()
        mask[index] = self._cheapest(rank, index, self.k - (pruned.size - index.size))
        return mask

    def _to_groups(self, mask: Mask) -> Mask:
        if self.order is None:
            return mask
        found = np.empty_like(mask)
        found[self.order] = mask
        return found


def _is_permutation(order: Index, n: int) -> bool:
    return order.shape == (n,) and bool((np.sort(order) == np.arange(n)).all())
