"""What is done to a network, in order: a plan is a sequence of steps.

`Prune` removes weights until a number of them stays; `Polish` leaves the number as it is, refits and swaps where that
pays. One shot is a plan of a single `Prune`, on gradients taken once. In stages every step starts with gradients at the
weights that the step before has left, and how steps are taken is said by `StageOptions`.

With K_0 weights at the start, K at the end, N stages and t = i/N after stage i = 1 … N:

    exponential   K_0 (K/K_0)^t                       the same fraction goes in every stage
    polynomial    K + (K_0 − K)(1 − t)³               Zhu and Gupta, *To prune, or not to prune*, 2017
    linear        K_0 − (K_0 − K) t

``first`` makes the first stage go straight to a sparsity that costs a network nothing, and spreads the others over
what is left: late stages matter, and early ones are the dear ones.

Where the plan fine-tunes, a `Train` follows each stage: those before the last share what `FineTune.final` leaves of the
steps in equal parts. After the last step, of one shot and of layer by layer too, a `Distill` may follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cbs_opt.engine.fine_tune import FineTune
from cbs_opt.engine.stage_options import Schedule, StageOptions
from solvers.errors import OptionError


@dataclass(frozen=True)
class Prune:
    """Remove weights until `n_kept` stay."""

    n_kept: int


@dataclass(frozen=True)
class Polish:
    """Refit the weights that stay and swap where it pays; undone if the loss does not fall."""


@dataclass(frozen=True)
class Train:
    """Train under the masks, from one share of the steps of a `FineTune` to another."""

    begin: float
    end: float


Step: TypeAlias = Prune | Polish | Train


@dataclass(frozen=True)
class Plan:
    """Steps in order.

    Attributes
    ----------
    steps : tuple of Step
    stages : StageOptions, optional
        How steps are taken, each at gradients of its own; None for one shot, a single `Prune`.
    finetune : FineTune, optional
        What is shared out among the `Train` steps.

    Raises
    ------
    OptionError
        For several steps without options.
    """

    steps: tuple[Step, ...]
    stages: StageOptions | None = None
    finetune: FineTune | None = None

    def __post_init__(self) -> None:
        if self.stages is None and (len(self.steps) != 1 or not isinstance(self.steps[0], Prune)):
            raise OptionError("one shot is a single Prune; a plan of other steps needs StageOptions")
        if self.finetune is None and any(isinstance(step, Train) for step in self.steps):
            raise OptionError("a plan that trains needs a FineTune")

    @property
    def n_stages(self) -> int:
        """Steps that take gradients."""
        return sum(not isinstance(step, Train) for step in self.steps)

    @classmethod
    def one_shot(cls, n_kept: int) -> Plan:
        """Gradients once, one choice, one update."""
        return cls((Prune(n_kept),))

    @classmethod
    def staged(
        cls,
        options: StageOptions,
        *,
        n: int,
        n_kept: int,
        n_start: int | None = None,
        finetune: FineTune | None = None,
    ) -> Plan:
        """The steps that `options` ask for.

        Parameters
        ----------
        options : StageOptions
        n : int
            Prunable weights.
        n_kept : int
            Weights that stay at the end.
        n_start : int, optional
            Weights that are still there; None means all.
        finetune : FineTune, optional
            Train after each stage.

        Raises
        ------
        OptionError
            For numbers that do not fit.
        """
        options = options.settled(trains=finetune is not None)
        start = n if n_start is None else n_start
        if not 0 <= n_kept <= start:
            raise OptionError(f"n_kept must lie in [0, {start}], the weights still there, not {n_kept}")
        if options.levels is not None:
            levels = [int(n * (1.0 - level)) for level in options.levels]
            counts = (*(k for k in levels if n_kept < k <= start), n_kept)
        elif options.n_stages == 0:
            if n_kept != start:
                raise OptionError(f"n_stages=0 only polishes, but {start - n_kept} weights are still to be removed")
            counts = ()
        else:
            first = None if options.first_sparsity is None else int(n * (1.0 - options.first_sparsity))
            assert options.schedule is not None
            counts = kept_after_stages(options.schedule, start, n_kept, options.n_stages, n_first=first)
        steps: list[Step] = []
        for count in counts:
            # A level that is listed twice is a step at which nothing is left to remove.
            steps.append(Prune(count) if count < start else Polish())
            start = count
        steps += (Polish(),) * (options.n_polish or 0)
        if finetune is not None:
            steps = _with_training(steps, finetune.final)
        return cls(tuple(steps), options, finetune)


def _with_training(stages: list[Step], final: float) -> list[Step]:
    """Each stage followed by its share of the training."""
    early = len(stages) - 1
    bounds = [(1.0 - final) * i / early for i in range(early + 1)] if early > 0 else [0.0]
    return [
        step
        for stage, begin, end in zip(stages, bounds, (*bounds[1:], 1.0), strict=True)
        for step in (stage, Train(begin, end))
    ]


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
