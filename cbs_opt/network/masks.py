"""Pruning masks: weights that are zero and stay zero.

A mask is a parametrization (`torch.nn.utils.parametrize`) that multiplies a stored weight by 0 or 1. Unlike the masks
of `torch.nn.utils.prune` it survives ``copy.deepcopy``, and the network's state dict keeps its usual names: the entry
``fc1.weight`` holds the masked weight, so it loads into a plain network too. Gradients of removed weights are exactly
zero, so no optimiser brings them back. In every mask here True (or 1) means *kept*, as in `torch.nn.utils.prune`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cbs_opt.network.adapters import adapter_of, layer_name
from cbs_opt.network.identity import key_of
from solvers.arguments import instance
from solvers.errors import ModelError
from solvers.plain import plainly


class PruningMask(nn.Module):
    """w ↦ w where `mask` is True, else 0.

    Parameters
    ----------
    mask : bool tensor of the weight's shape, True = kept.
    order : tuple of str
        Names of the module's parameters before it was masked, in their order.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, order: tuple[str, ...] = ("weight",)) -> None:
        super().__init__()
        self.order, self.settled = order, False
        # Not persistent: the state dict shows the mask as zeros in the weight.
        self.register_buffer("mask", mask.detach().clone().bool(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros under the mask."""
        # where, not a product: a NaN under the mask must not leak out.
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is stored when the weight is assigned: zeros under the mask."""
        return weight if self.settled else torch.where(self.mask, weight, 0.0)


@plainly
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Mask weights of a network, in place.

    Parameters
    ----------
    model : nn.Module
    masks : mapping of str to bool tensor
        By qualified name of the weight's module (``"fc1"``) or of the weight (``"fc1.weight"``); True = kept. A weight
        that other modules share is masked in all of them. A mask that is there already is replaced.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ModelError
        If a name does not exist, a shape does not fit or the weight already has another parametrization.
    """
    instance("model", model, nn.Module, error=ModelError)
    instance("masks", masks, Mapping, error=ModelError)  # type: ignore[type-abstract]
    prepared = [(name, *_locate(model, name), _as_mask(name, mask)) for name, mask in masks.items()]
    for name, module, attribute, mask in prepared:
        if parametrize.is_parametrized(module, attribute) and attribute not in masks_of(module):
            raise ModelError(
                f"the {attribute} of {name!r} already has a parametrization that is not a mask; make it permanent with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        shape = tuple(getattr(module, attribute).shape)
        if tuple(mask.shape) != shape:
            raise ModelError(
                f"mask of {name!r} has shape {tuple(mask.shape)}, the weight {shape}; they must be the same"
            )
    for _, module, attribute, mask in prepared:
        stored = _stored(module, attribute)
        sharing = _sharing(model, stored)
        for holder, key in sharing:
            _mask_one(holder, key, mask)
        for parameter in (_stored(*place) for place in sharing):
            if parameter is not stored:
                # Two parameters over one storage, of which the parametrizations have given each its own.
                parameter.data = stored.data
    return model


def read_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a network by module name (``"fc1"``; ``"layer.attribute"`` for attributes but ``weight``).

    Returns
    -------
    dict of str to bool tensor
        True = kept; copies. Empty for a network without masks.
    """
    found = {}
    for name, module in model.named_modules():
        for attribute, mask in masks_of(module).items():
            found[layer_name(name, attribute)] = mask.mask.clone()
    return found


def masks_from_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks that keep what is not zero, for each weight of a layer of a known kind that has zeros; not for embeddings.

    For a network whose pruned weights were loaded from a state dict: ``apply_masks(model, masks_from_zeros(model))``.
    """
    found = {}
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        for attribute in () if adapter is None or adapter.opt_in else adapter.weights(module):
            kept = attrgetter(attribute)(module).detach() != 0
            if not bool(kept.all()):
                found[layer_name(name, attribute)] = kept
    return found


@plainly
def remove_masks(model: nn.Module) -> nn.Module:
    """Make masks permanent, in place: plain weights with zeros, no parametrization. Returns `model`."""
    for module in list(model.modules()):
        for attribute, mask in masks_of(module).items():
            shared = _stored(module, attribute)
            with torch.no_grad():
                shared.copy_(getattr(module, attribute))
            _own_class(module)
            # Not leave_parametrized=True: that would make a new parameter and untie shared weights.
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            # As its module made them: optimiser states go by the order.
            place = {key: number for number, key in enumerate(mask.order)}
            sorted_again = sorted(module._parameters.items(), key=lambda item: place.get(item[0], len(place)))
            module._parameters.clear()
            module._parameters.update(sorted_again)
            _remove_hooks(module, attribute)
        if isinstance(module, nn.RNNBase) and "_flat_weights" not in module.__dict__:
            module._init_flat_weights()
    return model


def masks_of(module: nn.Module) -> dict[str, PruningMask]:
    """The masks of one module by attribute."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    found = {}
    for attribute, chain in lists.items():
        assert isinstance(chain, parametrize.ParametrizationList)
        if len(chain) == 1 and isinstance(chain[0], PruningMask):
            found[attribute] = chain[0]
    return found


def stored_weight(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """The weight that a network computes with, and the one that is stored behind its mask; raises ModelError."""
    module, attribute = _locate(model, name)
    return getattr(module, attribute), _stored(module, attribute)


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and attribute of ``"fc1"`` or ``"fc1.weight"``."""
    instance("the name of a mask", name, str, error=ModelError)
    modules = dict(model.named_modules())
    if name in modules and isinstance(getattr(modules[name], "weight", None), Tensor):
        return modules[name], "weight"
    owner, _, attribute = name.rpartition(".")
    if owner in modules and isinstance(getattr(modules[owner], attribute, None), Tensor):
        return modules[owner], attribute
    known = ", ".join(n for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor))
    raise ModelError(f"the network has no weight {name!r} to mask; it has {known}")


def _as_mask(name: str, mask: Tensor) -> Tensor:
    try:
        tensor = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"mask of {name!r} is a {type(mask).__name__}; pass a bool tensor") from error
    if tensor.dtype != torch.bool and not bool(((tensor == 0) | (tensor == 1)).all()):
        raise ModelError(f"mask of {name!r} is {tensor.dtype} with values other than 0 and 1; pass a bool tensor")
    return tensor.bool()


def _stored(module: nn.Module, attribute: str) -> Tensor:
    """The parameter behind an attribute."""
    if parametrize.is_parametrized(module, attribute):
        chain = module.parametrizations[attribute]  # type: ignore[index]
        original = chain.original  # type: ignore[union-attr]
        assert isinstance(original, Tensor)
        return original
    value = getattr(module, attribute)
    assert isinstance(value, Tensor)
    return value


def _sharing(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every (module, attribute) that holds this memory."""
    found, wanted = [], key_of(parameter)
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        # Not by getattr, which computes what a parametrization gives.
        names = {name for name, held in module._parameters.items() if held is not None} | set(masks_of(module))
        for attribute in sorted(names):
            if key_of(_stored(module, attribute)) == wanted:
                found.append((module, attribute))
    return found


def _mask_one(module: nn.Module, attribute: str, mask: Tensor) -> None:
    current = masks_of(module).get(attribute)
    stored = _stored(module, attribute)
    mask = mask.to(stored.device)
    if current is not None:
        current.mask.copy_(mask)
        with torch.no_grad():
            stored.masked_fill_(~mask, 0.0)
        return
    _own_class(module)
    order = next((other.order for other in masks_of(module).values()), tuple(module._parameters))
    with torch.no_grad():
        stored.masked_fill_(~mask, 0.0)
    pruning = PruningMask(mask, order)
    # Registering asks for what to store: the weight as it is, not another copy of a large network.
    pruning.settled = True
    parametrize.register_parametrization(module, attribute, pruning)
    pruning.settled = False
    for key, member in _MEMBERS.items():
        setattr(type(module), key, member)
    if isinstance(module, nn.RNNBase):
        # It would keep the masked weights of its last call, which belong to a graph that deepcopy refuses.
        module.__dict__.pop("_flat_weights", None)
        type(module)._flat_weights = property(_flat_weights, lambda module, value: None)  # type: ignore[assignment]
    _add_hooks(module, attribute)


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch makes one class per parametrized module and changes it when parametrizations come and go, but a deep copy
    shares it with its original, which would then change too.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)


def _reduce(module: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """How a masked module is pickled: as a module of its own class with plain weights, and its masks."""
    masks, lists = masks_of(module), module.parametrizations
    if len(masks) != len(lists):  # type: ignore[arg-type]
        other = next(name for name in lists if name not in masks)  # type: ignore[union-attr]
        raise ModelError(
            f"the {other} of a {type(module).__bases__[0].__name__} is computed by a parametrization that is no mask, "
            "which torch does not pickle; make it permanent with torch.nn.utils.parametrize.remove_parametrizations"
        )
    base: type[nn.Module] = type(module).__bases__[0]
    plain: nn.Module = object.__new__(base)
    state = dict(module.__dict__)
    state["_modules"] = {key: value for key, value in module._modules.items() if key != "parametrizations"}
    order = next(iter(masks.values())).order
    held = {**module._parameters, **{name: _stored(module, name) for name in masks}}
    place = {key: number for number, key in enumerate(order)}
    state["_parameters"] = dict(sorted(held.items(), key=lambda item: place.get(item[0], len(place))))
    for hooks in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
        kept = [(key, hook) for key, hook in state[hooks].items() if not isinstance(_actual(hook), _StateNames)]
        state[hooks] = OrderedDict(kept)
    plain.__dict__.update(state)
    if isinstance(plain, nn.RNNBase):
        plain._init_flat_weights()
    return _masked_again, (plain, {name: mask.mask for name, mask in masks.items()})


def _masked_again(module: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """The inverse of `_reduce`."""
    for attribute, mask in masks.items():
        _mask_one(module, attribute, mask)
    return module


class _NoQuantisation:
    """The ``qconfig`` that torch.ao gives the modules it will swap, with their stored weights and without masks."""

    def __get__(self, module: nn.Module | None, owner: type) -> None:
        # None is what torch.ao gives modules that it leaves alone.
        if module is None or "qconfig" not in module.__dict__:
            raise AttributeError("qconfig")

    def __set__(self, module: nn.Module, value: object) -> None:
        if value is not None:
            raise ModelError(_PERMANENT.format("quantisation by torch.ao copies stored weights without their masks"))
        module.__dict__["qconfig"] = None

    def __delete__(self, module: nn.Module) -> None:
        del module.__dict__["qconfig"]


def _refuse_script(module: nn.Module) -> nn.Module:
    raise ModelError(_PERMANENT.format("torch.jit.script knows no parametrizations"))


_PERMANENT = "{}; call cbs_opt.remove_masks(model) first, which leaves the zeros in place"
#: What masked modules have beside the members of their class.
_MEMBERS: dict[str, Any] = {
    "__reduce_ex__": _reduce,
    "qconfig": _NoQuantisation(),
    "__prepare_scriptable__": _refuse_script,
}


class _StateNames:
    """State-dict hooks of one masked attribute: it is saved and loaded under its usual name."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def _keys(self, prefix: str) -> tuple[str, str]:
        return prefix + self.attribute, f"{prefix}parametrizations.{self.attribute}.original"


class _SaveUnderOwnName(_StateNames):
    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        plain, inner = self._keys(prefix)
        if inner in state:
            original = state.pop(inner)
            state[plain] = torch.where(masks_of(module)[self.attribute].mask, original, 0.0)


class _LoadUnderOwnName(_StateNames):
    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        plain, inner = self._keys(prefix)
        if plain not in state:
            return
        value = state.pop(plain)
        mask = masks_of(module)[self.attribute].mask
        if tuple(value.shape) == tuple(mask.shape) and bool((value[~mask.to(value.device)] != 0).any()):
            errors.append(
                f"{plain!r} has non-zero values where this network's mask has removed the weight; load it into a "
                "network without masks (cbs_opt.remove_masks) or apply its own masks first"
            )
        state[inner] = value


def _add_hooks(module: nn.Module, attribute: str) -> None:
    module.register_state_dict_post_hook(_SaveUnderOwnName(attribute))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_LoadUnderOwnName(attribute))  # type: ignore[no-untyped-call]


def _remove_hooks(module: nn.Module, attribute: str) -> None:
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            actual = _actual(hook)
            if isinstance(actual, _StateNames) and actual.attribute == attribute:
                del hooks[key]


def _actual(hook: object) -> object:
    """A hook without what torch puts around it."""
    return getattr(hook, "hook", hook)
