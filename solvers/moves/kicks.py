"""Kicks: what throws a search off a local optimum."""

from __future__ import annotations

import numpy as np

from solvers.problem import Mask


def exchanged(mask: Mask, size: int, rng: np.random.Generator) -> Mask:
    """A copy of a mask (n,) with `size` weights of either side (fewer where there are fewer) exchanged at random."""
    inside, outside = np.flatnonzero(mask), np.flatnonzero(~mask)
    size = min(size, inside.size, outside.size)
    changed = mask.copy()
    changed[rng.permutation(inside)[:size]] = False
    changed[rng.permutation(outside)[:size]] = True
    return changed
