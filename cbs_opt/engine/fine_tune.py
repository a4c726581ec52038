"""Options of fine-tuning, and the step lengths along it.

With T steps in all, η the first length and w the share of them that it rises over, the length of step t = 0 … T − 1 is

    η (t + 1) / (w T)                      while t < w T
    η ρ((t − w T) / (T − w T))             then;   ρ(u) = 1, 1 − u, ½ (1 + cos π u): constant, linear, cosine

or η ρ(t / T) with a function ρ of one's own.

Source of the half cosine: Loshchilov and Hutter, *SGDR: stochastic gradient descent with warm restarts*, 2017.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from cbs_opt.data.distillation import Distillation
from cbs_opt.data.trees import Tree
from cbs_opt.engine.masked_training import PARAMETERS
from solvers.arguments import flag, integer, number, one_of
from solvers.errors import OptionError

#: (tensors) → an optimiser of these tensors.
OptimizerFactory: TypeAlias = Callable[[list[Tensor]], Optimizer]
#: Shapes of the step length.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "linear": lambda u: 1.0 - u,
    "constant": lambda u: 1.0,
}
#: Length of the first step where none is given, by optimiser.
_LENGTHS = {"sgd": 0.05, "adamw": 1e-3, "adam": 1e-3, "rmsprop": 1e-3}
OPTIMIZERS = tuple(_LENGTHS)
PRECISIONS = ("bf16", "fp16")
#: Beyond it the arithmetic of single precision ends.
_LARGEST_LR = 1e6


@dataclass(frozen=True)
class FineTune:
    """How a pruned network is trained on, its masks held; see `cbs_opt.engine.tuning`.

    One of `epochs` and `steps` is given. In stages they are shared out among them.

    Attributes
    ----------
    epochs : float, optional
        Passes over the training samples that are not held out.
    steps : int, optional
        Steps of the optimiser, instead.
    optimizer : {"sgd", "adamw", "adam", "rmsprop"} or callable
        A callable gets the tensors that are trained and returns a `torch.optim.Optimizer` of them, with step lengths
        (and decay) of its own, which the schedule multiplies.
    lr : float, optional
        Longest step. None is 0.05 for sgd, else 1e-3.
    schedule : {"cosine", "linear", "constant"} or callable
        How the length falls; a callable gets the share of the steps that are done, in [0, 1), and returns a factor.
    warmup : float in [0, 1)
        Share of the steps over which the length rises linearly to `lr`.
    batch_size : int, optional
        Samples of a step. None is 128, and layer by layer what a batch of the data holds.
    momentum : float in [0, 1)
        Of sgd and rmsprop.
    weight_decay : float
        Of matrices and filters; biases and norms are left out of it.
    clip : float
        Norm to which gradients are cut; 0 cuts nothing.
    distill : float in (0, 1], optional
        Weight of the dense network's outputs in the loss, beside 1 − distill of the loss itself; or a
        `cbs_opt.Distillation`, which has the temperature too. It takes outputs that are logits over the last dimension.
    temperature : float
        T of `cbs_opt.data.distillation`.
    parameters : {"all", "layers"}
        What is trained: all that is not frozen, or the kept weights of the prunable layers alone.
    train_mode : bool
        Whether the network is in train mode meanwhile: dropout drops, batch norms normalise by the batch and follow it.
    augment : callable, optional
        (inputs, generator) → inputs of the same shapes, e.g. randomly cropped and flipped.
    held_out : float in (0, 0.5]
        Share of the training samples that no step sees, some 5,000 at most; by the loss on them the best state is kept.
    evaluations : int
        How often that loss is taken on the way.
    patience : int, optional
        Stop after so many of these in a row that are no better than the best; None never does.
    mixed_precision : {"bf16", "fp16"}, optional
        Multiply in 16 bits, the weights themselves and their steps in single precision; fp16, with a scaled loss, on a
        GPU alone.
    final : float in (0, 1]
        In stages: the share of the steps that comes after the last of them, at the final sparsity; those before have
        the rest in equal parts.
    checkpoint_every : int, optional
        With a journal: steps after which the state is written to it. None is after each evaluation.

    Raises
    ------
    OptionError, UnknownNameError
    """

    epochs: float | None = None
    steps: int | None = None
    optimizer: str | OptimizerFactory = "sgd"
    lr: float | None = None
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.0
    batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float = 1.0
    distill: Distillation | float | None = None
    temperature: float = 2.0
    parameters: str = "all"
    train_mode: bool = True
    augment: Callable[[Tree, torch.Generator], Tree] | None = None
    held_out: float = 0.1
    evaluations: int = 10
    patience: int | None = None
    mixed_precision: str | None = None
    final: float = 0.5
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        self._set(self._checked_lengths())
        one_of("kind of parameters", self.parameters, PARAMETERS)
        flag("train_mode", self.train_mode)
        if self.augment is not None and not callable(self.augment):
            raise OptionError(f"augment must be a function of (inputs, generator), not {self.augment!r}")
        if self.mixed_precision is not None:
            one_of("precision", self.mixed_precision, PRECISIONS)
        for name in ("batch_size", "patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                self._set({name: integer(f"{name}, if not None,", getattr(self, name))})
        self._set({"evaluations": integer("evaluations", self.evaluations)})
        for name, most in (("held_out", 0.5), ("final", 1.0)):
            value = number(name, getattr(self, name))
            if not 0.0 < value <= most:
                raise OptionError(f"{name} must lie in (0, {most:g}], not {value!r}")
            self._set({name: value})
        if self.distill is not None:
            given = self.distill
            made = given if isinstance(given, Distillation) else Distillation(number("distill", given), 1.0)
            self._set({"distill": made.weight})
            if isinstance(given, Distillation):
                self._set({"temperature": made.temperature})
        self._set({"temperature": number("temperature", self.temperature, positive=True)})

    def _checked_lengths(self) -> dict[str, object]:
        """How many steps, of what length."""
        if (self.epochs is None) == (self.steps is None):
            raise OptionError(
                f"give one of epochs and steps, not epochs={self.epochs!r} and steps={self.steps!r}; "
                "FineTune(epochs=3) passes over the training data three times"
            )
        made: dict[str, object] = {}
        if self.epochs is not None:
            made["epochs"] = number("epochs", self.epochs, positive=True)
        else:
            made["steps"] = integer("steps", self.steps)
        if callable(self.optimizer) and not isinstance(self.optimizer, str):
            if self.lr is not None or self.weight_decay:
                raise OptionError("an optimizer of one's own has its lr and weight_decay itself; leave them out here")
        else:
            name = one_of("optimizer", self.optimizer, OPTIMIZERS)
            given = _LENGTHS[name] if self.lr is None else self.lr
            remedy = f"at most {_LARGEST_LR:g}"
            made["lr"] = number("lr", given, positive=True, most=_LARGEST_LR, remedy=remedy)
        if not callable(self.schedule):
            one_of("schedule", self.schedule, SCHEDULES)
        for name in ("warmup", "momentum"):
            if number(name, getattr(self, name), least=0.0) >= 1.0:
                raise OptionError(f"{name} must lie in [0, 1), not {getattr(self, name)!r}")
        made["weight_decay"] = number("weight_decay", self.weight_decay, least=0.0)
        made["clip"] = number("clip", self.clip, least=0.0)
        return made

    def _set(self, values: dict[str, object]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: FineTune | float) -> FineTune:
        """Options from a number of epochs; raises OptionError if it is neither."""
        return value if isinstance(value, cls) else cls(epochs=number("finetune, if not FineTune,", value))

    @property
    def distillation(self) -> Distillation | None:
        """`distill` and `temperature` together."""
        return None if self.distill is None else Distillation(self.distill, self.temperature)  # type: ignore[arg-type]

    def n_steps(self, per_epoch: float) -> int:
        """Steps in all, from those of one pass."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(round(self.epochs * per_epoch), 1)

    def rate(self, step: int, steps: int) -> float:
        """The factor of the length of a step, of so many in all."""
        rise = self.warmup * steps
        if step < rise:
            return min((step + 1) / rise, 1.0)
        if isinstance(self.schedule, str):
            return SCHEDULES[self.schedule]((step - rise) / max(steps - rise, 1.0))
        return number("what the schedule returns", self.schedule(step / steps), least=0.0)

    def optimiser(self, tensors: list[Tensor]) -> Optimizer:
        """An optimiser of some tensors.

        Raises
        ------
        OptionError
            If a callable returns anything else than an optimiser of these, or one that calls back.
        """
        if isinstance(self.optimizer, str):
            return _named(self, tensors)
        try:
            made = self.optimizer(list(tensors))
        except Exception as error:
            raise OptionError(f"the optimizer function fails: {type(error).__name__}: {error}") from error
        if not isinstance(made, Optimizer):
            raise OptionError(f"the optimizer function must return a torch.optim.Optimizer, not {type(made).__name__}")
        known, used = set(map(id, tensors)), [p for group in made.param_groups for p in group["params"]]
        if not used or any(id(p) not in known for p in used):
            raise OptionError("the optimizer function must optimise the tensors that it is given, and no others")
        closure = inspect.signature(type(made).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise OptionError(f"{type(made).__name__} takes a closure, which fine-tuning does not have; use another")
        return made

    @property
    def optimizer_name(self) -> str:
        """In words."""
        return self.optimizer if isinstance(self.optimizer, str) else _called(self.optimizer)

    def describe(self) -> str:
        """All options in one line, the same for equal options, for journals."""
        values = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        # How often it is written does not change what is written.
        shown = ((n, _called(v) if callable(v) else v) for n, v in values if n != "checkpoint_every")
        return ", ".join(f"{name}={value!r}" for name, value in shown)


def _named(options: FineTune, tensors: list[Tensor]) -> Optimizer:
    decayed = [t for t in tensors if t.dim() > 1]
    others = [t for t in tensors if t.dim() <= 1]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, options.weight_decay), (others, 0.0))
        if group
    ]
    lr = options.lr
    assert lr is not None
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=options.momentum, nesterov=options.momentum > 0.0)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, momentum=options.momentum)
    return (torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam)(groups, lr=lr)


def _called(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
