"""Segments: the parts of a network through which data flow once, one after the other.

A *cut* is a module, called once, whose output is all that the rest of the network knows of what came before. The cuts
c_1 … c_K of a network make K + 1 segments, segment j being whatever runs between the returns of c_j and c_{j+1}, also
outside of modules. What a segment needs besides (masks, rotary embeddings) the network computes again each time, since
it is called as a whole, with the modules c_1 … c_{j-1} replaced by nothing and c_j by its output kept from before.

Cuts are found by calls of the network on a few samples, not by class names. Candidates are the calls inside the network
and inside of cuts, in the order of time, that hold prunable layers. To try one, all cuts before it return NaN, the
network (the cut around it) is given NaN, and the candidate returns its output recorded: where the network (the cut
around it) returns the same as ever, nothing else flows on. In the same way NaN shows, later on, that data took another
path.

A layer is measured when the segments before it are pruned (`cbs_opt.measure.segment_passes`). Inside a segment layers
fall into steps, in the order of time, those that are called with the very same tensor into one. A layer that is called
in several segments makes them one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from cbs_opt.data.calibration import cut
from cbs_opt.measure.layer_inputs import Batch, Streamed, quiet
from cbs_opt.network.layers import Layer

#: Samples by which cuts are found.
_PROBES = 2
#: Relative to the largest entry of an output: what another order of sums may change.
_SAME = 1e-4
#: Beyond so many steps (experts, each with tokens of its own) a segment is one.
_MOST_STEPS = 8


class PathError(Exception):
    """Data took another path through the network than those by which its segments were found."""


class _Reached(BaseException):
    """Ends a call of the network once a cut has returned."""


@dataclass(eq=False)
class _Call:
    """A call of a module: what it holds, its output, when it began and ended."""

    name: str
    module: nn.Module
    start: int
    stop: int = 0
    output: Any = None
    given: Any = None
    inner: list[_Call] = field(default_factory=list)

    def walk(self) -> Iterator[_Call]:
        yield self
        for call in self.inner:
            yield from call.walk()


@dataclass(frozen=True, eq=False)
class Chain:
    """Cuts of a network in order, and the layers of each of the segments they make.

    Attributes
    ----------
    cuts : tuple of str
        Names of modules.
    segments : tuple of tuples of Layer
        One more than cuts.
    steps : dict of str to int
        Which step of its segment a layer is in; those that are not there are in the first.
    """

    cuts: tuple[str, ...]
    segments: tuple[tuple[Layer, ...], ...]
    steps: Mapping[str, int] = field(default_factory=dict)

    def in_steps(self, segment: int) -> list[tuple[Layer, ...]]:
        """The layers of a segment, those of each step together; at least one step."""
        layers = self.segments[segment]
        numbers = sorted({self.steps.get(layer.name, 0) for layer in layers}) or [0]
        return [tuple(layer for layer in layers if self.steps.get(layer.name, 0) == number) for number in numbers]


def whole(network: Streamed) -> Chain:
    """All layers in one segment."""
    return Chain((), (tuple(network.layers),))


def find_chain(network: Streamed) -> Chain:
    """The finest chain of a network; `whole` where there is none. Raises ModelError, DataError if it cannot be run."""
    first = network.stream.first()
    inputs, targets, size = cut(first, np.arange(min(first[2], _PROBES)))
    return _Finder(network, (network.put(inputs), None if targets is None else network.put(targets), size)).chain()


class _Finder:
    """The search for cuts; see the module's docstring."""

    def __init__(self, network: Streamed, batch: Batch) -> None:
        self.network, self.batch = network, batch
        with torch.no_grad(), quiet(network.model):
            self.root = _recorded(network, batch)
        self.calls = list(self.root.walk())
        owners = network.modules(network.layers)
        #: Times at which each layer is called.
        self.times: dict[str, list[int]] = {layer.name: [] for layer in network.layers}
        #: What they are called with first.
        self.given: dict[str, Any] = {}
        for call in self.calls:
            for layer, _ in owners.get(call.module, ()):
                self.times[layer.name].append(call.stop)
                self.given.setdefault(layer.name, call.given)

    def chain(self) -> Chain:
        cuts: list[_Call] = []
        with torch.no_grad(), quiet(self.network.model):
            self._descend(self.root, cuts)
        spans = [(min(times), max(times)) for times in self.times.values() if times]
        cuts = [cut for cut in cuts if not any(first <= cut.stop < last for first, last in spans)]
        cuts = self._useful(sorted(cuts, key=lambda cut: cut.stop))
        names = tuple(cut.name for cut in cuts)
        segments: list[list[Layer]] = [[] for _ in range(len(cuts) + 1)]
        for layer in self.network.layers:
            segments[self._segment(layer, cuts)].append(layer)
        steps = {name: step for segment in segments if cuts for name, step in self._steps(segment)}
        return Chain(names, tuple(tuple(segment) for segment in segments), steps)

    def _steps(self, segment: list[Layer]) -> Iterator[tuple[str, int]]:
        """(layer, its step): in the order of time, one with those called with the same tensor."""
        called = sorted((layer.name for layer in segment if self.times[layer.name]), key=lambda n: self.times[n][0])
        numbers: dict[Any, int] = {}
        for name in called:
            numbers.setdefault(self.given[name], len(numbers))
        if len(numbers) <= _MOST_STEPS:
            yield from ((name, numbers[self.given[name]]) for name in called)

    def _useful(self, cuts: list[_Call]) -> list[_Call]:
        """The last of the cuts between one layer and the next: what holds others spares the calls inside, later on."""
        ends = sorted(max(times) for times in self.times.values() if times)
        last = {sum(end <= cut.stop for end in ends): cut for cut in cuts}
        return [cut for done, cut in last.items() if 0 < done < len(ends)]

    def _segment(self, layer: Layer, cuts: Sequence[_Call]) -> int:
        times = self.times[layer.name]
        if times:
            return sum(cut.stop < max(times) for cut in cuts)
        # Not called by the samples tried: with the part of the network that it stands in.
        owner = layer.uses[0][0]
        return next((i for i, cut in enumerate(cuts) if owner.startswith(f"{cut.name}.")), len(cuts))

    def _descend(self, parent: _Call, cuts: list[_Call]) -> None:
        """Find the cuts inside a call whose own output is one, innermost first."""
        for call in parent.inner:
            once = sum(other.module is call.module for other in self.calls) == 1
            if not once or not self._holds_layers(call) or not self._is_cut(call, parent, cuts):
                continue
            if len(call.inner) > 1 or any(self._holds_layers(inner) for inner in call.inner):
                self._descend(call, cuts)
            cuts.append(call)

    def _holds_layers(self, call: _Call) -> bool:
        return any(call.start < time <= call.stop for times in self.times.values() for time in times)

    def _is_cut(self, call: _Call, parent: _Call, cuts: Sequence[_Call]) -> bool:
        """Whether `parent` returns what it did where only the output of `call` is known of what came before."""
        if not any(t.is_floating_point() for t in _tensors(call.output)):
            return False
        stubs = {cut.name: tree_map_only(Tensor, filled, cut.output) for cut in cuts if cut.stop < call.start}
        stubs[call.name] = call.output
        try:
            with replaced(self.network.model, stubs), _blinded(parent.module):
                found = outputs_of(self.network, self.batch, [parent.name]).get(parent.name)
        except Exception:
            # Whatever the network says about NaN: it looks at what should play no part.
            return False
        return _same(found, parent.output)


def _recorded(network: Streamed, batch: Batch) -> _Call:
    """All calls of modules in a call of the network."""
    clock = 0
    root = _Call("", network.model, 0)
    stack: list[_Call] = []
    alive: list[Tensor] = []

    def enter(module: nn.Module, given: Any, name: str) -> None:
        nonlocal clock
        clock += 1
        call = root if module is network.model else _Call(name, module, clock)
        tensors = _tensors(given)
        # The memory of those that live is not used again.
        alive.extend(tensors[:1])
        call.given = next(((t.data_ptr(), t.shape, t.stride(), t._version) for t in tensors), clock)
        if stack:
            stack[-1].inner.append(call)
        stack.append(call)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal clock
        clock += 1
        call = stack.pop()
        # A copy: it may be changed in place by what comes next.
        call.stop, call.output = clock, tree_map_only(Tensor, torch.clone, output)

    with ExitStack() as hooks:
        for name, module in network.model.named_modules():

            def named(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                enter(module, (args, kwargs), name)

            hooks.callback(module.register_forward_pre_hook(named, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        network.call(batch)
    return root


@contextmanager
def replaced(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    """Some modules return copies of given outputs instead of being called."""
    with ExitStack() as stack:
        for name, output in outputs.items():
            module = model.get_submodule(name)
            own = module.__dict__.get("forward")

            def stub(*_: Any, output: Any = output, **__: Any) -> Any:
                return tree_map_only(Tensor, torch.clone, output)

            def restore(module: nn.Module = module, own: Any = own) -> None:
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own

            module.__dict__["forward"] = stub
            stack.callback(restore)
        yield


@contextmanager
def _blinded(module: nn.Module) -> Iterator[None]:
    """A module sees NaN for the first tensor of numbers that it is given: what it passes on must come from a cut."""

    def blind(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = [*args, *kwargs.values()]
        for at, value in enumerate(given):
            if isinstance(value, Tensor) and value.is_floating_point():
                given[at] = filled(value)
                break
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

    handle = module.register_forward_pre_hook(blind, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def outputs_of(network: Streamed, batch: Batch, names: Sequence[str], *, stop: bool = True) -> dict[str, Any]:
    """Copies of the outputs of some modules, the network itself being ``""``; `stop` ends the call with the last."""
    found: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name in names:

            def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                if name in found:
                    raise PathError(f"{name} is called twice")
                found[name] = tree_map_only(Tensor, torch.clone, output)
                if stop and name == names[-1]:
                    raise _Reached

            hooks.callback(network.model.get_submodule(name).register_forward_hook(keep).remove)
        with suppress(_Reached):
            network.call(batch)
    return found


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def inside(name: str, cuts: Sequence[str]) -> bool:
    """Whether a module lies inside of one of some others."""
    return any(name.startswith(f"{cut}.") for cut in cuts)


def filled(tensor: Tensor) -> Tensor:
    """NaN for numbers, zeros for integers."""
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)


def _same(found: Any, expected: Any) -> bool:
    pairs = list(zip(_tensors(found), _tensors(expected), strict=False))
    if not pairs or len(pairs) != len(_tensors(expected)):
        return False
    for one, other in pairs:
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.is_floating_point():
            size = float(other.abs().max()) if other.numel() else 0.0
            if not torch.allclose(one, other, rtol=0.0, atol=_SAME * size, equal_nan=False):
                return False
        elif not torch.equal(one, other):
            return False
    return True
