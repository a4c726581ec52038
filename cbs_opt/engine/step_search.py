"""Damping and length of a step, chosen by the loss of the network on training samples that no gradient saw.

The steps w_S + t d(λ) form a grid in (log λ, log t). The search starts at the last damping and the full step, looks at
the four neighbours, moves to the best point seen so far, and ends where that is the one it stands on. The best of them
is then tried with a share of the step before added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cbs_opt.engine.stage_options import StageOptions
from solvers.arrays import Array

#: Ratio of neighbouring dampings, and how far from the last one a search may go.
DAMPING_RATIO, DAMPING_REACH = 4.0, 300.0
LONGEST_STEP, SHORTEST_STEP = 16.0, 1.0 / 32.0


@dataclass(frozen=True, eq=False)
class FoundStep:
    """The best step: weights (n,), λ relative to the last one, length, loss, share of the step before."""

    weights: Array
    ratio: float
    length: float
    loss: float
    momentum: float = 0.0


def search_step(
    start: Array,
    step: Callable[[float], Array],
    loss: Callable[[Array], float],
    options: StageOptions,
    previous: Array | None = None,
) -> FoundStep:
    """The step with the lowest loss.

    Parameters
    ----------
    start : float64 (n,)
        Where steps start.
    step : callable
        λ relative to the last one → d, float64 (n,).
    loss : callable
        Weights (n,) → loss.
    options : StageOptions
        Whether λ and the length are searched, and the number of losses that may be taken. With neither, the full step
        at the last λ is returned.
    previous : float64 (n,), optional
        The step before.
    """
    losses: dict[tuple[float, float], float] = {}
    steps: dict[float, Array] = {}

    def judge(point: tuple[float, float]) -> None:
        ratio, length = point
        if ratio not in steps:
            steps[ratio] = step(ratio)
        losses[point] = loss(start + length * steps[ratio])

    here = (1.0, 1.0)
    judge(here)
    while len(losses) < options.max_evaluations:
        for point in _neighbours(*here, options):
            if point not in losses and len(losses) < options.max_evaluations:
                judge(point)
        best = min(losses, key=lambda point: losses[point])
        if best == here:
            break
        here = best
    here = min(losses, key=lambda point: losses[point])
    found = FoundStep(start + here[1] * steps[here[0]], *here, losses[here])
    if previous is None or options.momentum == 0.0:
        return found
    plain = found.weights
    for share in (options.momentum, 0.5 * options.momentum):
        weights = plain + share * previous
        value = loss(weights)
        if value < found.loss:
            found = FoundStep(weights, *here, value, share)
    return found


def _neighbours(ratio: float, length: float, options: StageOptions) -> list[tuple[float, float]]:
    """A change of λ first: it changes the direction too."""
    found = []
    if options.search_damping:
        dampings = (ratio * DAMPING_RATIO, ratio / DAMPING_RATIO)
        found += [(f, length) for f in dampings if 1.0 / DAMPING_REACH <= f <= DAMPING_REACH]
    if options.search_step:
        found += [(ratio, t) for t in (2.0 * length, 0.5 * length) if SHORTEST_STEP <= t <= LONGEST_STEP]
    return found
