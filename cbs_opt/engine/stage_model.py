"""The quadratic model of one stage, cut to whichever weights are in question."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cbs_opt.measure.blocks import Partition
from cbs_opt.measure.gradients import GradientSample
from solvers import Objective, QuadraticBlock, SelectionProblem
from solvers.arrays import Array, Mask


class StageModel:
    """The quadratic model at some weights.

    Parameters
    ----------
    partition : Partition
        Of consecutive ranges.
    sample : GradientSample
    weights : float64 (n,)
    """

    def __init__(self, partition: Partition, sample: GradientSample, weights: Array) -> None:
        self.weights = weights
        self._factor, self._gradient = sample.factor, sample.gradient
        self._w = torch.from_numpy(weights).to(self._factor.device)
        self._names, self._slices = partition.names, partition.slices

    def problem(self, active: Mask, n_prune: int, damping: float) -> tuple[SelectionProblem, npt.NDArray[np.int64]]:
        """(problem over the active weights, their numbers)."""
        blocks = []
        for name, where in zip(self._names, self._slices, strict=True):
            index = torch.from_numpy(np.flatnonzero(active[where]) + where.start).to(self._factor.device)
            if index.numel() == 0:
                continue
            whole = index.numel() == where.stop - where.start
            columns = self._factor[:, where] if whole else self._factor.index_select(1, index)
            blocks.append(QuadraticBlock(self._w[index], columns, damping, self._gradient[index], name))
        return SelectionProblem(blocks, n_prune, Objective.JOINT), np.flatnonzero(active)

    def most_wanted(self, pruned: Mask, count: int) -> Mask:
        """The `count` removed weights which promise most when put back: ½ g_j² / (AᵀA)_jj, each alone.

        They are candidates only; the solver weighs them against the kept weights by the whole model.
        """
        index = torch.from_numpy(np.flatnonzero(pruned)).to(self._factor.device)
        curvature = torch.zeros(len(pruned), dtype=self._factor.dtype, device=self._factor.device)
        for row in self._factor:
            curvature.addcmul_(row, row)
        gain = self._gradient[index].square() / curvature[index].double().clamp_min(1e-300)
        order = torch.sort(gain, descending=True, stable=True).indices[:count]
        wanted = np.zeros(len(pruned), dtype=bool)
        wanted[index[order].cpu().numpy()] = True
        return wanted
