"""How far the outputs z of a changed network are from those z̄ of the dense one: sums, and what to divide them by.

    kl     Σ KL(softmax(z̄) ‖ softmax(z)) over the last dimension, and the number of positions
    mse    Σ ‖z − z̄‖² and Σ ‖z̄‖², so that their quotient is the relative squared error

A position is everything before the last dimension: a sample, or a token of a sample. Where the batch is a dict with an
``attention_mask`` of the shape of the positions, those that it masks (padding) do not count. Sums and divisors of
several batches add up to those of all of them, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from cbs_opt.data.trees import Tree, leaves
from solvers.errors import ModelError

DIVERGENCES = ("kl", "mse")
#: Names under which outputs that are no tensor keep what is compared.
_NAMES = ("logits", "last_hidden_state")


def divergence(output: Any, dense: Any, inputs: Tree, targets: Tree | None) -> tuple[float, float]:
    """Of the outputs of a batch: by their logits where there are any, else as all numbers in them."""
    logits, before = logits_of(output, targets), logits_of(dense, targets)
    if logits is None or before is None or logits.shape != before.shape:
        return _relative(output, dense)
    total, count = distance("kl", logits, before, inputs)
    return float(total), count


def distance(kind: str, output: Tensor, dense: Tensor, inputs: Tree) -> tuple[Tensor, float]:
    """One kind of divergence of two tensors of the same inputs, differentiable.

    Parameters
    ----------
    kind : {"kl", "mse"}
    output, dense : (..., C)
    inputs
        What both networks were given.

    Raises
    ------
    ModelError
        For outputs that cannot be compared so.
    """
    if output.shape != dense.shape or output.ndim == 0:
        raise ModelError(
            f"the network's output has shape {tuple(output.shape)}, the dense network's {tuple(dense.shape)}; a "
            "divergence takes the same, of one dimension or more"
        )
    if kind == "kl" and output.shape[-1] < 2:
        raise ModelError(
            f"the last dimension of the output, of shape {tuple(output.shape)}, is no distribution over classes; use "
            "loss='mse' or 'given'"
        )
    # In single precision at least: sums over a vocabulary lose what they are about in halves.
    dtype = torch.promote_types(output.dtype, torch.float32)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == output.shape[:-1] and not bool((mask != 0).all()):
        counted = (mask != 0).to(output.device)
        output, dense = output[counted], dense[counted]
    output, dense = output.to(dtype), dense.to(dtype)
    if kind == "mse":
        return (output - dense).square().sum(), float(dense.square().sum())
    logs, expected = F.log_softmax(output, -1), F.log_softmax(dense, -1)
    distances = (expected.exp() * (expected - logs)).sum(-1)
    return distances.double().sum(), float(distances.numel())


def logits_of(output: Any, targets: Tree | None) -> Tensor | None:
    """Logits (…, C): an entry of that name, or a tensor (samples, …, C) beside integer targets (samples, …) below C."""
    named = _named(output, "logits")
    if named is not None and named.ndim >= 2:
        return named
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        return None
    found = [t for _, t in leaves(targets)] if targets is not None else []
    if len(found) != 1 or found[0].is_floating_point() or found[0].shape != output.shape[:-1] or not found[0].numel():
        return None
    classes = output.shape[-1]
    return output if classes > 1 and int(found[0].min()) >= 0 and int(found[0].max()) < classes else None


def compared(output: Any) -> Tensor:
    """What of an output is moved: its `logits`, its `last_hidden_state`, or its first floating tensor."""
    named = [_named(output, name) for name in _NAMES]
    floating = [t for t in (*named, *tree_leaves(output)) if isinstance(t, Tensor) and t.is_floating_point()]
    if not floating:
        raise ModelError(
            f"the network's output, a {type(output).__name__}, holds no floating tensor that could be compared with "
            "the dense network's; use loss='given'"
        )
    return floating[0]


def _named(output: Any, name: str) -> Tensor | None:
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def _relative(output: Any, dense: Any) -> tuple[float, float]:
    apart = size = 0.0
    for one, other in zip(tree_leaves(output), tree_leaves(dense), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            apart += float((one.double() - other.double()).square().sum())
            size += float(other.double().square().sum())
    return apart, size
