"""Which weights of a network are pruned, and why the others are not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from cbs_opt.network.adapters import LayerAdapter, adapter_of, layer_name, registered
from cbs_opt.network.identity import key_of, places_of
from cbs_opt.network.layers import Layer, PrunableLayers, Skipped
from cbs_opt.network.masks import PruningMask
from solvers.arguments import instance, odd_kind
from solvers.errors import ModelError, OptionError, UnknownNameError


@dataclass(frozen=True)
class _Candidate:
    """A weight that an adapter knows of."""

    owner: str
    module: nn.Module
    attribute: str
    adapter: LayerAdapter

    @property
    def parameter(self) -> str:
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute

    @property
    def name(self) -> str:
        return layer_name(self.owner, self.attribute)

    @property
    def kind(self) -> str:
        return self.adapter.kind(self.module)

    def left_alone(self, shared: Mapping[str, Tensor]) -> str:
        """Why it is not pruned unless it is named, or nothing."""
        if self.adapter.opt_in:
            return f"{self.kind}: pruned only where an include pattern names it"
        if not any(parameter.requires_grad for parameter in shared.values()):
            return "frozen (requires_grad=False): pruned only where an include pattern names it"
        return ""

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in (self.name, self.parameter, self.owner))


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
) -> PrunableLayers:
    """The prunable layers of a network: every weight of a kind that is known (`cbs_opt.register_layer`).

    Parameters
    ----------
    model : nn.Module
    include, exclude : patterns
        Shell patterns (`fnmatch`, case-sensitive) on qualified names of modules or weights; a layer is taken if it
        matches any of `include` and none of `exclude`. ``"layer?.*.conv*"`` takes the block convolutions of a ResNet.
        Frozen weights (``requires_grad=False``) and embeddings are taken only by a pattern that says more than ``*``.

    Returns
    -------
    PrunableLayers

    Raises
    ------
    UnknownNameError
        If a pattern matches no prunable layer.
    ModelError
        If nothing prunable is left, a weight is uninitialised, complex, or computed by something other than a pruning
        mask, or parameters share memory in different layouts.
    """
    instance("model", model, nn.Module, error=ModelError)
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    check_tensors(model)
    places = places_of(model)
    candidates = _candidates(model)
    if not candidates:
        kinds = ", ".join(kind.__name__ for adapter in registered() for kind in adapter.types)
        raise ModelError(f"{type(model).__name__} has no prunable layer, which is a {kinds} with a weight")
    wanted = _matching(candidates, include, "include")
    named = _matching(candidates, [p for p in _patterns(include) if p.strip("*")], "include")
    keys = {c.parameter: key_of(_stored(c)) for c in candidates}
    unwanted = {keys[name] for name in _matching(candidates, exclude, "exclude")}
    uses: dict[Hashable, list[_Candidate]] = {}
    for candidate in candidates:
        uses.setdefault(keys[candidate.parameter], []).append(candidate)
    layers: dict[Hashable, Layer] = {}
    reasons: dict[Hashable, tuple[str, bool]] = {}
    start = 0
    for candidate in candidates:
        key = keys[candidate.parameter]
        if key in layers:
            continue
        shared = places.get(key, {candidate.parameter: _stored(candidate)})
        if candidate.parameter not in wanted:
            reasons.setdefault(key, ("matches no include pattern", True))
            continue
        if key in unwanted:
            # Excluding one of the modules that share a weight excludes the weight.
            reasons.setdefault(key, ("excluded", True))
            continue
        if candidate.parameter not in named and (why := candidate.left_alone(shared)):
            reasons.setdefault(key, (why, False))
            continue
        _check_weight(candidate)
        view = candidate.adapter.view(candidate.module, candidate.attribute)
        own_first = sorted(uses[key], key=lambda other: other is not candidate)
        layers[key] = Layer(
            name=candidate.name,
            kind=candidate.kind,
            view=view,
            start=start,
            stop=start + view.n,
            places=tuple(dict.fromkeys((candidate.parameter, *shared))),
            uses=tuple((user.owner, user.attribute) for user in own_first),
        )
        start += view.n
    skipped = _skipped(model, {key: held for key, held in places.items() if key not in layers}, reasons)
    if not layers:
        raise ModelError(
            f"no prunable layer is left: include={_patterns(include)} and exclude={_patterns(exclude)} leave none of "
            + "; ".join(f"{skip.name} ({skip.reason})" for skip in skipped)
        )
    n_model = sum(next(iter(held.values())).numel() for held in places.values())
    return PrunableLayers(tuple(layers.values()), skipped, n_model)


def _candidates(model: nn.Module) -> list[_Candidate]:
    """Weights that adapters know of in the order of the modules, those of shared modules under their first name."""
    found: dict[str, _Candidate] = {}
    for owner, module in model.named_modules():
        adapter = adapter_of(module)
        for attribute in () if adapter is None else adapter.weights(module):
            assert adapter is not None
            candidate = _Candidate(owner, module, attribute, adapter)
            holder, name = _holder(candidate)
            if f"{name}_mask" in holder._buffers:
                raise ModelError(
                    f"layer {candidate.name!r} carries a torch.nn.utils.prune mask, which breaks copying; convert the "
                    "network with cbs_opt.from_torch_prune(model), or make the pruning permanent with "
                    "torch.nn.utils.prune.remove"
                )
            if name not in holder._buffers and isinstance(getattr(holder, name, None), Tensor):
                found.setdefault(candidate.parameter, candidate)
    return list(found.values())


def _holder(candidate: _Candidate) -> tuple[nn.Module, str]:
    """The module that holds the weight itself, and its attribute."""
    path, _, name = candidate.attribute.rpartition(".")
    return candidate.module.get_submodule(path), name


def _stored(candidate: _Candidate) -> Tensor:
    """The parameter behind the weight: the weight itself, or the original under a parametrization."""
    holder, name = _holder(candidate)
    if parametrize.is_parametrized(holder, name):
        original = getattr(holder.parametrizations[name], "original", None)  # type: ignore[index]
        if isinstance(original, Tensor):
            return original
    weight = getattr(holder, name)
    assert isinstance(weight, Tensor)
    return weight


def _check_weight(candidate: _Candidate) -> None:
    """Raise ModelError for a weight that cannot be pruned."""
    (holder, name), what = _holder(candidate), f"the weight of layer {candidate.name!r}"
    if parametrize.is_parametrized(holder, name):
        chain = holder.parametrizations[name]  # type: ignore[index]
        other = [type(p).__name__ for p in chain if not isinstance(p, PruningMask)]
        if other:
            raise ModelError(
                f"{what} is computed by the parametrization {other[0]}; make it permanent with "
                "torch.nn.utils.parametrize.remove_parametrizations, or exclude the layer"
            )
    elif name not in holder._parameters:
        raise ModelError(
            f"{what} is no parameter but computed, as by torch.nn.utils.weight_norm; make it permanent, e.g. with "
            "torch.nn.utils.remove_weight_norm, or exclude the layer"
        )
    weight = _stored(candidate)
    if not weight.is_floating_point():
        raise ModelError(f"{what} is {weight.dtype}; only real floating weights can be pruned")
    if weight.numel() == 0:
        raise ModelError(f"{what} is empty (shape {tuple(weight.shape)}); exclude it")


def _matching(candidates: Sequence[_Candidate], patterns: Sequence[str] | str, what: str) -> set[str]:
    """Parameters that match any of the patterns; a pattern that matches none is an error."""
    matched: set[str] = set()
    for pattern in _patterns(patterns):
        hits = {candidate.parameter for candidate in candidates if candidate.matches(pattern)}
        if not hits:
            raise UnknownNameError.of(
                f"{what} pattern",
                pattern,
                [candidate.name for candidate in candidates],
                "The pattern matches no prunable layer; use * and ? freely.",
            )
        matched |= hits
    return matched


def _patterns(patterns: Sequence[str] | str) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def check_tensors(model: nn.Module) -> None:
    """Raise ModelError for parameters and buffers without values, or not held as plain numbers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name!r} is not initialised yet; run one batch through the network first")
        if odd_kind(tensor):
            raise ModelError(f"{name!r} is {odd_kind(tensor)}; load or convert it to a dense tensor first")


def check_patterns(name: str, patterns: object) -> None:
    """Raise OptionError unless `patterns` is a pattern or several of them."""
    several = isinstance(patterns, (list, tuple, set, frozenset)) and all(isinstance(p, str) for p in patterns)
    if not several and not isinstance(patterns, str):
        raise OptionError(f"{name} must be a pattern such as 'layer?.*' or a list of them, not {patterns!r}")


def _skipped(
    model: nn.Module,
    left: Mapping[Hashable, Mapping[str, Tensor]],
    reasons: Mapping[Hashable, tuple[str, bool]],
) -> tuple[Skipped, ...]:
    """A line for every matrix-shaped parameter that no layer holds."""
    found = []
    for key, places in left.items():
        name, parameter = next(iter(places.items()))
        if parameter.ndim < 2:
            continue
        reason, asked = reasons.get(key) or (_unknown(model, name), False)
        if len(places) > 1:
            reason += f"; also {', '.join(list(places)[1:])}"
        found.append(Skipped(name, tuple(parameter.shape), reason, asked))
    return tuple(found)


def _unknown(model: nn.Module, name: str) -> str:
    """Why no adapter has a parameter."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, parametrize.ParametrizationList):
        return "part of a parametrization"
    if adapter_of(owner) is not None:
        return f"no weight that a {type(owner).__name__} multiplies its inputs by"
    return f"no adapter for {type(owner).__name__}; see cbs_opt.register_layer"
