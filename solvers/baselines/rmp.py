"""Randomised magnitude pruning (RMP): magnitude selection inside random groups, the best of several draws.

Draw 0 is global magnitude pruning. Every other draw permutes all n weights, cuts the permutation into
min(⌊√n⌋, 1000) groups of (almost) equal size and keeps the largest |w| of each. The draw with the lowest
calibration loss is returned, or, without a callback, the one with the lowest objective
(Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022, section 4.1).

Exactly n_kept weights are kept: group c of size m_c keeps ⌊n_kept m_c / n⌋ and the remainder is spread over
groups drawn at random. (The published code rounds up in every group and keeps too many.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from solvers.curvature import LowRank
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, Capability, Context, Solver, option

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
    order = np.argsort(np.abs(problem.weights), kind="stable")
    rank = np.empty(problem.n, dtype=np.int32)
    rank[order] = np.arange(problem.n, dtype=np.int32)
    yield rank < problem.n_prune
    for _ in range(draws - 1):
        yield grouped_magnitude(rank, problem.n_prune, rng)


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

    Stops early, with what has been seen, when the deadline expires.
    """
    loss = context.calibration_loss
    source = magnitude_draws(problem, draws, context.rng())
    if loss is None and problem.objective is Objective.SELECTION:
        return _best_by_selection(problem, source, context)
    judge = problem.value if loss is None else loss
    best, best_value, seen = None, math.inf, 0
    for mask in source:
        value = judge(mask)
        seen += 1
        if best is None or value < best_value:
            best, best_value = mask, value
        if context.deadline.expired():
            break
    assert best is not None
    return best, seen


def _best_by_selection(problem: SelectionProblem, source: Iterator[Mask], context: Context) -> tuple[Mask, int]:
    """All draws through one matrix product per batch; near ties are settled in float64."""
    size = max(1, _BATCH_ENTRIES // problem.n)
    masks: list[Mask] = []
    values: list[float] = []
    batch: list[Mask] = []
    seen = 0

    def flush() -> None:
        values.extend(approximate_selection_values(problem, np.stack(batch)))
        masks.extend(batch)
        batch.clear()
        order = np.argsort(values, kind="stable")
        close = values[order[0]] + _SCREEN_TOLERANCE * abs(values[order[0]])
        survivors = [int(i) for i in np.sort(order) if values[i] <= close]
        masks[:], values[:] = [masks[i] for i in survivors], [values[i] for i in survivors]

    for mask in source:
        batch.append(mask)
        seen += 1
        if len(batch) == size:
            flush()
        if context.deadline.expired():
            break
    if batch:
        flush()
    exact = [problem.selection_value(mask) for mask in masks] if len(masks) > 1 else [0.0]
    return masks[int(np.argmin(exact))], seen


@dataclass(frozen=True)
class RandomisedMagnitudeSolver(Solver):
    """The paper's starting point: exact cardinality, best draw by calibration loss or objective."""

    name = "rmp"
    summary = "magnitude selection inside random groups, best of several draws"
    reference = "Yu et al., The Combinatorial Brain Surgeon, ICML 2022"
    capabilities = ANY_PROBLEM | {Capability.RANDOMISED, Capability.CALIBRATION, Capability.TIME_LIMIT}

    draws: int = option(50, "masks drawn; the first is plain magnitude", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Draw, judge, keep the best."""
        pruned, seen = best_draw(problem, self.draws, context)
        reason = Reason.COMPLETED if seen == self.draws else Reason.TIME_LIMIT
        return Proposal(pruned, reason=reason, statistics={"draws": float(seen)})
