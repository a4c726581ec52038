"""A network and its calibration data, checked and copied: what gradients and losses are computed with.

Everything that can be refused about network and data is refused here, before gradients are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData, CalibrationOptions
from cbs_opt.data.forward import Forward, LossFunction
from cbs_opt.data.losses import MOST_SAMPLES, LossMeter
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import GradientSample, Progress, sample_gradients
from cbs_opt.network.devices import resolve_device
from cbs_opt.network.layers import PrunableLayers, find_layers
from cbs_opt.network.masks import apply_masks, remove_masks
from cbs_opt.network.modes import check_mode
from solvers.errors import ModelError, OptionError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Workspace:
    """Made by `open_workspace`.

    Attributes
    ----------
    template : nn.Module
        A copy of the network given, without masks; never changed.
    model : nn.Module
        A copy on `device`, in eval mode; its prunable weights change with every loss and gradient.
    layers : PrunableLayers
    data : CalibrationData
    forward : Forward
    device : torch.device
    seed : int
    weights : float64 (n,)
        The prunable weights of the network given.
    """

    def __init__(
        self,
        template: nn.Module,
        layers: PrunableLayers,
        data: CalibrationData,
        loss_fn: LossFunction,
        *,
        device: torch.device,
        seed: int,
        loss_samples: int,
    ) -> None:
        self.template, self.layers, self.device, self.seed = template, layers, device, seed
        self.model = copy.deepcopy(template).to(device).eval()
        self.forward = Forward(self.model, loss_fn)
        self.weights: Array = layers.read(template).numpy()
        self.data = data.cast(layers.parameters(self.model)[0].dtype)
        self._loss_samples = loss_samples
        self._meter: LossMeter | None = None
        self._dense_loss: float | None = None

    @property
    def meter(self) -> LossMeter:
        """The calibration loss; its samples are put on the device when it is first asked for."""
        if self._meter is None:
            self._meter = LossMeter(
                self.model,
                self.layers,
                self.data,
                self.forward,
                device=self.device,
                n_samples=self._loss_samples,
                seed=self.seed,
            )
        return self._meter

    @property
    def dense_loss(self) -> float:
        """Mean calibration loss of the network given."""
        if self._dense_loss is None:
            self._dense_loss = self.meter.of_weights(self.weights)
        return self._dense_loss

    def gradients(
        self, weights: Array, fisher: FisherOptions, *, progress: Progress | None = None, out: Tensor | None = None
    ) -> GradientSample:
        """Rows of gradients at prunable weights (n,); `out` is memory to use where it fits."""
        self.layers.write(self.model, weights)
        n_rows = fisher.rows_for(self.data)
        index = self.data.draw(n_rows, fisher.batch_size, self.seed if fisher.seed is None else fisher.seed)
        if out is not None and (out.shape != (n_rows, self.layers.n) or out.dtype != fisher.torch_dtype):
            out = None
        return sample_gradients(
            self.model,
            self.layers,
            self.data,
            self.forward,
            index,
            device=self.device,
            dtype=fisher.torch_dtype,
            method=fisher.gradient_method,
            memory_budget=fisher.memory_budget,
            out=out,
            progress=progress,
        )

    def network(self, weights: Array, pruned: Mask) -> tuple[nn.Module, dict[str, Tensor]]:
        """A copy of the network with given weights and masks (n,); and its masks by layer, True = kept."""
        model = copy.deepcopy(self.template)
        self.layers.write(model, weights)
        masks = self.layers.split(~pruned)
        apply_masks(model, masks)
        return model, masks


def open_workspace(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    *,
    fisher: FisherOptions,
    calibration: CalibrationOptions | None = None,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    device: torch.device | str = "auto",
    seed: int = 0,
    loss_samples: int = MOST_SAMPLES,
    check: Callable[[PrunableLayers], None] | None = None,
) -> Workspace:
    """Check and copy a network and read its calibration data; see `cbs_opt.prepare` for the arguments and errors."""
    seed = check_seed(seed)
    if isinstance(loss_samples, bool) or not isinstance(loss_samples, (int, np.integer)) or loss_samples < 1:
        raise OptionError(f"loss_samples must be a positive integer, not {loss_samples!r}")
    where = resolve_device(device)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not callable(loss_fn):
        raise OptionError(f"loss_fn must be a function of (output, target), not {type(loss_fn).__name__}")
    check_mode(model)
    find_layers(model, include=include, exclude=exclude)
    try:
        template = remove_masks(copy.deepcopy(model))
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {error}") from error
    layers = find_layers(template, include=include, exclude=exclude)
    layers.read(template)
    if check is not None:
        check(layers)
    samples = CalibrationData.read(data, calibration or CalibrationOptions(seed=seed))
    fisher.rows_for(samples)
    return Workspace(template, layers, samples, loss_fn, device=where, seed=seed, loss_samples=int(loss_samples))


def check_seed(seed: int) -> int:
    """`seed` as an integer ≥ 0; raises OptionError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise OptionError(f"seed must be an integer, zero or more, not {seed!r}")
    return int(seed)
