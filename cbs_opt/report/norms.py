"""Norms of layers before and after, and what each weight adds to the objective."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cbs_opt.network.layers import PrunableLayers
from cbs_opt.report.report import LayerReport
from solvers import Objective, SelectionProblem
from solvers.arrays import Array, Mask

#: Weights looked at together.
_CHUNK = 1 << 20


class LayerNorms:
    """Norms of the layers before they are pruned, from their weights one after the other; then their reports.

    Parameters
    ----------
    layers : PrunableLayers
    weights : iterable of tensors
        Before, as the modules hold them; nothing of them is kept.
    pruned : bool (n,)
    """

    def __init__(self, layers: PrunableLayers, weights: Iterable[Tensor], pruned: Mask) -> None:
        self._layers, self._pruned = layers, pruned
        flat = ((layer.slice, layer.view.flatten(w.detach())) for layer, w in zip(layers, weights, strict=True))
        self._before = [(norm_of(w), norm_of(w, pruned[where])) for where, w in flat]

    def reports(self, weights: Iterable[Tensor], contributions: Array | None) -> tuple[LayerReport, ...]:
        """Rows from the weights after; `contributions` (n,), in the order of the network, sum to the objective."""
        total = 0.0 if contributions is None else float(contributions.sum())
        rows = []
        for layer, (before, removed), after in zip(self._layers, self._before, weights, strict=True):
            kept = layer.n - int(np.count_nonzero(self._pruned[layer.slice]))
            rows.append(
                LayerReport(
                    name=layer.name,
                    kind=layer.kind,
                    shape=layer.shape,
                    n=layer.n,
                    n_kept=kept,
                    sparsity=1.0 - kept / layer.n,
                    norm_before=before,
                    norm_after=norm_of(after),
                    norm_removed=removed,
                    share=math.nan
                    if contributions is None or not total
                    else float(contributions[layer.slice].sum()) / total,
                )
            )
        return tuple(rows)


def norm_of(weights: Tensor, mask: Mask | None = None) -> float:
    """Norm of (some of) the weights in float64, without a copy of all of them."""
    flat, total = weights.detach().reshape(-1), 0.0
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK].to("cpu", torch.float64).numpy()
        if mask is not None:
            piece = piece[mask[start : start + _CHUNK]]
        total += float(piece @ piece)
    return math.sqrt(total)


def contributions(problem: SelectionProblem, pruned: Mask, refitted: Array | None) -> Array:
    """What each weight adds to the problem's objective, float64 (n,): g_i d_i + ½ d_i (Hd)_i for the step d.

    The step is −w_P for the selection objective and that to the refitted weights for the joint one.
    """
    weights = problem.weights
    if problem.objective is Objective.SELECTION or refitted is None:
        step = np.where(pruned, -weights, 0.0)
    else:
        step = refitted - weights
    terms: Array = 0.5 * step * problem.multiply(step)
    if problem.gradient is not None:
        terms = terms + problem.gradient * step
    return terms
