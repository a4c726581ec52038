"""Attention heads that give nothing, or a constant, taken out of the projections.

A head h whose value rows are zero gives the bias of its values at every position, as attention weights sum to 1:
W_o b_h goes into the bias of the output projection. A head whose columns of that projection are zero gives nothing.
Where k query heads share one key and value head, they go together.

Known are modules with ``q_proj, k_proj, v_proj`` and ``o_proj`` or ``out_proj`` and a ``head_dim`` (Llama and its kin,
OPT, CLIP), and ``query, key, value`` beside ``output.dense`` (BERT, ViT). They work out how many heads there are from
the sizes of what they project, or are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cbs_opt.structured.channels import GroupRecord

#: Attributes that say how many heads a module has.
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


@dataclass(eq=False)
class Attention:
    """The projections of one attention module."""

    name: str
    module: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    size: int

    @property
    def layers(self) -> tuple[nn.Linear, ...]:
        """All four."""
        return self.query, self.key, self.value, self.output


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Those of a network that are known."""
    for name, module in model.named_modules():
        m: Any = module
        if all(isinstance(getattr(m, key, None), nn.Linear) for key in ("q_proj", "k_proj", "v_proj")):
            output, size = getattr(m, "o_proj", None) or getattr(m, "out_proj", None), getattr(m, "head_dim", None)
            if isinstance(output, nn.Linear) and isinstance(size, int):
                yield Attention(name, m, m.q_proj, m.k_proj, m.v_proj, output, size)
        elif all(isinstance(getattr(m, key, None), nn.Linear) for key in ("query", "key", "value")):
            parent: Any = model.get_submodule(name.rpartition(".")[0])
            output, size = getattr(getattr(parent, "output", None), "dense", None), getattr(m, "attention_head_size", 0)
            if isinstance(output, nn.Linear) and isinstance(size, int) and size > 0:
                yield Attention(name, m, m.query, m.key, m.value, output, size)


@torch.no_grad()
def remove_heads(attention: Attention) -> GroupRecord | None:
    """Take the dead heads of one module out, in place; None where there is none."""
    size, value = attention.size, attention.value
    n_values, n = value.out_features // size, attention.query.out_features // size
    shared = n // n_values
    blank = [not bool((w != 0).any()) for w in torch.split(value.weight, size)]
    unused = [not bool((w != 0).any()) for w in torch.split(attention.output.weight, size, dim=1)]
    dead = [v for v in range(n_values) if blank[v] or all(unused[v * shared : (v + 1) * shared])]
    some = [h for h in range(n) if blank[h // shared] or unused[h]]
    if not some:
        return None
    gone = dead if len(dead) < n_values else dead[1:]
    for v in gone:
        if blank[v] and value.bias is not None:
            _fold(attention, v, shared)
    keep = [v for v in range(n_values) if v not in gone]
    values = _entries(keep, size)
    queries = _entries([v * shared + i for v in keep for i in range(shared)], size)
    for layer, rows in ((attention.query, queries), (attention.key, values), (value, values)):
        layer.weight = nn.Parameter(layer.weight[rows].clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[rows].clone(), layer.bias.requires_grad)
        layer.out_features = len(rows)
    output = attention.output
    output.weight = nn.Parameter(output.weight[:, queries].clone(), output.weight.requires_grad)
    output.in_features = len(queries)
    for key in _COUNTS:
        if isinstance(getattr(attention.module, key, None), int):
            setattr(attention.module, key, len(keep) * shared)
    if isinstance(getattr(attention.module, "num_key_value_heads", None), int):
        attention.module.num_key_value_heads = len(keep)
    for key in ("all_head_size", "inner_dim"):
        if isinstance(getattr(attention.module, key, None), int):
            setattr(attention.module, key, len(queries))
    why = ""
    if len(gone) * shared < len(some):
        why = f"{len(some) - len(gone) * shared} share keys and values with others, or are the last ones"
    return GroupRecord(f"heads of {attention.name}", n, len(gone) * shared, len(some), why)


def _fold(attention: Attention, v: int, shared: int) -> None:
    size, output = attention.size, attention.output
    assert attention.value.bias is not None
    constant = attention.value.bias[v * size : (v + 1) * size]
    columns = output.weight[:, v * shared * size : (v + 1) * shared * size]
    added = columns.reshape(-1, shared, size).sum(1) @ constant
    output.bias = nn.Parameter(added if output.bias is None else output.bias + added)


def _entries(heads: list[int], size: int) -> list[int]:
    return [h * size + i for h in heads for i in range(size)]
