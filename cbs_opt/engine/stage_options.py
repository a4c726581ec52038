"""Options of staged pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from itertools import pairwise

import torch

from cbs_opt.data.distillation import Distillation
from cbs_opt.data.trees import Tree
from solvers.arguments import integer, number, sparsity_of
from solvers.errors import OptionError, UnknownNameError

#: Fewest samples whose batch statistics a gradient is taken under.
LEAST_BATCH = 16
#: (inputs of a batch, generator) → inputs of the same shapes, e.g. randomly cropped and flipped.
Augmentation = Callable[[Tree, torch.Generator], Tree]


class Schedule(str, Enum):
    """Shapes of schedules; see `cbs_opt.engine.plan`."""

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


@dataclass(frozen=True)
class StageOptions:
    """How weights are removed in stages; see `cbs_opt.engine.stages` for what a stage does.

    Attributes
    ----------
    n_stages : int
        Stages that remove weights.
    n_polish : int, optional
        Stages at the final sparsity that refit, and swap where it pays (`regrow`). None is 5, and 0 where the network
        is trained between stages.
    schedule : str, optional
        ``exponential``, ``polynomial`` (cubic) or ``linear`` (`cbs_opt.engine.plan`). None is polynomial where the
        network is trained between stages, else exponential.
    first_sparsity : float, optional
        Sparsity of the first stage, from which the schedule then goes on.
    levels : tuple of float, optional
        The sparsity after each stage, instead of `n_stages` and `schedule`; those beyond the target are left out.
    search_damping : bool
        Choose λ in every stage by the loss on held-out training data, starting from the last choice; otherwise it stays
        as it is given.
    search_step : bool
        Likewise the length of the step.
    step_damping : float, optional
        λ that steps start from, or keep if it is not searched; None takes that of the choice.
    max_evaluations : int
        Most losses a search may take in a stage, beside two for the momentum.
    momentum : float
        Share of the last stage's step that may be added to the new one, whole or halved, where that lowers the loss:
        few rows span few directions, and along the others steps are short. 0 never tries.
    held_out : int
        Training samples kept from the gradients and used by the searches; at most a fifth of the data.
    first_order : bool, optional
        Whether the choice of weights sees the gradient, as steps always do. With few rows it is noisy, and a choice may
        count on gains that no step brings. None chooses and refits both ways in each stage that prunes, and keeps what
        has the lower loss on held-out training data, unless `FisherOptions.first_order` asks for it.
    centred : bool
        Rows are taken relative to their mean, so that AᵀA ≈ H/b without the gradient's own outer product, which would
        shorten the steps.
    regrow : float
        In every stage this many removed weights, relative to those kept, may come back: those that promise most by
        gradient and curvature; the solver then chooses among these and the kept ones. The last `settle` stages swap
        nothing.
    settle : int
        See `regrow`.
    batch_norm : bool
        Let the statistics of batch norms follow the weights: gradients (of rows of `LEAST_BATCH` samples or more) and
        losses are those under the statistics of the batch, and the running ones are re-estimated after each stage.
        Otherwise they stay as they are.
    batch_norm_samples : int
        Samples for that.
    augment : callable, optional
        Augmentation of the inputs, for networks trained with one: on samples as they are their gradients vanish.
    distillation : Distillation, optional
        The loss asks for the outputs of the dense network beside the labels.
    """

    n_stages: int = 15
    n_polish: int | None = None
    schedule: str | None = None
    first_sparsity: float | None = None
    levels: tuple[float, ...] | None = None
    search_damping: bool = True
    search_step: bool = True
    step_damping: float | None = None
    max_evaluations: int = 12
    held_out: int = 2000
    first_order: bool | None = None
    centred: bool = True
    regrow: float = 0.0
    settle: int = 2
    batch_norm: bool = True
    batch_norm_samples: int = 4000
    augment: Augmentation | None = None
    momentum: float = 0.0
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("n_stages", 0),
            ("n_polish", 0),
            ("max_evaluations", 1),
            ("held_out", 1),
            ("settle", 0),
            ("batch_norm_samples", 1),
        ):
            if getattr(self, name) is not None or name != "n_polish":
                integer(name, getattr(self, name), least)
        if self.schedule is not None:
            Schedule.parse(self.schedule)
        if self.first_sparsity is not None:
            sparsity_of(self.first_sparsity)
        if self.levels is not None:
            if not self.levels:
                raise OptionError("levels is empty; give the sparsity after each stage, or None for a schedule")
            levels = [sparsity_of(level) for level in self.levels]
            if any(b < a for a, b in pairwise(levels)):
                raise OptionError(f"levels must not fall, not {self.levels!r}: weights are removed stage by stage")
        if self.step_damping is not None:
            number("step_damping, if not None,", self.step_damping, positive=True)
        number("regrow", self.regrow, least=0)
        if self.regrow > 0 and self.first_order is False:
            raise OptionError("regrow needs the gradient: weights come back by it; leave first_order=False out")
        if number("momentum", self.momentum, least=0) >= 1.0:
            raise OptionError(f"momentum must lie in [0, 1), not {self.momentum!r}")

    def settled(self, trains: bool = False) -> StageOptions:
        """With the defaults that depend on whether the network is trained between stages."""
        schedule = (Schedule.POLYNOMIAL if trains else Schedule.EXPONENTIAL).value
        return replace(
            self,
            n_polish=(0 if trains else 5) if self.n_polish is None else self.n_polish,
            schedule=schedule if self.schedule is None else self.schedule,
        )

    @classmethod
    def of(cls, stages: int | StageOptions) -> StageOptions:
        """Options from a number of stages.

        Raises
        ------
        OptionError
            If `stages` is neither.
        """
        if isinstance(stages, cls):
            return stages
        return cls(n_stages=integer("stages, if not StageOptions,", stages))

    def describe(self) -> str:
        """All options in one line, the same for equal options, for journals."""
        parts = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "augment":
                value = None if value is None else getattr(value, "__qualname__", type(value).__qualname__)
            parts.append(f"{entry.name}={value!r}")
        return ", ".join(parts)
