"""Whose gradients are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from cbs_opt.data.calibration import CalibrationData, Index
from cbs_opt.data.forward import Forward
from cbs_opt.data.trees import Tree, split_rows
from cbs_opt.network.layers import PrunableLayers

#: (inputs, targets) of some rows, tensors (R, b, ...).
Rows: TypeAlias = tuple[Tree, Tree | None]


@dataclass(frozen=True, eq=False)
class Subject:
    """A network in eval mode on a device, its layers, its data, and how it is called."""

    model: nn.Module
    layers: PrunableLayers
    data: CalibrationData
    forward: Forward
    device: torch.device

    def rows(self, index: Index) -> Rows:
        """The samples of some rows, index int64 (R, b)."""
        inputs, targets = self.data.batch(index.reshape(-1), self.device)
        rows, size = index.shape
        return split_rows(inputs, rows, size), None if targets is None else split_rows(targets, rows, size)
