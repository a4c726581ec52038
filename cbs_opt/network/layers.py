"""Which weights of a network may be pruned, and how they line up in one vector.

The prunable weights of a network are the ``weight`` parameters of its Linear, Conv1d and Conv2d layers, never the
biases. They are numbered layer by layer in the order of ``named_modules`` and row-major inside a layer, which is
the vector w of the quadratic model. A weight that several modules share is one layer with several places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cbs_opt.network.masks import PruningMask
from cbs_opt.network.numbers import check_sparsity
from solvers.errors import ModelError, UnknownNameError

#: Module types whose ``weight`` can be pruned.
PRUNABLE_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Layer:
    """One prunable weight tensor.

    Attributes
    ----------
    name : str
        Qualified name of the module, e.g. ``"layer1.0.conv2"``; the first one where several share the weight.
    kind : str
        Class of the module, e.g. ``"Conv2d"``.
    shape : tuple of int
        Shape of the weight; the first dimension counts output rows.
    start, stop : int
        Its range in the vector of all prunable weights.
    places : tuple of str
        Qualified names of every module attribute that holds this very parameter, ``"fc1.weight"`` first.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int
    places: tuple[str, ...]

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.stop - self.start

    @property
    def n_rows(self) -> int:
        """Number of output rows (neurons or filters)."""
        return self.shape[0]

    @property
    def slice(self) -> slice:
        """Its range in the vector of all prunable weights."""
        return slice(self.start, self.stop)

    @property
    def parameter(self) -> str:
        """Qualified name of the weight, ``name + ".weight"``."""
        return self.places[0]


@dataclass(frozen=True)
class PrunableLayers:
    """The prunable layers of a network, in order: the map between modules and one flat vector.

    It holds names, shapes and ranges only, no tensors, so it applies to any network of the same architecture.
    """

    layers: tuple[Layer, ...]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def n(self) -> int:
        """Number of prunable weights."""
        return self.layers[-1].stop

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
                weight = model.get_submodule(layer.name).weight
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
        return torch.cat([w.detach().reshape(-1).to("cpu", torch.float64) for w in self.parameters(model)])

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
            if parametrize.is_parametrized(model.get_submodule(layer.name), "weight"):
                raise ModelError(
                    f"the weight of layer {layer.name!r} is computed by a parametrization and cannot be written; "
                    "call cbs_opt.remove_masks(model) first"
                )
            weight.copy_(values[layer.slice].view(layer.shape))

    def check_finite(self, model: nn.Module) -> None:
        """Raise ModelError if the network does not fit or a weight is NaN or infinite."""
        for layer, weight in zip(self.layers, self.parameters(model), strict=True):
            bad = ~torch.isfinite(weight.detach())
            if bool(bad.any()):
                where = [int(i) for i in bad.nonzero()[0]]
                raise ModelError(
                    f"layer {layer.name!r}: weight{where} is {float(weight.detach()[tuple(where)])}; "
                    "repair or reload the network before pruning it"
                )

    @torch.no_grad()
    def zero(self, model: nn.Module, pruned: npt.NDArray[np.bool_]) -> None:
        """Set the weights of a mask (n,) to zero, in place; True = removed."""
        for layer, weight in zip(self.layers, self.parameters(model), strict=True):
            weight.masked_fill_(torch.tensor(pruned[layer.slice], device=weight.device).view(layer.shape), 0.0)

    def split(self, vector: Tensor | npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> dict[str, Tensor]:
        """A vector (n,) as one tensor per layer in the layer's shape; views where possible."""
        values = self._vector(vector)
        return {layer.name: values[layer.slice].view(layer.shape) for layer in self.layers}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`; raises ModelError for missing layers or other shapes."""
        for layer in self.layers:
            if layer.name not in tensors or tuple(tensors[layer.name].shape) != layer.shape:
                found = tuple(tensors[layer.name].shape) if layer.name in tensors else "nothing"
                raise ModelError(f"layer {layer.name!r} needs a tensor of shape {layer.shape}, got {found}")
        return torch.cat([tensors[layer.name].reshape(-1) for layer in self.layers])

    def pruned_by(self, masks: Mapping[str, Tensor]) -> npt.NDArray[np.bool_]:
        """Masks by layer (``"fc1"`` or ``"fc1.weight"``, True = kept) as one vector (n,), True = removed.

        Raises
        ------
        ModelError
            For a name that is no layer, another shape, or a mask that is not of bool.
        """
        names = {**{layer.name: layer for layer in self}, **{layer.parameter: layer for layer in self}}
        pruned = np.zeros(self.n, dtype=bool)
        for name, mask in masks.items():
            if name not in names:
                raise ModelError(
                    f"there is no layer {name!r} for the mask of that name; there are {', '.join(self.names)}"
                )
            layer = names[name]
            if mask.dtype != torch.bool or tuple(mask.shape) != layer.shape:
                raise ModelError(
                    f"the mask of {name!r} must be bool of shape {layer.shape}, not {mask.dtype} {tuple(mask.shape)}"
                )
            pruned[layer.slice] = ~mask.detach().cpu().numpy().reshape(-1)
        return pruned

    def n_kept(self, sparsity: float) -> int:
        """Number of weights that stay at a sparsity: int(n·(1 − sparsity)), truncated in float64.

        Raises
        ------
        OptionError
            If `sparsity` is not in [0, 1).
        """
        return int(self.n * (1.0 - check_sparsity(sparsity)))

    def n_prune(self, sparsity: float) -> int:
        """Number of weights that go at a sparsity: n − n_kept."""
        return self.n - self.n_kept(sparsity)

    def _vector(self, vector: Tensor | npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> Tensor:
        values = torch.as_tensor(vector)
        if values.shape != (self.n,):
            raise ModelError(f"expected a vector of {self.n} weights, got shape {tuple(values.shape)}")
        return values


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
) -> PrunableLayers:
    """The prunable layers of a network.

    Parameters
    ----------
    model : nn.Module
    include, exclude : patterns
        Shell patterns (`fnmatch`, case-sensitive) on qualified module names; a layer is taken if it matches any of
        `include` and none of `exclude`. ``"layer?.*.conv*"`` takes the block convolutions of a ResNet.

    Returns
    -------
    PrunableLayers

    Raises
    ------
    UnknownNameError
        If a pattern matches no prunable layer.
    ModelError
        If nothing prunable is left, or a weight is uninitialised, complex, or computed by something other than a
        pruning mask.
    """
    candidates = _candidates(model)
    if not candidates:
        kinds = ", ".join(kind.__name__ for kind in PRUNABLE_TYPES)
        raise ModelError(
            f"{type(model).__name__} has no prunable layer: none of its modules is a {kinds} with a weight"
        )
    wanted = _matching(candidates, include, "include")
    unwanted = _matching(candidates, exclude, "exclude")
    places = _places(model)
    layers: list[Layer] = []
    seen: set[int] = set()
    start = 0
    for name, module in candidates.items():
        if name not in wanted:
            continue
        holder = holding_parameter(name, module)
        if id(holder) in seen:
            continue
        shared = places[id(holder)]
        # Excluding one of the modules that share a weight excludes the weight.
        if any(place.rpartition(".")[0] in unwanted for place in shared):
            continue
        _check_weight(name, holder)
        seen.add(id(holder))
        own = f"{name}.weight" if name else "weight"
        others = tuple(place for place in shared if place != own)
        shape = tuple(int(d) for d in holder.shape)
        layers.append(Layer(name, _kind(module), shape, start, start + holder.numel(), (own, *others)))
        start += holder.numel()
    if not layers:
        raise ModelError(
            f"no prunable layer is left: include={_patterns(include)} and exclude={_patterns(exclude)} leave none of "
            f"{', '.join(candidates)}"
        )
    return PrunableLayers(tuple(layers))


def holding_parameter(name: str, module: nn.Module) -> Tensor:
    """The parameter behind ``module.weight``: the weight itself, or the original under a pruning mask.

    Raises
    ------
    ModelError
        If the weight is computed by another parametrization.
    """
    if parametrize.is_parametrized(module, "weight"):
        chain = module.parametrizations.weight  # type: ignore[union-attr]
        other = [type(p).__name__ for p in chain if not isinstance(p, PruningMask)]  # type: ignore[union-attr]
        if other:
            raise ModelError(
                f"the weight of layer {name!r} is computed by the parametrization {other[0]}; make it permanent with "
                "torch.nn.utils.parametrize.remove_parametrizations, or exclude the layer"
            )
        original = chain.original  # type: ignore[union-attr]
        assert isinstance(original, Tensor)
        return original
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Prunable modules by qualified name, shared modules under their first name."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, PRUNABLE_TYPES):
            continue
        if "weight_orig" in module._parameters:
            raise ModelError(
                f"layer {name!r} carries a torch.nn.utils.prune mask, which breaks copying; convert the network with "
                "cbs_opt.from_torch_prune(model), or make the pruning permanent with torch.nn.utils.prune.remove"
            )
        if isinstance(getattr(module, "weight", None), Tensor):
            found[name] = module
    return found


def _matching(candidates: Mapping[str, nn.Module], patterns: Sequence[str] | str, what: str) -> set[str]:
    """Names that match any of the patterns; a pattern that matches none is an error."""
    matched: set[str] = set()
    for pattern in _patterns(patterns):
        hits = {name for name in candidates if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)}
        if not hits:
            raise UnknownNameError.of(
                f"{what} pattern", pattern, candidates, "The pattern matches no prunable layer; use * and ? freely."
            )
        matched |= hits
    return matched


def _patterns(patterns: Sequence[str] | str) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _places(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every qualified attribute name under which each parameter object is held, by its id."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        attributes: dict[str, Tensor] = {k: p for k, p in module._parameters.items() if p is not None}
        if parametrize.is_parametrized(module):
            lists = module.parametrizations
            assert isinstance(lists, nn.ModuleDict)
            for key, entry in lists.items():
                if isinstance(entry, parametrize.ParametrizationList) and hasattr(entry, "original"):
                    attributes[key] = entry.original
        for key, parameter in attributes.items():
            found.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return {key: tuple(names) for key, names in found.items()}


def _check_weight(name: str, weight: Tensor) -> None:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ModelError(
            f"the weight of layer {name!r} is not initialised yet; run one batch through the network first"
        )
    if not weight.is_floating_point():
        raise ModelError(f"the weight of layer {name!r} is {weight.dtype}; only real floating weights can be pruned")
    if weight.numel() == 0:
        raise ModelError(f"the weight of layer {name!r} is empty (shape {tuple(weight.shape)}); exclude it")


def _kind(module: nn.Module) -> str:
    """Class name of the module, without the prefix a parametrization gives it."""
    return next(kind.__name__ for kind in PRUNABLE_TYPES if isinstance(module, kind))
