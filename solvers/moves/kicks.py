"""Kicks: what throws a search off a local optimum."""

from __future__ import annotations

import numpy as np

from solvers.budget import GroupReach, places
from solvers.problem import Mask


def exchanged(mask: Mask, size: int, rng: np.random.Generator, groups: GroupReach) -> Mask:
    """A copy of a mask (n,) with `size` weights of either side (fewer where there are fewer) exchanged at random.

    A weight is exchanged with one of its own group.
    """
    inside, outside = np.flatnonzero(mask), np.flatnonzero(~mask)
    size = min(size, inside.size, outside.size)
    changed = mask.copy()
    leaving, entering = rng.permutation(inside), rng.permutation(outside)
    if not groups.several:
        leaving, entering = leaving[:size], entering[:size]
    else:
        # The a-th of a group to leave meets the a-th of the group to enter.
        first_key, second_key = (groups.of[side] * mask.size + places(groups.of[side]) for side in (leaving, entering))
        _, first, second = np.intersect1d(first_key, second_key, assume_unique=True, return_indices=True)
        some = np.argsort(first)[:size]
        leaving, entering = leaving[first[some]], entering[second[some]]
    changed[leaving] = False
    changed[entering] = True
    return changed
