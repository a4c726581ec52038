"""What must be known of a kind of layer to prune it.

A layer holds one or more weights W that multiply what it sees: y_p = W x_p at every position p of every sample (a
token, an image patch, a time step). Then the gradient of a loss is Σ_p (∂ℓ/∂y_p) x_pᵀ, the input moment C = mean_p
x_p x_pᵀ, and the layer's reconstruction error ½ mean_p ‖(V − W) x_p‖². An adapter says, for one kind of module, which
weights these are, how each reads as a matrix of R output rows × d inputs (`MatrixView`), and what x_p and ∂ℓ/∂y_p were
in a call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

#: What the rows of one weight saw: tensors (groups, positions, d) over the groups in order, one tensor where all groups
#: have the same positions. Positions run over the samples first, then inside each.
Rows = list[Tensor]
#: Input and output (..., d), (..., R / groups) of each group of rows; the outputs are part of the graph.
Products = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MatrixView:
    """A weight as a matrix: R output rows × d inputs, numbered row-major, whatever its layout in the module.

    Attributes
    ----------
    shape : tuple of int
        Of the weight as the module holds it.
    rows : int
        R, over all groups.
    groups : int
        The rows fall into that many equal consecutive ranges, each of which sees inputs of its own.
    apart : tuple of int
        `shape` with dimensions cut in two where a part of one has to move; empty: as it is.
    order : tuple of int
        Permutation of the dimensions of `apart` that puts those of the rows first; empty: as they are.
    """

    shape: tuple[int, ...]
    rows: int
    groups: int = 1
    apart: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """d: inputs of a row."""
        return self.n // self.rows

    def flatten(self, weight: Tensor) -> Tensor:
        """(..., *shape) → (..., R·d), row-major; a view where the layouts agree."""
        lead = weight.shape[: weight.ndim - len(self.shape)]
        if self.order:
            split = weight.reshape(*lead, *(self.apart or self.shape))
            weight = split.permute(*range(len(lead)), *(len(lead) + i for i in self.order))
        return weight.reshape(*lead, self.n)

    def unflatten(self, vector: Tensor) -> Tensor:
        """(..., R·d) → (..., *shape), the inverse of `flatten`."""
        lead = vector.shape[:-1]
        if self.order:
            split = self.apart or self.shape
            moved = vector.reshape(*lead, *(split[i] for i in self.order))
            back = sorted(range(len(self.order)), key=self.order.__getitem__)
            vector = moved.permute(*range(len(lead)), *(len(lead) + i for i in back))
        return vector.reshape(*lead, *self.shape)


class LayerAdapter(ABC):
    """One kind of layer; see the module's docstring, and `cbs_opt.register_layer` for how it becomes known.

    Attributes
    ----------
    types : tuple of module classes
        Whose instances it answers for, unless `matches` says otherwise.
    opt_in : bool
        Whether its weights are left alone unless an include pattern names them.
    """

    types: tuple[type[nn.Module], ...] = ()
    opt_in: bool = False

    def matches(self, module: nn.Module) -> bool:
        """Whether it answers for this module."""
        return isinstance(module, self.types)

    def kind(self, module: nn.Module) -> str:
        """Name of the kind in reports: that of the class, without the prefix a parametrization gives it."""
        return next((t.__name__ for t in self.types if isinstance(module, t)), type(module).__name__)

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """Attributes of the weights, ``"weight"`` or with dots for those of a part (``"out_proj.weight"``)."""
        return ("weight",)

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """One of its weights as a matrix; by default with its first dimension for the rows, as most modules have it."""
        shape = shape_of(module, attribute)
        return MatrixView(shape, rows=shape[0])

    @abstractmethod
    def input_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        """What each weight multiplied in the call ``module(*args, **kwargs)``: x_p, by attribute.

        They have no part in any graph. A weight that the call does not use may be left out.
        """

    def positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[float]]:
        """How often each weight of each group of rows is multiplied in the call, by attribute; see `input_rows`."""
        found = self.input_rows(module, args, kwargs)
        return {name: [float(x.shape[1]) for x in parts for _ in range(x.shape[0])] for name, parts in found.items()}

    @abstractmethod
    def output_gradient_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Any
    ) -> dict[str, Rows]:
        """∂ℓ/∂y_p at the positions of `input_rows`, by attribute: tensors (groups, positions, R / groups).

        Parameters
        ----------
        module, args, kwargs
            As in `input_rows`.
        gradient
            ∂ℓ/∂ of the call's output: like that output with None where there is none, or the one of its first tensor.
        """


class Replayed(LayerAdapter):
    """A layer whose products are not seen from outside: its call is done again step by step."""

    @abstractmethod
    def replay(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Products]]:
        """The output of the call, in eval mode, and the products of each weight on the way there."""

    def input_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        """By a replay without gradients."""
        with torch.no_grad():
            _, products = self.replay(module, args, kwargs)
        return {name: [rows(x.detach()) for x, _ in pairs] for name, pairs in products.items()}

    def output_gradient_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Any
    ) -> dict[str, Rows]:
        """By a replay, and autograd from its output to the products."""
        with torch.enable_grad():
            output, products = self.replay(module, args, kwargs)
        # A gradient alone is that of the first tensor.
        ends = [
            (o, g)
            for o, g in zip(_tensors(output), _tensors(gradient), strict=False)
            if o is not None and g is not None
        ]
        flat = [y for pairs in products.values() for _, y in pairs]
        outputs, given = [o for o, _ in ends], [g for _, g in ends]
        found = iter(torch.autograd.grad(outputs, flat, given, allow_unused=True, materialize_grads=True))
        return {name: [rows(next(found)) for _ in pairs] for name, pairs in products.items()}


def shape_of(module: nn.Module, attribute: str) -> tuple[int, ...]:
    """Shape of a weight."""
    return tuple(int(size) for size in attrgetter(attribute)(module).shape)


def layer_name(owner: str, attribute: str) -> str:
    """Name of the layer of a weight: that of the module for its ``weight``, else of module and attribute."""
    parameter = f"{owner}.{attribute}" if owner else attribute
    prefix, _, last = parameter.rpartition(".")
    return prefix if last == "weight" else parameter


def rows(tensor: Tensor) -> Tensor:
    """(..., d) → (1, positions, d)."""
    return tensor.reshape(1, -1, tensor.shape[-1])


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one tensor that a layer is called with, out of any graph."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value.detach()


def _tensors(tree: Any) -> list[Tensor | None]:
    if isinstance(tree, PackedSequence):
        return [tree.data]
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in _tensors(part)]
    return [tree]
