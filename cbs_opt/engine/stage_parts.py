"""What a stage hands from one of its parts to the next."""

from __future__ import annotations

import time
from dataclasses import dataclass

from solvers import Solution
from solvers.arrays import Array, Mask


@dataclass(frozen=True, eq=False)
class Chosen:
    """Removed weights (n,), what the solver found where it was asked, whether it saw the gradient."""

    pruned: Mask
    solution: Solution | None = None
    first_order: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """New weights, λ for the next stage, length (0 = rejected), loss, loss under the mask alone, momentum."""

    weights: Array
    damping: float
    length: float
    loss: float
    masked: float
    momentum: float = 0.0


class Clock:
    """Wall time since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or the beginning."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
