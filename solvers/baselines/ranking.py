"""Turning scores into masks."""

from __future__ import annotations

import numpy as np

from solvers.problem import Array, Mask


def prune_smallest(scores: Array, n_prune: int) -> Mask:
    """The mask that removes exactly the `n_prune` smallest scores; ties go to the lower index."""
    pruned = np.zeros(scores.shape[0], dtype=bool)
    pruned[np.argsort(scores, kind="stable")[:n_prune]] = True
    return pruned
