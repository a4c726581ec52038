"""The networks of the literature, with the state-dict names of their published checkpoints."""

from __future__ import annotations

from experiments.models.cifarnet import CIFARNet
from experiments.models.mlp import DigitsMLP, MLPNet
from experiments.models.resnet20 import ResNet20

__all__ = ["CIFARNet", "DigitsMLP", "MLPNet", "ResNet20"]
