"""How far the outputs of a changed network are from those of the dense one.

    logits z            mean over positions of KL(softmax(z̄) ‖ softmax(z)),     z̄ the dense network's
    anything else       ‖z − z̄‖² / ‖z̄‖² over all numbers of the output

Logits are an entry of that name, as Hugging Face networks have, or an output of one tensor (samples, …, C) beside
integer targets (samples, …) in [0, C). Positions under zeros of an ``attention_mask`` do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from cbs_opt.data.trees import Tree, leaves


def divergence(output: Any, dense: Any, inputs: Tree, targets: Tree | None) -> tuple[float, float]:
    """Of the outputs of a batch from those of the dense network: a sum, and what to divide it by, summed likewise."""
    logits, before = logits_of(output, targets), logits_of(dense, targets)
    if logits is None or before is None or logits.shape != before.shape:
        return _relative(output, dense)
    logits, before = F.log_softmax(logits.float(), -1), F.log_softmax(before.float(), -1)
    distances = (before.exp() * (before - logits)).sum(-1)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == distances.shape:
        distances = distances[mask != 0]
    return float(distances.double().sum()), float(distances.numel())


def logits_of(output: Any, targets: Tree | None) -> Tensor | None:
    """Logits (…, C) in an output, if there are any."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor) and named.ndim >= 2:
        return named
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        return None
    found = [t for _, t in leaves(targets)] if targets is not None else []
    if len(found) != 1 or found[0].is_floating_point() or found[0].shape != output.shape[:-1] or not found[0].numel():
        return None
    classes = output.shape[-1]
    return output if classes > 1 and int(found[0].min()) >= 0 and int(found[0].max()) < classes else None


def _relative(output: Any, dense: Any) -> tuple[float, float]:
    apart = size = 0.0
    for one, other in zip(tree_leaves(output), tree_leaves(dense), strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            apart += float((one.double() - other.double()).square().sum())
            size += float(other.double().square().sum())
    return apart, size
