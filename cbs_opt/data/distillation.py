"""Distillation: a calibration loss that asks for the outputs of the dense network beside the labels.

    (1 − α) ℓ(z, y) + α T² KL(softmax(z̄/T) ‖ softmax(z/T)),      z̄ the logits of the dense network.

At the dense network the second term has gradient zero for every sample, not only on average, so near it steps follow
what pruning changed and not the noise of the labels of few samples; and it tells of all classes, so a sample says more.

Source: Hinton, Vinyals and Dean, *Distilling the knowledge in a neural network*, 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.data.forward import Forward
from cbs_opt.data.trees import Tree
from solvers.errors import DataError, ModelError, OptionError


@dataclass(frozen=True)
class Distillation:
    """How much the dense network's outputs count.

    Attributes
    ----------
    weight : float
        α, in (0, 1].
    temperature : float
        T > 0.
    """

    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.weight <= 1.0:
            raise OptionError(f"the weight of a distillation lies in (0, 1], not {self.weight!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise OptionError(f"the temperature of a distillation is positive and finite, not {self.temperature!r}")


class DistilledForward(Forward):
    """A network called as another `Forward` calls it, with the distilled loss; targets are (labels, dense logits).

    Parameters
    ----------
    forward : Forward
    teacher : nn.Module
        The dense network, in eval mode; it is called and never changed.
    options : Distillation
    """

    def __init__(self, forward: Forward, teacher: nn.Module, options: Distillation) -> None:
        self._forward, self._teacher, self._options = forward, teacher, options
        self.loss_fn, self.names = forward.loss_fn, forward.names

    def teacher_logits(self, inputs: Tree, labels: Tree | None) -> Tensor:
        """Logits of the dense network (B, C); raises DataError or ModelError where there are none."""
        if labels is None:
            raise DataError("distillation needs batches that are pairs (x, y); pass them, or leave distillation out")
        with torch.no_grad():
            logits = self._forward.output(self._teacher, inputs, labels)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(f"distillation needs a network whose output is logits (B, C), not {found}")
        return logits

    def output(self, call: Any, inputs: Tree, targets: Tree | None) -> Any:
        """The network's output."""
        return self._forward.output(call, inputs, targets)

    def loss(self, output: Any, inputs: Tree, targets: Tree | None) -> Tensor:
        """The loss of an output."""
        assert isinstance(targets, tuple)
        labels, logits = targets
        assert isinstance(logits, Tensor)
        weight, warmth = self._options.weight, self._options.temperature
        student, teacher = F.log_softmax(output / warmth, 1), F.log_softmax(logits / warmth, 1)
        distance = warmth**2 * (teacher.exp() * (teacher - student)).sum(1).mean()
        if weight == 1.0:
            return distance
        return (1.0 - weight) * self._forward.loss(output, inputs, labels) + weight * distance
