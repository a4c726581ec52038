"""Distillation of a network that was pruned before; `cbs_opt.prune(..., distill=...)` does both at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cbs_opt.data.forward import LossFunction
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.distill import Distill
from cbs_opt.engine.layer_network import LayerwiseNetwork
from cbs_opt.engine.outcome import distilled_in_place
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.workspace import own_copy
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.finding import find_layers
from cbs_opt.network.masks import masks_from_zeros, read_masks
from cbs_opt.report.records import DistillRecord
from solvers.errors import DataError, ModelError, OptionError


@dataclass(frozen=True, eq=False)
class Distilled:
    """A distilled network.

    Attributes
    ----------
    model : nn.Module
        With its masks.
    masks : dict of str to bool tensor
        By layer name, True = kept.
    record : DistillRecord
    loss : float
        Mean calibration loss; nan without one.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    record: DistillRecord
    loss: float


def distil_pruned(
    model: nn.Module,
    dense: nn.Module,
    data: object,
    loss_fn: LossFunction | None,
    setup: Setup,
    options: Distill,
    progress: Progress | None = None,
) -> Distilled:
    """Move the kept weights of a pruned network towards the outputs of the dense one.

    Parameters
    ----------
    model : nn.Module
        With masks, or with zeros where it is pruned; it is not changed.
    dense : nn.Module
        The network before, of the same architecture.
    data, loss_fn
        As for `cbs_opt.prune`; the data are read batch by batch.
    setup : Setup
        Of layer-wise curvature.
    options : Distill
    progress : callable, optional

    Raises
    ------
    CBSError
        For networks of different parameters, one that is not pruned, and as `cbs_opt.prune`.
    """
    if loss_fn is None and options.loss == "given":
        raise OptionError("Distill(loss='given') takes a loss; pass loss_fn, or use loss='kl' or 'mse'")
    masks = read_masks(model) or masks_from_zeros(model)
    own, layers = own_copy(model, setup)
    others = find_layers(dense, include=setup.include, exclude=setup.exclude)
    if [(a.name, a.shape) for a in layers] != [(b.name, b.shape) for b in others]:
        raise ModelError("the pruned network and the dense one have different layers; pass two of one architecture")
    masks = {name: mask for name, mask in masks.items() if name in set(layers.names)}
    if not masks:
        raise ModelError("no layer of the network has a mask or zeros; pass one that is pruned")
    stream = BatchStream(data, setup.samples)
    if stream.once:
        raise DataError(
            f"the calibration data are a one-shot {type(data).__name__}, and distillation reads them again; pass a "
            "list, a Dataset or a DataLoader"
        )
    network = LayerwiseNetwork(own, layers, setup, dense, stream, loss_fn)
    pruned = layers.pruned_by(masks)
    own, _ = network.network(None, pruned, own=True)
    record = distilled_in_place(network, options, own, network.dense_copy(), pruned, progress)
    loss = network.meter.of_network(own)
    return Distilled(own, network.finish(own, pruned), record, loss)
