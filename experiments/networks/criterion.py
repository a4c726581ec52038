"""What the network of an experiment is judged by: its calibration loss, and one figure on test data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cbs_opt.data.forward import LossFunction


@dataclass(frozen=True)
class Metric:
    """The figure on test data.

    Attributes
    ----------
    name
        Field of the rows that holds it; ``dense_`` before it is the dense network's.
    heading
        Of a column.
    unit
        Written after a value.
    lower_is_better
    """

    name: str
    heading: str
    unit: str = ""
    lower_is_better: bool = False

    def shown(self, value: float | None) -> str:
        """A value with what it is; None, in rows, is one that is not finite."""
        number = "not finite" if value is None else f"{value:.2f}{self.unit}"
        return number if self.unit else f"{self.name} {number}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "test %", unit=" %"),
        Metric("agreement", "agreement %", unit=" %"),
        Metric("perplexity", "perplexity", lower_is_better=True),
    )
}


@dataclass(frozen=True)
class Criterion:
    """How a network of some kind is judged.

    Attributes
    ----------
    metric
    loss
        The calibration loss, as `cbs_opt.prune` takes it.
    score
        (network in any mode, test data of its data set, device) → the metric.
    """

    metric: Metric
    loss: LossFunction
    score: Callable[[nn.Module, Any, torch.device], float]
