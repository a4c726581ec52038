"""Randomised magnitude pruning (RMP): magnitude selection inside random groups, the best of several draws.

Draw 0 is global magnitude pruning. Every other draw permutes all n weights, cuts the permutation into
min(⌊√n⌋, 1000) groups of (almost) equal size and keeps the largest |w| of each. The draw with the lowest
calibration loss is returned, or, without a callback, the one with the lowest objective
(Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022, section 4.1).

Under a partition each of its groups is drawn from in this way.

Exactly n_kept weights are kept: group c of size m_c keeps ⌊n_kept m_c / n⌋ and the remainder is spread over
groups drawn at random. (The published code rounds up in every group and keeps too many.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from solvers.budget import Partitioned
from solvers.curvature import LowRank
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, RANKED, Capability, Context, Deadline, Solver, option

Ranks = npt.NDArray[np.int32]

#: Entries of a batch of masked weight vectors that are projected in one product.
_BATCH_ENTRIES = 1 << 21
#: Relative error allowed for a product in the factor's own precision; draws closer than this are compared in float64.
_SCREEN_TOLERANCE = 1e-4


def grouped_magnitude(rank: Ranks, n_prune: int, rng: np.random.Generator) -> Mask:
    """One draw: remove exactly `n_prune` weights, the smallest within random groups; bool (n,).

    Parameters
    ----------
    rank : int32 (n,)
        Position of each weight in the order of |w|, so that sorting ranks sorts magnitudes.
    """
    n = rank.shape[0]
    groups = min(math.isqrt(n), 1000)
    bounds = np.arange(groups + 1) * n // groups
    sizes = np.diff(bounds)
    kept = sizes * (n - n_prune) // n
    room = np.flatnonzero(kept < sizes)
    missing = n - n_prune - int(kept.sum())
    # Each floor loses less than one, so fewer weights are missing than groups have room.
    kept[rng.permutation(room)[:missing]] += 1
    # Group sizes differ by at most one: a table with a sentinel where a group is short.
    position = np.arange(int(sizes.max()))
    shuffled = np.append(rank[rng.permutation(n)], np.int32(n))
    table = shuffled[np.where(position < sizes[:, None], bounds[:-1, None] + position, n)]
    table.sort(axis=1)
    lowest = np.zeros(n, dtype=bool)
    lowest[table[position < (sizes - kept)[:, None]]] = True
    return lowest[rank]


def magnitude_draws(problem: SelectionProblem, draws: int, rng: np.random.Generator) -> Iterator[Mask]:
    """Global magnitude pruning, then `draws` − 1 grouped ones."""
    if isinstance(problem.budget, Partitioned):
        yield from _partition_draws(problem.weights, problem.budget, draws, rng)
        return
    order = np.argsort(np.abs(problem.weights), kind="stable")
    rank = np.empty(problem.n, dtype=np.int32)
    rank[order] = np.arange(problem.n, dtype=np.int32)
    yield rank < problem.n_prune
    for _ in range(draws - 1):
        yield grouped_magnitude(rank, problem.n_prune, rng)


def _partition_draws(weights: Array, budget: Partitioned, draws: int, rng: np.random.Generator) -> Iterator[Mask]:
    """The same within every group of a partition, groups of one size together."""
    size = np.abs(weights)
    yield budget.cheapest_of(size)
    for _ in range(draws - 1):
        pruned = np.empty(weights.size, dtype=bool)
        for first, last in budget.runs:
            where = slice(int(budget.starts[first]), int(budget.starts[last]))
            table, out = (
                size[where].reshape(last - first, -1),
                np.empty((last - first, budget.sizes[first]), dtype=bool),
            )
            order = rng.random(table.shape).argsort(axis=1)
            m, counts = table.shape[1], budget.quotas[first:last, None]
            chunks = min(math.isqrt(m), 1000)
            bounds = np.arange(chunks + 1) * m // chunks
            sizes = np.diff(bounds)
            kept = sizes * (m - counts) // m
            place = np.where(kept < sizes, rng.random(kept.shape), 2.0).argsort(axis=1).argsort(axis=1)
            kept += place < (m - counts) - kept.sum(axis=1, keepdims=True)
            for chunk, (start, stop) in enumerate(pairwise(bounds.tolist())):
                members = order[:, start:stop]
                ranks = np.take_along_axis(table, members, 1).argsort(axis=1).argsort(axis=1)
                np.put_along_axis(out, members, ranks < (sizes - kept)[:, chunk, None], 1)
            pruned[where] = out.ravel()
        yield pruned


def approximate_selection_values(problem: SelectionProblem, masks: Mask) -> Array:
    """CBS-S of several masks (m, n) at once, in the precision of the factor; float64 (m,)."""
    values = np.zeros(masks.shape[0])
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        removed = block.tensor_of(masks[:, where]).T * block.weights.unsqueeze(1)
        if isinstance(block.curvature, LowRank):
            # Normalised, so that tiny weights do not underflow in float32.
            size = float(block.weights.abs().max()) or 1.0
            image = (block.factor @ (removed / size).to(block.factor.dtype)).double() * size
            value = 0.5 * image.square().sum(0) + 0.5 * block.damping * removed.square().sum(0)
        else:
            value = 0.5 * (removed * block.multiply(removed)).sum(0)
        if block.gradient is not None:
            value = value - block.gradient @ removed
        values += value.cpu().numpy()
    return values


def best_draw(problem: SelectionProblem, draws: int, context: Context) -> tuple[Mask, int]:
    """The best of `draws` masks by calibration loss if there is a callback, else by objective; (mask, draws seen).

    Stops early, with what has been seen, when the deadline expires. By the selection objective all masks of a batch are
    judged at once, and near ties are settled in float64.
    """
    loss = context.calibration_loss
    screens = loss is None and problem.objective is Objective.SELECTION
    size = max(1, _BATCH_ENTRIES // problem.n) if screens else 1
    source = magnitude_draws(problem, draws, context.rng())
    best: list[tuple[float, Mask]] = []
    seen = 0
    while batch := _batch(source, size, context.deadline):
        seen += len(batch)
        if screens:
            values = approximate_selection_values(problem, np.stack(batch)).tolist()
        else:
            values = [(loss or problem.value)(mask) for mask in batch]
        best.extend(zip(values, batch, strict=True))
        least = min(value for value, _ in best)
        limit = least + _SCREEN_TOLERANCE * abs(least) if screens else least
        best = [pair for pair in best if not pair[0] > limit]
        if context.deadline.expired():
            break
    if len(best) > 1 and screens:
        best = [(problem.selection_value(mask), mask) for _, mask in best]
    return min(best, key=lambda pair: pair[0])[1], seen


def _batch(source: Iterator[Mask], size: int, deadline: Deadline) -> list[Mask]:
    """Up to `size` masks, fewer at the end and where time runs out, but one at least."""
    masks = []
    for mask in islice(source, size):
        masks.append(mask)
        if deadline.expired():
            break
    return masks


@dataclass(frozen=True)
class RandomisedMagnitudeSolver(Solver):
    """The paper's starting point: exact cardinality, best draw by calibration loss or objective."""

    name = "rmp"
    summary = "magnitude selection inside random groups, best of several draws"
    reference = "Yu et al., The Combinatorial Brain Surgeon, ICML 2022"
    capabilities = ANY_PROBLEM | {Capability.RANDOMISED, Capability.CALIBRATION, Capability.TIME_LIMIT}

    budgets = RANKED
    apart = True

    draws: int = option(50, "masks drawn; the first is plain magnitude", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Draw, judge, keep the best."""
        pruned, seen = best_draw(problem, self.draws, context)
        reason = Reason.COMPLETED if seen == self.draws else Reason.TIME_LIMIT
        return Proposal(pruned, reason=reason, statistics={"draws": float(seen)})
