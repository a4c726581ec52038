"""Masks of `torch.nn.utils.prune` turned into ours, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from cbs_opt.network.identity import copy_network
from cbs_opt.network.masks import apply_masks, masks_of, remove_masks
from solvers.errors import ModelError
from solvers.plain import plainly


@plainly
def from_torch_prune(model: nn.Module) -> nn.Module:
    """A copy of a network with its `torch.nn.utils.prune` masks turned into parametrizations.

    The copy has plain parameter names again; `model` is not changed.

    Raises
    ------
    ModelError
        If the network carries no such mask.
    """
    masks: dict[str, Tensor] = {}
    saved: list[tuple[nn.Module, str, Any]] = []
    for name, module in model.named_modules():
        for key in [k for k in module._parameters if k.endswith("_orig")]:
            attribute = key[: -len("_orig")]
            if f"{attribute}_mask" not in module._buffers:
                continue
            kept = module._buffers[f"{attribute}_mask"]
            assert kept is not None
            masks[f"{name}.{attribute}" if name else attribute] = kept.detach().bool().clone()
            # The product that prune leaves behind belongs to a graph, which deepcopy refuses.
            saved.append((module, attribute, module.__dict__.pop(attribute, None)))
    if not masks:
        raise ModelError(f"{type(model).__name__} carries no torch.nn.utils.prune mask; there is nothing to convert")
    try:
        converted = copy_network(model)
    finally:
        for module, attribute, value in saved:
            if value is not None:
                module.__dict__[attribute] = value
    for full in masks:
        name, _, attribute = full.rpartition(".")
        module = converted.get_submodule(name)
        parameter = module._parameters.pop(f"{attribute}_orig")
        del module._buffers[f"{attribute}_mask"]
        for handle, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, torch_prune.BasePruningMethod) and hook._tensor_name == attribute:
                del module._forward_pre_hooks[handle]
        module.register_parameter(attribute, parameter)
    return apply_masks(converted, masks)


@plainly
def to_torch_prune(model: nn.Module) -> nn.Module:
    """A copy of a masked network with `torch.nn.utils.prune` masks instead; `model` is not changed.

    Raises
    ------
    ModelError
        If the network carries no mask.
    """
    if not any(masks_of(module) for module in model.modules()):
        raise ModelError(f"{type(model).__name__} carries no pruning mask; there is nothing to convert")
    converted = copy_network(model)
    masks = {
        (module, attribute): mask.mask.clone()
        for module in converted.modules()
        for attribute, mask in masks_of(module).items()
    }
    remove_masks(converted)
    for (module, attribute), mask in masks.items():
        torch_prune.custom_from_mask(module, attribute, mask.to(getattr(module, attribute).dtype))  # type: ignore
    return converted
