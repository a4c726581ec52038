"""Convolutions in one to three dimensions, grouped and depthwise: y = W x with x the patch that the filter sees.

With G groups rows r of the weight (R, C/G, *kernel) see the channels of group ⌊r G / R⌋ only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.network.adapters.base import LayerAdapter, MatrixView, Rows, first_input, shape_of


class ConvolutionAdapter(LayerAdapter):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with any stride, padding, dilation and groups."""

    types: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def view(self, module: nn.Module, attribute: str) -> MatrixView:
        """Filters × (channels of the group and kernel)."""
        shape = shape_of(module, attribute)
        return MatrixView(shape, rows=shape[0], groups=module.groups)  # type: ignore[arg-type]

    def input_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Rows]:
        """The patches of each group."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = batched(first_input(args, kwargs), len(module.kernel_size))
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        return {"weight": [patches_of(x, module.kernel_size, module.stride, module.dilation, module.groups)]}

    def positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[float]]:
        """Places of the output, over all samples."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        x = batched(first_input(args, kwargs), len(module.kernel_size))
        margins = module._reversed_padding_repeated_twice
        places = len(x)
        for axis, (size, step, spread) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            back = 2 * (len(module.kernel_size) - 1 - axis)
            wide = x.shape[2 + axis] + margins[back] + margins[back + 1]
            places *= (wide - spread * (size - 1) - 1) // step + 1
        return {"weight": [float(places)] * int(module.groups)}

    def output_gradient_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Tensor
    ) -> dict[str, Rows]:
        """The gradient at every place of the output."""
        dimensions, groups = len(shape_of(module, "weight")) - 2, int(module.groups)  # type: ignore[arg-type]
        return {"weight": [by_group(batched(gradient, dimensions), groups, dimensions)]}


def batched(x: Tensor, dimensions: int) -> Tensor:
    """(N, channels, *places), also where the layer was called with one sample alone."""
    return x if x.ndim == dimensions + 2 else x.unsqueeze(0)


def patches_of(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """(N, C, *places) → (G, N·output places, C/G·kernel), with the places next to one another in memory.

    Each place of the kernel is a copy of rows as they lie; that is far quicker than one of all small windows.
    """
    steps = list(zip(kernel, stride, dilation, strict=True))
    places = [(n - spread * (k - 1) - 1) // step + 1 for n, (k, step, spread) in zip(x.shape[2:], steps, strict=True)]
    found = x.new_empty((x.shape[1], math.prod(kernel), len(x), *places))
    for number, offset in enumerate(product(*map(range, kernel))):
        starts = [o * spread for o, (_, _, spread) in zip(offset, steps, strict=True)]
        where = (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, places, stride, strict=True))
        found[:, number] = x.transpose(0, 1)[(slice(None), slice(None), *where)]
    return found.reshape(groups, -1, len(x) * math.prod(places)).mT


def by_group(x: Tensor, groups: int, dimensions: int) -> Tensor:
    """(N, C, *places, *rest) → (G, N·places, C/G·rest)."""
    split = x.reshape(len(x), groups, -1, *x.shape[2:])
    moved = split.permute(1, 0, *range(3, 3 + dimensions), 2, *range(3 + dimensions, split.ndim))
    return moved.reshape(groups, -1, math.prod(moved.shape[2 + dimensions :]))
