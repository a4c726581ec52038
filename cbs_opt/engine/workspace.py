"""A network and its calibration data, checked and copied: what gradients and losses are computed with.

Everything that can be refused about network and data is refused here, before gradients are computed. There is one copy
of the network, whose prunable weights change with every loss and gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.forward import Forward, LossFunction
from cbs_opt.data.losses import LossMeter, Meter
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.setup import Setup
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import GradientSample, Progress, sample_gradients
from cbs_opt.measure.row_sampling import draw_rows
from cbs_opt.network.batch_norm import restore_statistics, statistics_of
from cbs_opt.network.finding import find_layers
from cbs_opt.network.identity import copy_network
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.masks import apply_masks, remove_masks
from cbs_opt.network.modes import check_mode, in_plain_state
from solvers.arrays import Array, Mask
from solvers.errors import CapabilityError, ModelError, OptionError


class OpenNetwork(ABC):
    """A network that may be changed, and its layers; what a plan is concluded with.

    Parameters
    ----------
    model : nn.Module
        Without masks. It is put into eval mode, and where `settle` says; its prunable weights change.
    layers : PrunableLayers
    forward : Forward
    setup : Setup

    Attributes
    ----------
    flags : dict of str to bool
        Training flags that networks made from this one get, by module.
    homes : dict of str to torch.device
        Likewise the device of every tensor.
    """

    def __init__(self, model: nn.Module, layers: PrunableLayers, forward: Forward, setup: Setup) -> None:
        self.layers, self.forward, self.setup = layers, forward, setup
        self.flags = {name: module.training for name, module in model.named_modules()}
        self.homes = {name: tensor.device for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self.model = self.settle(model.eval())

    def settle(self, model: nn.Module) -> nn.Module:
        """Put the network on the device of the setup."""
        return model.to(self.setup.place)

    @property
    @abstractmethod
    def meter(self) -> Meter:
        """The calibration loss."""

    @abstractmethod
    def dense_layers(self) -> list[Tensor]:
        """The prunable weights of the network given, by layer."""

    @property
    @abstractmethod
    def dense_loss(self) -> float:
        """Mean calibration loss of the network given."""

    @property
    @abstractmethod
    def source(self) -> CalibrationData | BatchStream:
        """The calibration data."""

    @abstractmethod
    def dense_copy(self) -> nn.Module:
        """A copy of the network given, in eval mode."""

    def network(self, weights: Array | None, pruned: Mask, *, own: bool = False) -> tuple[nn.Module, float]:
        """A network with prunable weights (n,), zero where pruned; and its calibration loss.

        Parameters
        ----------
        weights : float64 (n,), optional
            None leaves those of the network as they are.
        pruned : bool (n,)
        own : bool
            Give the network of this workspace away, which must not be used any more, instead of a copy.
        """
        model = self.model if own else copy_network(self.model)
        if weights is not None:
            self.layers.write(model, weights)
        self.layers.zero(model, pruned)
        return model, self.meter.of_network(model)

    def finish(self, model: nn.Module, pruned: Mask) -> dict[str, Tensor]:
        """Mask a network that `network` made and put it where the network given was; its masks, True = kept."""
        for name, module in model.named_modules():
            module.training = self.flags[name]
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(self.homes.get(name, tensor.device))
        masks = self.layers.split(~pruned)
        apply_masks(model, masks)
        return masks


class Workspace(OpenNetwork):
    """A network that may be changed and its data in memory; `open_workspace` makes one from a network that may not.

    Parameters
    ----------
    data : CalibrationData
    model, layers, forward, setup
        As for `OpenNetwork`; batch-norm statistics change too.
    """

    def __init__(
        self, model: nn.Module, layers: PrunableLayers, data: CalibrationData, forward: Forward, setup: Setup
    ) -> None:
        super().__init__(model, layers, forward, setup)
        self.data = data.cast(layers.parameters(model)[0].dtype)
        self._statistics = statistics_of(self.model)

    @property
    def source(self) -> CalibrationData:
        """The calibration data."""
        return self.data

    def dense_copy(self) -> nn.Module:
        """A copy of the network given, in eval mode."""
        model = copy_network(self.model)
        if "weights" in self.__dict__:
            self.layers.write(model, self.weights)
        restore_statistics(model, self._statistics)
        return model

    @cached_property
    def weights(self) -> Array:
        """The prunable weights of the network given, float64 (n,); to be asked for before they change."""
        return self.layers.read(self.model).numpy()

    @cached_property
    def meter(self) -> LossMeter:
        """The calibration loss; its samples are put on the device when it is first asked for."""
        setup = self.setup
        return LossMeter(
            self.model,
            self.layers,
            self.data,
            self.forward,
            device=setup.place,
            n_samples=setup.loss_samples,
            seed=setup.seed,
        )

    def dense_layers(self) -> list[Tensor]:
        """The prunable weights of the network given by layer; views of the network where it never changed."""
        if "weights" in self.__dict__:
            return list(self.layers.split(self.weights).values())
        return self.layers.parameters(self.model)

    @cached_property
    def dense_loss(self) -> float:
        """Mean calibration loss of the network given."""
        if "weights" in self.__dict__:
            return self.meter.of_weights(self.weights)
        return self.meter.of_network(self.model)

    def gradients(
        self,
        weights: Array,
        fisher: FisherOptions,
        *,
        keep_rows: bool = True,
        progress: Progress | None = None,
        out: Tensor | None = None,
    ) -> GradientSample:
        """Rows of gradients at prunable weights (n,); `out` is memory to use where it fits."""
        self.layers.write(self.model, weights)
        n_rows = fisher.rows_for(self.data)
        seed = self.setup.seed if fisher.seed is None else fisher.seed
        if out is not None and (out.shape != (n_rows, self.layers.n) or out.dtype != fisher.torch_dtype):
            out = None
        drawn = draw_rows(
            self.model,
            self.data,
            self.forward,
            (n_rows, fisher.batch_size),
            importance=fisher.row_sampling == "importance",
            seed=seed,
            device=self.setup.place,
        )
        sample = sample_gradients(
            self.model,
            self.layers,
            self.data,
            self.forward,
            drawn.index,
            scale=drawn.scale,
            device=self.setup.place,
            dtype=fisher.torch_dtype,
            method=fisher.gradient_method,
            memory_budget=fisher.memory_budget,
            keep_rows=keep_rows,
            out=out,
            progress=progress,
        )
        return replace(sample, notes=(*drawn.notes, *sample.notes))


def own_copy(model: nn.Module, setup: Setup) -> tuple[nn.Module, PrunableLayers]:
    """A checked copy of a network without masks, and its layers; raises ModelError, UnknownNameError."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    check_mode(model)
    find_layers(model, include=setup.include, exclude=setup.exclude)
    try:
        own = remove_masks(copy_network(model))
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error
    layers = find_layers(own, include=setup.include, exclude=setup.exclude)
    layers.check_finite(own)
    return own, layers


@in_plain_state
def open_workspace(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    setup: Setup,
    check: Callable[[nn.Module, PrunableLayers], None] | None = None,
) -> Workspace:
    """Check and copy a network and read its calibration data.

    Parameters
    ----------
    model, data, loss_fn
        As for `cbs_opt.prune`.
    setup : Setup
    check : callable, optional
        Called with the copy and its layers before the data are read; may raise.

    Raises
    ------
    ModelError, DataError, OptionError, UnknownNameError
    """
    if not callable(loss_fn):
        raise OptionError(f"loss_fn must be a function of (output, target), not {type(loss_fn).__name__}")
    if setup.layerwise:
        raise CapabilityError(
            f"curvature={setup.curvature!r} is measured segment by segment, those before being pruned already, so it "
            "cannot be measured once for all; use cbs_opt.prune"
        )
    own, layers = own_copy(model, setup)
    if check is not None:
        check(own, layers)
    samples = CalibrationData.read(data, setup.samples)
    if setup.curvature != "none":
        setup.options.rows_for(samples)
    return Workspace(own, layers, samples, Forward(own, loss_fn), setup)
