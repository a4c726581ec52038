"""Which layers' channels are one, through residual additions and concatenations, by torch-pruning's dependency graph.

A group is every dimension that has to be cut when one channel is: rows of the layers that give it, entries of batch
norms, columns of the layers that take it (Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023). The
graph is read off one call, and is wrong for some networks (concatenations that are flattened, in version 1.6), so it is
tried out: in a copy with random weights, half of the channels are blanked, and just the columns that are said to take
them must go quiet.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.formats.record import Example
from cbs_opt.structured.observe import LAYERS, dead_inputs
from solvers.errors import ModelError, OptionError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Modules whose channels are independent of one another, beside `LAYERS`.
_PLAIN = (*_NORMS, nn.PReLU)


@dataclass(eq=False)
class Use:
    """A layer that takes the channels of a group: which of its inputs are which channel."""

    module: nn.Module
    inputs: Mapping[int, list[int]]

    def weight(self, channel: int) -> Tensor:
        """(R, inputs, ...) of one channel."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight[:, self.inputs[channel]]


@dataclass(eq=False)
class ChannelGroup:
    """Channels that several layers have in common.

    Attributes
    ----------
    n : int
        Channels.
    root : Any
        What torch-pruning cuts them by.
    sources : dict of module to list of (int, int)
        Layers and batch norms that give them: (channel, entry of the module).
    names : list of str
        Of the layers among these.
    uses : list of Use
    odd : str
        Why no channel can go; empty where they can.
    """

    n: int
    root: Any
    sources: dict[nn.Module, list[tuple[int, int]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    odd: str = ""

    @property
    def name(self) -> str:
        """Of the first layer that gives them, and how many others do."""
        names = list(dict.fromkeys(self.names)) or ["the network's input"]
        return names[0] + (f" and {len(names) - 1} others" if len(names) > 1 else "")

    @classmethod
    def of(cls, group: Any, names: Mapping[nn.Module, str]) -> ChannelGroup:
        """From a group of torch-pruning."""
        found = cls(len(group[0].idxs), group[0].dep)
        for item in group:
            module, pairs = item.dep.target.module, list(zip(item.root_idxs, item.idxs, strict=True))
            if isinstance(module, LAYERS):
                grouped = getattr(module, "groups", 1) > 1
                if grouped and module.groups != module.out_channels:
                    found.odd = found.odd or f"{names.get(module)} is a grouped convolution"
                if item.dep.handler.__name__ != "prune_in_channels":
                    found.names.append(names.get(module, ""))
                    found.sources[module] = pairs
                elif not grouped:
                    where: dict[int, list[int]] = {}
                    for channel, entry in pairs:
                        where.setdefault(channel, []).append(entry)
                    found.uses.append(Use(module, where))
            elif isinstance(module, nn.Parameter):
                found.odd = found.odd or "a parameter of the network itself is added to them"
            elif module in names and not isinstance(module, _PLAIN) and any(True for _ in module.parameters()):
                found.odd = found.odd or f"{names[module]} ({type(module).__name__}) mixes them"
            elif isinstance(module, _NORMS):
                found.sources[module] = pairs
        return found


@dataclass(eq=False)
class Dependencies:
    """All groups of a network, and the graph that cuts them."""

    graph: Any
    groups: list[ChannelGroup]

    def cut(self, group: ChannelGroup, channels: list[int]) -> None:
        """Take channels out of the modules."""
        self.graph.get_pruning_group(group.root.target.module, group.root.handler, channels).prune()


def dependencies(model: nn.Module, example: Example, leave: Sequence[nn.Module] = ()) -> Dependencies:
    """The groups of a plain network, but none of the layers in `leave`.

    Raises
    ------
    OptionError
        If torch-pruning is not installed.
    ModelError
        If it cannot follow the network.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise OptionError("following channels needs torch-pruning; pip install 'cbs-opt[structured]'") from error
    inputs: Any = example.kwargs or (example.args[0] if len(example.args) == 1 else example.args)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        # It follows gradients.
        for parameter in frozen:
            parameter.requires_grad_(True)
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs, verbose=False)
        groups = list(graph.get_all_groups(ignored_layers=list(leave), root_module_types=LAYERS))
    except Exception as error:
        raise ModelError(
            f"torch-pruning cannot follow {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    names = {module: name for name, module in model.named_modules()}
    found = [ChannelGroup.of(group, names) for group in groups]
    _try_out(found, model, names, example)
    return Dependencies(graph, found)


@torch.no_grad()
def _try_out(
    groups: Sequence[ChannelGroup], model: nn.Module, names: Mapping[nn.Module, str], example: Example
) -> None:
    """Mark groups whose channels others take than the graph says."""
    generator = torch.Generator().manual_seed(0)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, LAYERS):
            noise = torch.randn(module.weight.shape, generator=generator) * module.weight[0].numel() ** -0.5
            module.weight.copy_(noise)
        elif isinstance(module, _NORMS):
            # Statistics of other weights would silence some channels.
            module.reset_running_stats()
            if module.affine:
                module.reset_parameters()
    before = _by_name(copied, example)
    claimed = {name: torch.zeros_like(quiet) for name, quiet in before.items()}
    for group in groups:
        gone = torch.randperm(group.n, generator=generator) < group.n // 2
        for module, pairs in group.sources.items():
            _blank(copied.get_submodule(names[module]), [entry for channel, entry in pairs if gone[channel]])
        for use in group.uses:
            if names[use.module] in claimed:
                entries = [entry for channel, taken in use.inputs.items() if gone[channel] for entry in taken]
                claimed[names[use.module]][entries] = True
    after = _by_name(copied, example)
    for group in groups:
        for name in (names[use.module] for use in group.uses):
            if name in claimed and not torch.equal(after[name] & ~before[name], claimed[name]):
                group.odd = group.odd or f"torch-pruning follows them wrongly to {name}"


def _blank(module: nn.Module, entries: list[int]) -> None:
    """Zero what a layer or batch norm gives at some channels."""
    tensors = [module.bias, getattr(module, "running_mean", None)]
    for tensor in (*tensors, module.weight if isinstance(module, LAYERS) else None):
        if isinstance(tensor, Tensor):
            tensor[entries] = 0.0


def _by_name(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """The dead inputs, bool (d,), of every layer that is called."""
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: dead.channels for module, dead in dead_inputs(model, example).items()}
