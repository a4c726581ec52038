"""The scaled joint problem before its tree is grown: its incumbent, and the weights that must stay."""

from __future__ import annotations

import math

import numpy as np
import torch

from solvers.budget import GroupReach
from solvers.exact import joint_nodes
from solvers.exact.best_first import Incumbent
from solvers.exact.joint_square import Square
from solvers.joint.dense_search import DenseJoint, descend, search
from solvers.moves.elimination_path import eliminate_dense
from solvers.moves.reduced import ReducedProblem
from solvers.problem import Mask
from solvers.solver import Deadline

#: Heights below this fraction of ½ cᵀHc, the square of what float64 resolves, are zero.
ZERO = 1e-28
#: A weight is eliminated before the tree is grown if its ½ ĉ² is so many times the incumbent's height.
_OUT_OF_SCALE = 1e6
_TABU_SWAPS = 300
#: Within groups there are few pairs to scan, and more ways to be stuck.
_GROUPED_SWAPS = 5000


def value_of(square: Square, pruned: Mask) -> Incumbent:
    """A mask with its value in the units of the tree."""
    return Incumbent(pruned, float(joint_nodes.mask_value(square.hessian, square.scaled_root, square.centre, pruned)))


def improved(square: Square, groups: GroupReach, pruned: Mask, deadline: Deadline | None = None) -> Incumbent:
    """The one-swap local optimum reached from a mask by the steepest swaps."""
    dense = DenseJoint(square.hessian, square.linear, 1.0, groups)
    gain = 1e-10 * value_of(square, pruned).value
    return value_of(square, ~descend(dense, ~pruned, gain, deadline).kept)


def find_incumbent(square: Square, groups: GroupReach, start: Mask | None, seed: int, deadline: Deadline) -> Incumbent:
    """The best of backward elimination (and a given start) after swaps and a tabu walk, in a third of the time left."""
    n = square.centre.size
    dense = DenseJoint(square.hessian, square.linear, 1.0, groups)
    reduced = ReducedProblem(torch.from_numpy(dense.hessian), torch.from_numpy(dense.linear))
    quotas = (torch.from_numpy(groups.of), torch.from_numpy(groups.quotas)) if groups.several else None
    order, _ = eliminate_dense(reduced, int(groups.quotas.sum()), "scaled", quotas)
    first = np.zeros(n, dtype=bool)
    first[order.numpy()] = True
    starts = [first] if start is None else [first, np.asarray(start, dtype=bool)]
    if deadline.expired():
        return min((value_of(square, mask) for mask in starts), key=lambda candidate: candidate.value)
    limit = 0.3 * deadline.remaining()
    inner = Deadline(None if math.isinf(limit) else limit)
    swaps = int(min(_GROUPED_SWAPS if groups.several else _TABU_SWAPS, 1e9 / n**2))
    found = search(dense, [~mask for mask in starts], swaps, np.random.default_rng(seed), inner)
    # Rounding along the walk may overrate what it found: the starts are compared by their own values.
    candidates = [value_of(square, mask) for mask in (~found.kept, *starts)]
    return min(candidates, key=lambda candidate: candidate.value)


def must_stay(square: Square, best: Incumbent) -> Mask:
    """Weights out of the incumbent's scale whose removal alone costs more than it, bool (n,)."""
    large = 0.5 * square.centre**2 > _OUT_OF_SCALE * best.value
    if best.value <= ZERO or not large[~best.pruned].any():
        return np.zeros(large.size, dtype=bool)
    return np.asarray(large & ~best.pruned & (square.removal_costs() > best.value * (1.0 + 1e-6)))
