"""Channels that are constant, taken out of all layers that they tie together.

Which layers those are, residual additions and concatenations included, the dependency graph of torch-pruning says (Fang
et al., *DepGraph*, CVPR 2023): a group is every dimension that has to be cut when one channel is. A channel of a group
goes where every layer that takes it either has no weight for it, or sees a constant map m_c there
(`cbs_opt.structured.observe`), which is put elsewhere first:

    m_c = 0                                  nothing to do
    W m_c the same at every position         into the bias of the layer
    m_c = r m_d, as at borders of padding    W_d ← W_d + r W_c for one channel d of the group that stays

so the network computes the same. Groups through layers that mix their channels otherwise (layer norm, group norm,
recurrent layers, grouped convolutions, embeddings) and the network's own outputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.formats.record import Example
from cbs_opt.structured.dependencies import ChannelGroup, Use, dependencies
from cbs_opt.structured.observe import Dead

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class GroupRecord:
    """What became of one group of channels.

    Attributes
    ----------
    name : str
        Of the layer whose outputs they are; ``and k others`` are tied to it.
    n, n_removed, n_dead : int
        Channels, those that are gone, and those that are constant for at least one of the layers that take them.
    why : str
        Where dead ones stay.
    """

    name: str
    n: int
    n_removed: int
    n_dead: int
    why: str = ""


def remove_channels(
    model: nn.Module, example: Example, dead: Mapping[nn.Module, Dead], leave: Sequence[nn.Module]
) -> tuple[GroupRecord, ...]:
    """Remove constant channels of a plain network in place, but none of the layers in `leave`.

    Raises
    ------
    OptionError
        If torch-pruning is not installed.
    ModelError
        If it cannot follow the network.
    """
    graph = dependencies(model, example, leave)
    records, cuts = [], []
    for group in graph.groups:
        record, removed = _settled(group, dead)
        if record is not None:
            records.append(record)
        if removed:
            cuts.append((group, removed))
    for group, removed in cuts:
        graph.cut(group, removed)
    return tuple(records)


def _settled(group: ChannelGroup, dead: Mapping[nn.Module, Dead]) -> tuple[GroupRecord | None, list[int]]:
    """Which channels of a group go, what they bring about being put elsewhere; None where none is dead."""
    n, uses = group.n, group.uses
    seen = [use for use in uses if use.module in dead]
    fit = [c for c in range(n) if seen and all(_is_dead(use, c, dead[use.module]) for use in seen)]
    some = [c for c in range(n) if any(_is_dead(use, c, dead[use.module]) for use in seen)]
    if not some:
        return None, []
    if group.odd or len(seen) < len(uses):
        return GroupRecord(group.name, n, 0, len(some), group.odd or "a layer that takes them was not called"), []
    removed = _put_elsewhere(seen, fit, dead, n)
    why = ""
    if len(fit) < len(some):
        why = f"{len(some) - len(fit)} are used by another layer of the group"
    if len(removed) < len(fit):
        kept = len(fit) - len(removed)
        why = "; ".join(filter(None, (why, f"{kept} stand for the constants of those removed, or are the last ones")))
    return GroupRecord(group.name, n, len(removed), len(some), why), removed


def _is_dead(use: Use, channel: int, dead: Dead) -> bool:
    if channel not in use.inputs:
        return False
    inputs = use.inputs[channel]
    return bool(dead.channels[inputs].all()) or not bool((use.weight(channel) != 0).any())


def _put_elsewhere(uses: Sequence[Use], fit: Sequence[int], dead: Mapping[nn.Module, Dead], n: int) -> list[int]:
    """Channels that can go once their constants are in a bias or in another channel's weights."""
    folds = {c: [_way(use, c, dead[use.module]) for use in uses] for c in fit}
    free = [c for c in fit if "merge" not in folds[c]]
    merged: list[int] = []
    stands: list[int] = []
    for c in (c for c in fit if "merge" in folds[c]):
        for d in stands:
            ratios = [_ratio(use, c, d, dead[use.module]) for use in uses]
            if all(ratio is not None for ratio in ratios):
                with torch.no_grad():
                    for use, ratio in zip(uses, ratios, strict=True):
                        assert ratio is not None
                        weight = use.module.weight
                        assert isinstance(weight, Tensor)
                        weight[:, use.inputs[d]] += ratio * use.weight(c)
                merged.append(c)
                break
        else:
            stands.append(c)
    if len(free) + len(merged) == n:
        # A layer without any channel is none.
        free = free[1:] or free
        merged = merged if len(free) + len(merged) < n else merged[1:]
    for c in free:
        for use in uses:
            _fold(use, c, dead[use.module])
    return sorted((*free, *merged))


def _way(use: Use, channel: int, dead: Dead) -> str:
    """How a constant is put elsewhere at one layer."""
    maps = dead.maps[use.inputs[channel]]
    if not bool((use.weight(channel) != 0).any()) or not bool((maps != 0).any()):
        return "zero"
    if isinstance(use.module, nn.Linear):
        return "bias"
    flat = maps.flatten(1)
    even = bool((flat - flat[:, :1]).abs().max() <= _TOLERANCE * flat.abs().max())
    padded = (
        use.module.padding_mode == "zeros"
        and use.module.padding not in ("valid", 0)
        and any(p != 0 for p in (use.module.padding if isinstance(use.module.padding, tuple) else (1,)))
    )
    return "bias" if even and not padded else "merge"


@torch.no_grad()
def _fold(use: Use, channel: int, dead: Dead) -> None:
    if _way(use, channel, dead) != "bias":
        return
    weight, maps = use.weight(channel), dead.maps[use.inputs[channel]]
    value = maps if maps.ndim == 1 else maps.flatten(1)[:, 0]
    added = (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ value.to(weight.dtype)
    module: Any = use.module
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(added))
    module.bias += added


def _ratio(use: Use, c: int, d: int, dead: Dead) -> float | None:
    """r with m_c = r m_d at one layer; None where there is none."""
    one, other = dead.maps[use.inputs[c]], dead.maps[use.inputs[d]]
    if not bool((use.weight(c) != 0).any()) or not bool((one != 0).any()):
        return 0.0
    size = float((other * other).sum())
    if one.shape != other.shape or size == 0.0 or not bool(dead.channels[use.inputs[d]].all()):
        return None
    ratio = float((one * other).sum()) / size
    return ratio if float((one - ratio * other).abs().max()) <= _TOLERANCE * float(one.abs().max()) else None
