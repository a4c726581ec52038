"""``nn.MultiheadAttention``: q = W_q x, k = W_k x', v = W_v x'', and the projection of what the heads return.

The three are one weight ``in_proj_weight`` (3E, E), whose three groups of rows see query, key and value, or three
weights where key and value have another size. The call is replayed with the projections done apart: attention itself is
torch's own function with identities for projections, so masks, added biases and averages are as there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.network.adapters.base import MatrixView, Products, Replayed, shape_of

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AttentionAdapter(Replayed):
    """``nn.MultiheadAttention``; its output projection is never called as a module, so it answers for that too."""

    types = (nn.MultiheadAttention,)

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """The projections in, together or apart, and the projection out."""
        return (*(("in_proj_weight",) if module.in_proj_weight is not None else _SEPARATE), "out_proj.weight")

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """The weight as it is."""
        shape = shape_of(module, attribute)
        return MatrixView(shape, shape[0], groups=3 if attribute == "in_proj_weight" else 1)

    def replay(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Products]]:
        """Projections, attention, projection."""
        assert isinstance(module, nn.MultiheadAttention)
        given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
        del given["self"]
        seen = [given.pop(name).detach() for name in ("query", "key", "value")]
        # Samples first; torch's function wants places first.
        swap = seen[0].ndim == 3
        if swap and not module.batch_first:
            seen = [x.transpose(0, 1) for x in seen]
        together = module.in_proj_weight
        weights = together.chunk(3) if together is not None else [getattr(module, name) for name in _SEPARATE]
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        projected = [_known(F.linear(x, w, b)) for x, w, b in zip(seen, weights, biases, strict=True)]
        same = torch.eye(module.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
        query, key, value = (y.transpose(0, 1) if swap else y for y in projected)
        heads, shares = F.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            None,
            None,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            same,
            None,
            training=False,
            use_separate_proj_weight=True,
            q_proj_weight=same,
            k_proj_weight=same,
            v_proj_weight=same,
            **given,
        )
        heads = heads.transpose(0, 1) if swap else heads
        last = _known(F.linear(heads, module.out_proj.weight, module.out_proj.bias))
        pairs = list(zip(seen, projected, strict=True))
        products: dict[str, Products] = (
            {"in_proj_weight": pairs}
            if together is not None
            else {name: [pair] for name, pair in zip(_SEPARATE, pairs, strict=True)}
        )
        products["out_proj.weight"] = [(heads, last)]
        return (last.transpose(0, 1) if swap and not module.batch_first else last, shares), products


def _known(y: Tensor) -> Tensor:
    """A product that autograd knows of, also where no parameter requires a gradient."""
    return y if y.requires_grad else y.requires_grad_()
