"""How the prunable weights of a network line up in one vector.

They are the weights that some adapter knows of (`cbs_opt.network.adapters`), never the biases, numbered layer by layer
in the order of ``named_modules`` and row-major inside a layer, outputs × inputs: the vector w of the quadratic model. A
weight that several modules share is one layer with several places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cbs_opt.network.adapters import MatrixView
from solvers.arguments import instance, sparsity_of
from solvers.budget import Budget, Groups, Pattern, Tiles
from solvers.errors import ModelError, OptionError, ProblemError, UnknownNameError


@dataclass(frozen=True)
class Layer:
    """One prunable weight tensor.

    Attributes
    ----------
    name : str
        Qualified name of the weight without ``.weight``, e.g. ``"layer1.0.conv2"`` or ``"lstm.weight_hh_l0"``; the
        first one where several modules share it.
    kind : str
        Class of the module, e.g. ``"Conv2d"``.
    view : MatrixView
        Its shape, and how it reads as a matrix of outputs × inputs.
    start, stop : int
        Its range in the vector of all prunable weights.
    places : tuple of str
        Qualified names of every module attribute that holds this very memory, ``"fc1.weight"`` first.
    uses : tuple of (str, str)
        (module, attribute) of every module whose adapter answers for it, its own first.
    """

    name: str
    kind: str
    view: MatrixView
    start: int
    stop: int
    places: tuple[str, ...]
    uses: tuple[tuple[str, str], ...]

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.stop - self.start

    @property
    def n_rows(self) -> int:
        """Number of output rows (neurons or filters)."""
        return self.view.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as its module holds it."""
        return self.view.shape

    @property
    def slice(self) -> slice:
        """Its range in the vector of all prunable weights."""
        return slice(self.start, self.stop)

    @property
    def parameter(self) -> str:
        """Qualified name of the weight, e.g. ``"fc1.weight"``."""
        return self.places[0]

    def fitted(self, pattern: Pattern) -> Pattern:
        """A pattern as it is meant for this layer: an input channel of a convolution is all places of its kernel."""
        if not isinstance(pattern, Tiles) or (pattern.height, pattern.width) != (None, 1):
            return pattern
        places = math.prod(self.shape[2:])
        if self.view.groups > 1:
            raise ProblemError("a grouped convolution has no input channel that all its filters take")
        return replace(pattern, width=places)

    def held(self, model: nn.Module) -> tuple[nn.Module, str]:
        """The module and attribute that hold the weight in a network; raises AttributeError if there is none."""
        owner, _, attribute = self.parameter.rpartition(".")
        return model.get_submodule(owner), attribute


@dataclass(frozen=True)
class Skipped:
    """A matrix-shaped parameter that is not pruned.

    Attributes
    ----------
    name : str
        Qualified name of the parameter.
    shape : tuple of int
    reason : str
    asked : bool
        Whether it was left out by `include` or `exclude`.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    asked: bool = False


@dataclass(frozen=True)
class PrunableLayers:
    """The prunable layers of a network, in order: the map between modules and one flat vector.

    It holds names, shapes and ranges only, no tensors, so it applies to any network of the same architecture.

    Attributes
    ----------
    layers : tuple of Layer
    skipped : tuple of Skipped
        All other parameters of two and more dimensions.
    n_model : int
        Number of all parameters of the network, shared ones once.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    n_model: int

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def n(self) -> int:
        """Number of prunable weights."""
        return self.layers[-1].stop

    def resolve(self, pattern: Pattern) -> Budget:
        """The budget of all weights that a pattern asks for; raises OptionError naming the layers it does not fit."""
        wrong, found = [], []
        for layer in self.layers:
            try:
                found.append(layer.fitted(pattern).resolve([(layer.n_rows, layer.view.inputs)]))
            except ProblemError as error:
                wrong.append((layer, str(error)))
        if wrong:
            names = [layer.name for layer, _ in wrong]
            raise OptionError(
                f"budget {str(pattern)!r} does not fit {len(names)} of {len(self.layers)} layers: {names[0]!r}, of "
                f"{wrong[0][0].n_rows} x {wrong[0][0].view.inputs} weights: {wrong[0][1]}; or leave them out, "
                f"exclude={names}"
            )
        if isinstance(pattern, Tiles):
            # Shares are of the tiles of all layers, whose widths may differ.
            groups = [budget for budget in found if isinstance(budget, Groups)]
            starts = np.cumsum([0, *(budget.n_groups for budget in groups)]).tolist()
            labels = [np.asarray(budget.labels) + start for budget, start in zip(groups, starts[:-1], strict=True)]
            return Groups(np.concatenate(labels), starts[-1] - int(starts[-1] * pattern.kept))
        return pattern.resolve([(layer.n_rows, layer.view.inputs) for layer in self.layers])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def __getitem__(self, name: str) -> Layer:
        """The layer of that name; raises UnknownNameError."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UnknownNameError.of("layer", name, self.names)

    def parameters(self, model: nn.Module) -> list[Tensor]:
        """The weight tensors of `model`, one per layer, as its modules hold them.

        Raises
        ------
        ModelError
            If `model` has no such layer or its weight has another shape.
        """
        found = []
        for layer in self.layers:
            try:
                weight = getattr(*layer.held(model))
            except AttributeError:
                raise ModelError(
                    f"the network has no layer {layer.name!r}; it is not the architecture these layers were taken from"
                ) from None
            if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.shape:
                shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                raise ModelError(f"layer {layer.name!r} has a weight of shape {shape}, expected {layer.shape}")
            found.append(weight)
        return found

    def read(self, model: nn.Module) -> Tensor:
        """The prunable weights as one vector, float64 (n,), on the CPU; masked weights read as zero.

        Raises
        ------
        ModelError
            If the network does not fit or a weight is NaN or infinite.
        """
        self.check_finite(model)
        pairs = zip(self, self.parameters(model), strict=True)
        return torch.cat([layer.view.flatten(w.detach()).to("cpu", torch.float64) for layer, w in pairs])

    @torch.no_grad()
    def write(self, model: nn.Module, vector: Tensor | npt.NDArray[np.float64]) -> None:
        """Copy a vector (n,) into the weights of `model`, in place, in the dtype and on the device of each.

        Raises
        ------
        ModelError
            If the network does not fit, or a layer's weight is computed by a parametrization.
        """
        values = self._vector(vector)
        for layer, weight in zip(self.layers, self.parameters(model), strict=True):
            if parametrize.is_parametrized(*layer.held(model)):
                raise ModelError(
                    f"the weight of layer {layer.name!r} is computed by a parametrization and cannot be written; "
                    "call cbs_opt.remove_masks(model) first"
                )
            weight.copy_(layer.view.unflatten(values[layer.slice]))

    def check_finite(self, model: nn.Module) -> None:
        """Raise ModelError if the network does not fit or a weight is NaN or infinite."""
        for layer, weight in zip(self.layers, self.parameters(model), strict=True):
            bad = ~torch.isfinite(weight.detach())
            if bool(bad.any()):
                where = [int(i) for i in bad.nonzero()[0]]
                entry = f"{layer.parameter.rpartition('.')[2]}{where}"
                raise ModelError(
                    f"layer {layer.name!r}: {entry} is {float(weight.detach()[tuple(where)])}; "
                    "repair or reload the network before pruning it"
                )

    @torch.no_grad()
    def zero(self, model: nn.Module, pruned: npt.NDArray[np.bool_]) -> None:
        """Set the weights of a mask (n,) to zero, in place; True = removed."""
        for layer, weight in zip(self.layers, self.parameters(model), strict=True):
            mask = torch.tensor(pruned[layer.slice], device=weight.device)
            weight.masked_fill_(layer.view.unflatten(mask), 0.0)

    def split(self, vector: Tensor | npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> dict[str, Tensor]:
        """A vector (n,) as one tensor per layer in the layer's shape; views where possible."""
        values = self._vector(vector)
        return {layer.name: layer.view.unflatten(values[layer.slice]) for layer in self.layers}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`; raises ModelError for missing layers or other shapes."""
        for layer in self.layers:
            if layer.name not in tensors or tuple(tensors[layer.name].shape) != layer.shape:
                found = tuple(tensors[layer.name].shape) if layer.name in tensors else "nothing"
                raise ModelError(f"layer {layer.name!r} needs a tensor of shape {layer.shape}, got {found}")
        return torch.cat([layer.view.flatten(tensors[layer.name]) for layer in self.layers])

    def pruned_by(self, masks: Mapping[str, Tensor]) -> npt.NDArray[np.bool_]:
        """Masks by layer (``"fc1"`` or ``"fc1.weight"``, True = kept) as one vector (n,), True = removed.

        Raises
        ------
        ModelError
            For a name that is no layer, another shape, or a mask that is not of bool.
        """
        names = {**{layer.name: layer for layer in self}, **{layer.parameter: layer for layer in self}}
        pruned = np.zeros(self.n, dtype=bool)
        instance("masks", masks, Mapping, error=ModelError)  # type: ignore[type-abstract]
        for name, mask in masks.items():
            if not isinstance(mask, Tensor):
                raise ModelError(f"the mask of {name!r} must be a bool tensor, not a {type(mask).__name__}")
            if name not in names:
                raise ModelError(
                    f"there is no layer {name!r} for the mask of that name; there are {', '.join(self.names)}"
                )
            layer = names[name]
            if mask.dtype != torch.bool or tuple(mask.shape) != layer.shape:
                raise ModelError(
                    f"the mask of {name!r} must be bool of shape {layer.shape}, not {mask.dtype} {tuple(mask.shape)}"
                )
            pruned[layer.slice] = ~layer.view.flatten(mask.detach()).cpu().numpy()
        return pruned

    def n_kept(self, sparsity: float) -> int:
        """Number of weights that stay at a sparsity: int(n·(1 − sparsity)), truncated in float64.

        Raises
        ------
        OptionError
            If `sparsity` is not in [0, 1).
        """
        return int(self.n * (1.0 - sparsity_of(sparsity)))

    def n_prune(self, sparsity: float) -> int:
        """Number of weights that go at a sparsity: n − n_kept."""
        return self.n - self.n_kept(sparsity)

    def _vector(self, vector: Tensor | npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> Tensor:
        values = torch.as_tensor(vector)
        if values.shape != (self.n,):
            raise ModelError(f"expected a vector of {self.n} weights, got shape {tuple(values.shape)}")
        return values
