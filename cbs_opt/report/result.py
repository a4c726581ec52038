"""What `cbs_opt.prune` returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cbs_opt.network.layers import PrunableLayers
from cbs_opt.report.records import StageRecord
from cbs_opt.report.report import PruneReport
from solvers import Solution


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned network.

    Attributes
    ----------
    model : nn.Module
        A copy of the network given, with new weights under masks (see `cbs_opt.network.masks`).
    masks : dict of str to bool tensor
        By layer name, in the shape of the weight; True = kept.
    report : PruneReport
    pruned : bool (n,)
        True = removed, in the order of the network.
    layers : PrunableLayers
    solution : Solution or None
        What the solver did, in the order of the blocks; None where it was called in several stages.
    stages : tuple of StageRecord
        What each step of the plan did.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: PruneReport
    pruned: npt.NDArray[np.bool_]
    layers: PrunableLayers
    solution: Solution | None
    stages: tuple[StageRecord, ...]

    @cached_property
    def weights(self) -> npt.NDArray[np.float64]:
        """The prunable weights of `model` when first asked for, float64 (n,), zero where pruned."""
        return self.layers.read(self.model).numpy()
