"""Transposed convolutions: y = W x with x what reaches a place of the output.

With u = places of the input times the stride, y[p] = Σ_k W[k] x[p + padding − dilation·k], x being zero between the
multiples of the stride: a convolution of the input with zeros in between, padded by dilation·(K − 1) − padding, and the
kernel reversed. The module holds the weight as (C, R/G, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn import functional as F

from cbs_opt.network.adapters.base import MatrixView, Rows, first_input, shape_of
from cbs_opt.network.adapters.convolution import ConvolutionAdapter, batched, patches_of


class TransposedConvolutionAdapter(ConvolutionAdapter):
    """``nn.ConvTranspose1d``, ``nn.ConvTranspose2d`` and ``nn.ConvTranspose3d``."""

    types: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """(G, C/G, R/G, *kernel) with the outputs before the inputs."""
        groups, shape = int(module.groups), shape_of(module, attribute)  # type: ignore[arg-type]
        apart = (groups, shape[0] // groups, *shape[1:])
        return MatrixView(shape, shape[1] * groups, groups, apart, (0, 2, 1, *range(3, len(apart))))

    def input_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        """Patches of the input with zeros in between."""
        assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        dimensions = len(module.kernel_size)
        x = batched(first_input(args, kwargs), dimensions)
        kernel, stride, dilation = list(module.kernel_size), list(module.stride), list(module.dilation)
        padding = [int(margin) for margin in module.padding]
        asked = args[1] if len(args) > 1 else kwargs.get("output_size")
        more = module._output_padding(x, asked, stride, padding, kernel, dimensions, dilation)
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)))
        spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
        margins: list[int] = []
        for axis in reversed(range(dimensions)):
            margin = dilation[axis] * (kernel[axis] - 1) - padding[axis]
            margins += [margin, margin + more[axis]]
        seen = patches_of(F.pad(spread, margins), kernel, (1,) * dimensions, dilation, int(module.groups))
        # The kernel is turned around.
        size = math.prod(kernel)
        return {"weight": [seen.reshape(*seen.shape[:2], -1, size).flip(3).flatten(2)]}

    def positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[float]]:
        """Places of the input, over all samples: nothing is multiplied with the zeros in between."""
        assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        x = batched(first_input(args, kwargs), len(module.kernel_size))
        return {"weight": [float(len(x) * math.prod(x.shape[2:]))] * int(module.groups)}
