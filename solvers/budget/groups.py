"""Exactly k groups of weights are removed, each whole: neurons, filters, channels, heads, tiles of a layer.

    P = ∪ {G_g : z_g = 1},   Σ_g z_g = k      for groups G_g that share no weight and together are all weights.

Under the selection objective this is a problem over z alone, with a number as its budget (`solvers.aggregate`), which
every solver of the selection objective takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from solvers.arguments import integer, number
from solvers.arrays import Index, Mask
from solvers.budget.base import Budget
from solvers.budget.cardinality import Cardinality
from solvers.budget.linear import LinearRows
from solvers.budget.pattern import Pattern
from solvers.errors import ProblemError


@dataclass(frozen=True, eq=False)
class Groups(Budget):
    """k groups go whole.

    Attributes
    ----------
    labels : int (n,)
        Number of the group of each weight; every number from 0 to the largest is used.
    k : int ≥ 0
        Groups that go.

    Raises
    ------
    ProblemError
        If labels are no such numbers, or there are fewer than k groups.
    """

    labels: Sequence[int] | Index
    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", labels_of(self.labels))
        object.__setattr__(self, "k", integer("the number of groups to remove", self.k, 0, error=ProblemError))
        if self.k > self.n_groups:
            raise ProblemError(f"{self.k} groups are to go, but there are {self.n_groups}")

    @classmethod
    def of(cls, members: Sequence[npt.ArrayLike], k: int, n: int) -> Groups:
        """From the weights of each group; raises ProblemError where they overlap or leave one of `n` weights out."""
        return cls(labels_from(members, n), k)

    @classmethod
    def tiles(cls, rows: int, inputs: int, k: int, height: int | None = 1, width: int | None = None) -> Groups:
        """Tiles of `height` × `width` of one layer of `rows` × `inputs`; None is a whole side.

        Neurons and filters are tiles of 1 × None, input channels None × 1, heads their rows × None.
        """
        return cls(tile_labels(rows, inputs, height, width), k)

    @cached_property
    def sizes(self) -> Index:
        """Weights of each group, int64 (groups,)."""
        return np.bincount(self.labels)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.sizes.size)

    @property
    def n_prune(self) -> int | None:
        if self.k in (0, self.n_groups):
            return int(self.sizes.sum()) if self.k else 0
        return self.k * int(self.sizes[0]) if (self.sizes == self.sizes[0]).all() else None

    def check(self, n: int) -> None:
        if len(self.labels) != n:
            raise ProblemError(f"the groups hold {len(self.labels)} weights, but there are {n}")

    def removed(self, pruned: Mask) -> Index:
        """How many weights of each group go, int64 (groups,)."""
        return np.bincount(self.labels, weights=pruned, minlength=self.n_groups).astype(np.int64)

    def violation(self, pruned: Mask) -> str:
        found = self.removed(pruned)
        cut = np.flatnonzero((found > 0) & (found < self.sizes))
        if cut.size:
            first = int(cut[0])
            return (
                f"it removes {found[first]} of the {self.sizes[first]} weights of group {first}, which goes or stays "
                f"whole ({cut.size} of {self.n_groups} groups are wrong)"
            )
        count = int(np.count_nonzero(found))
        return "" if count == self.k else f"it removes {count} groups, where exactly {self.k} are to go"

    def only_mask(self, n: int) -> Mask | None:
        return np.full(n, self.k > 0) if self.k in (0, self.n_groups) else None

    def linear(self, n: int) -> LinearRows:
        count = np.array([float(self.k)])
        return LinearRows(np.asarray(self.labels), np.ones((1, self.n_groups)), count, count)

    @property
    def over_items(self) -> Cardinality:
        return Cardinality(self.k)

    def widen(self, gone: Mask) -> Mask:
        """The mask (n,) of the weights that removing some groups (groups,) removes."""
        return np.asarray(gone[self.labels])


@dataclass(frozen=True)
class Tiles(Pattern):
    """A share of the tiles of layers goes, each whole; over all blocks.

    Attributes
    ----------
    share : float in [0, 1]
        Of tiles that go; int(tiles·(1 − share)) stay.
    height, width : int, optional
        Of a tile, in rows and inputs; None is the whole side. Rows (neurons, filters) by default.
    inputs : int, optional
        Weights of a row of a layer; otherwise what the curvature knows (`Kronecker`), else a block is one row.

    Raises
    ------
    ProblemError
        If the numbers make no sense.
    """

    share: float
    height: int | None = 1
    width: int | None = None
    inputs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", number("share", self.share, least=0.0, most=1.0, error=ProblemError))
        for name in ("height", "width", "inputs"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer(f"{name} of tiles", value, 1, error=ProblemError))

    @property
    def kept(self) -> float:
        return 1.0 - self.share

    def __str__(self) -> str:
        sides = "x".join(str(side or "all") for side in (self.height, self.width))
        named = {"1xall": "channels", "allx1": "columns"}.get(sides, sides)
        return f"{named}:{self.share:g}"

    def resolve(self, rows: Sequence[tuple[int, int]]) -> Groups:
        """The groups; raises ProblemError if tiles do not divide a layer, or the row length a block."""
        parts, start = [], 0
        for block, (count, length) in enumerate(rows):
            inputs = length if self.inputs is None else self.inputs
            if (count * length) % inputs:
                raise ProblemError(f"block {block} has {count * length} weights, which rows of {inputs} do not divide")
            parts.append(tile_labels(count * length // inputs, inputs, self.height, self.width) + start)
            start = int(parts[-1].max()) + 1
        return Groups(np.concatenate(parts), start - int(start * (1.0 - self.share)))


def labels_of(labels: Any) -> Index:
    """Labels as int64 (n,); raises ProblemError if they are not the numbers from 0 to the largest."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or array.min() < 0:
        raise ProblemError("labels of groups must be integers in a row, zero or more, one for each weight")
    sizes = np.bincount(array)
    if not sizes.all():
        raise ProblemError(f"group {int(np.flatnonzero(sizes == 0)[0])} of {sizes.size} has no weight")
    return array.astype(np.int64)


def labels_from(members: Sequence[npt.ArrayLike], n: int) -> Index:
    """Labels (n,) of groups given by their weights; raises ProblemError for overlaps and for what is left out."""
    labels = np.full(n, -1, dtype=np.int64)
    for group, weights in enumerate(members):
        index = np.asarray(weights)
        if index.ndim != 1 or index.dtype.kind not in "iu" or index.size == 0 or index.min() < 0 or index.max() >= n:
            raise ProblemError(f"group {group} must be numbers of weights in [0, {n}), at least one")
        taken = index[labels[index] >= 0]
        if taken.size or np.unique(index).size != index.size:
            twice = int(taken[0]) if taken.size else int(index[0])
            other = f"group {labels[twice]}" if taken.size else "twice in it"
            raise ProblemError(f"groups must not overlap: weight {twice} of group {group} is also {other}")
        labels[index] = group
    if (labels < 0).any():
        raise ProblemError(
            f"weight {int(np.flatnonzero(labels < 0)[0])} is in no group; groups hold every weight, those that are to "
            "stay or go alone as groups of one"
        )
    return labels


def tile_labels(rows: int, inputs: int, height: int | None, width: int | None) -> Index:
    """Labels (rows·inputs,) of the tiles of a layer; raises ProblemError where they do not divide it."""
    height, width = rows if height is None else height, inputs if width is None else width
    if rows % height or inputs % width:
        raise ProblemError(
            f"tiles of {height} × {width} do not divide a layer of {rows} × {inputs}; "
            f"{math.gcd(rows, height)} × {math.gcd(inputs, width)} would"
        )
    across = inputs // width
    return np.asarray((np.arange(rows)[:, None] // height * across + np.arange(inputs) // width).reshape(-1))
