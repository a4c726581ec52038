"""How many weights stay after each stage of a staged pruning.

With K_0 weights at the start, K at the end, N stages and t = i/N after stage i = 1 … N:

    exponential   K_0 (K/K_0)^t                       the same fraction goes in every stage
    polynomial    K + (K_0 − K)(1 − t)³               Zhu and Gupta, *To prune, or not to prune*, 2017
    linear        K_0 − (K_0 − K) t

``first`` makes the first stage go straight to a sparsity that costs a network nothing, and spreads the others over
what is left: late stages matter, and early ones are the dear ones.
"""

from __future__ import annotations

from enum import Enum

from solvers.errors import OptionError, UnknownNameError


class Schedule(str, Enum):
    """Shapes of schedules; see the module's docstring."""

    EXPONENTIAL = "exponential"
    POLYNOMIAL = "polynomial"
    LINEAR = "linear"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: Schedule | str) -> Schedule:
        """The schedule of that name; raises UnknownNameError."""
        try:
            return cls(value)
        except ValueError:
            raise UnknownNameError.of("schedule", str(value), [s.value for s in cls]) from None


def kept_after_stages(
    schedule: Schedule | str, n_start: int, n_kept: int, n_stages: int, *, n_first: int | None = None
) -> tuple[int, ...]:
    """Weights that stay after each stage.

    Parameters
    ----------
    schedule : Schedule or str
    n_start, n_kept : int
        Weights at the start and at the end, 0 ≤ n_kept ≤ n_start.
    n_stages : int
        N ≥ 1.
    n_first : int, optional
        Weights that stay after the first stage; the others follow the schedule from there. Not below `n_kept`.

    Returns
    -------
    tuple of int
        Length N, never increasing, the last entry exactly `n_kept`.

    Raises
    ------
    OptionError
        For counts that make no sense.
    UnknownNameError
        For a schedule that does not exist.
    """
    shape = Schedule.parse(schedule)
    if n_stages < 1:
        raise OptionError(f"the number of stages must be at least 1, not {n_stages!r}")
    if not 0 <= n_kept <= n_start:
        raise OptionError(f"n_kept must lie in [0, {n_start}], the weights there are, not {n_kept}")
    if n_first is None or n_stages == 1:
        return tuple(_after(shape, n_start, n_kept, i / n_stages) for i in range(1, n_stages + 1))
    first = min(n_start, max(n_kept, n_first))
    rest = n_stages - 1
    return (first, *(_after(shape, first, n_kept, i / rest) for i in range(1, rest + 1)))


def _after(shape: Schedule, n_start: int, n_kept: int, t: float) -> int:
    """Weights that stay at time t in (0, 1]."""
    if t >= 1.0 or n_start == n_kept:
        return n_kept
    if shape is Schedule.EXPONENTIAL:
        # A schedule towards no weight at all would be there at once.
        value = n_start * (max(n_kept, 1) / n_start) ** t
    elif shape is Schedule.POLYNOMIAL:
        value = n_kept + (n_start - n_kept) * (1.0 - t) ** 3
    else:
        value = n_start - (n_start - n_kept) * t
    return min(n_start, max(n_kept, int(value + 1e-9)))
