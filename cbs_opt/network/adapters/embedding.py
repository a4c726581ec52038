"""Embeddings, where asked for: y = Wᵀ x with x the indicator of a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.network.adapters.base import MatrixView, Rows, first_input, rows, shape_of
from cbs_opt.network.adapters.linear import LinearAdapter


class EmbeddingAdapter(LinearAdapter):
    """``nn.Embedding``; R = embedding dimensions, d = tokens, so the weight is (d, R).

    Its inputs are indicators, (positions, tokens): their moment is the diagonal of how often each token occurs.
    """

    types = (nn.Embedding,)
    opt_in = True

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """The table transposed."""
        shape = shape_of(module, attribute)
        return MatrixView(shape, rows=shape[1], order=(1, 0))

    def input_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        """An indicator for every token."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": [rows(F.one_hot(first_input(args, kwargs).long(), weight.shape[0]).to(weight.dtype))]}

    def positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[float]]:
        """None: tokens are looked up."""
        return {"weight": [0.0]}
