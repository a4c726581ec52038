"""Linear layers: y = W x at the last dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cbs_opt.network.adapters.base import LayerAdapter, Rows, first_input, rows


class LinearAdapter(LayerAdapter):
    """``nn.Linear``; R × d is the weight as it is."""

    types: tuple[type[nn.Module], ...] = (nn.Linear,)

    def input_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        """The input, position by position."""
        return {"weight": [rows(first_input(args, kwargs))]}

    def output_gradient_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Tensor
    ) -> dict[str, Rows]:
        """The gradient, position by position."""
        return {"weight": [rows(gradient)]}
