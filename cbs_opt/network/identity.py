"""Which parameters of a network are the same memory.

Two modules share a weight when they hold one Parameter, but also when they hold two over one storage: tied through
``.data``, or by ``Parameter(other.weight)``. Such a pair is one weight to every pass through the network, and two to
``copy.deepcopy`` and ``.to(device)``, which quietly take it apart. Memory that is shared in part, or in another layout
(``.t()``), is no weight that can be pruned once, so it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from solvers.errors import ModelError


def held(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by each qualified name it is held under; one behind a mask under the name of the weight."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, parametrize.ParametrizationList) and hasattr(module, "original"):
            continue
        found.update({prefix + key: p for key, p in module._parameters.items() if p is not None})
        if parametrize.is_parametrized(module):
            lists = module.parametrizations
            assert isinstance(lists, nn.ModuleDict)
            for key, chain in lists.items():
                original = getattr(chain, "original", None)
                if isinstance(original, nn.Parameter):
                    found[prefix + key] = original
    return found


def key_of(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same memory in the same layout."""
    span = _span(tensor)
    if span is None:
        return id(tensor)
    layout = tuple((size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (*span, tensor.dtype, layout)


def places_of(model: nn.Module) -> dict[Hashable, dict[str, Tensor]]:
    """All names and parameters of each piece of memory, by its key.

    Raises
    ------
    ModelError
        If a parameter is not initialised, or shares memory with a parameter or buffer of another layout.
    """
    found: dict[Hashable, dict[str, Tensor]] = {}
    for name, parameter in held(model).items():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(
                f"parameter {name!r} is not initialised yet; run one batch through the network before pruning it"
            )
        found.setdefault(key_of(parameter), {})[name] = parameter
    _refuse_overlaps(model, {next(iter(places)): next(iter(places.values())) for places in found.values()})
    return found


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy in which parameters that were the same memory are one Parameter; raises ModelError."""
    memo: dict[int, object] = {}
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            # Gradients by torch.func leave weights of theirs behind, which deepcopy refuses.
            module._init_flat_weights()
    for places in places_of(model).values():
        first, *others = places.values()
        if any(other is not first for other in others):
            twin = copy.deepcopy(first, memo)
            memo.update({id(other): twin for other in others})
    return copy.deepcopy(model, memo)


def _refuse_overlaps(model: nn.Module, parameters: dict[str, Tensor]) -> None:
    """Raise ModelError where a parameter shares memory with another one, a buffer, or a tensor that a module keeps."""
    others = dict(model.named_buffers())
    own = {id(parameter) for _, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if isinstance(value, Tensor) and id(value) not in own}
        others.update({f"{name}.{key}" if name else key: value for key, value in kept.items()})
    spans = [(*span, True, name) for name, tensor in parameters.items() if (span := _span(tensor)) is not None]
    spans += [(*span, False, name) for name, tensor in others.items() if (span := _span(tensor)) is not None]
    # The furthest end so far, of parameters and of anything.
    reach: dict[tuple[str, bool], tuple[int, str]] = {}
    for device, start, stop, parameter, name in sorted(spans):
        end, other = reach.get((device, not parameter), (0, ""))
        if start < end:
            raise ModelError(
                f"{name!r} shares memory with {other!r} but is not the same parameter (part of it, transposed, or no "
                "parameter at all), and copying the network would take them apart; hold one Parameter in both places, "
                "or make the view in forward"
            )
        for key in ((device, False), (device, True)) if parameter else ((device, False),):
            reach[key] = max(reach.get(key, (0, "")), (stop, name))


def _span(tensor: Tensor) -> tuple[str, int, int] | None:
    """Device and addresses (first byte, end) of a tensor; None where it has no memory of its own kind."""
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    if start == 0 or tensor.numel() == 0:
        return None
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()
