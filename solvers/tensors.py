"""A problem as float64 vectors over all its blocks, on their device: what loops of large solvers work with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch

from solvers.block import QuadraticBlock
from solvers.errors import ProblemError


class ProblemTensors:
    """w, g, the diagonal of H and products with H, (n,) each, in the common numbering of the blocks.

    Raises
    ------
    ProblemError
        If the blocks lie on different devices.
    """

    def __init__(self, blocks: Sequence[QuadraticBlock]) -> None:
        self.blocks = tuple(blocks)
        self.device = self.blocks[0].device
        for block in self.blocks:
            if block.device != self.device:
                raise ProblemError(
                    f"block {block.name!r} lies on {block.device}, block {self.blocks[0].name!r} on {self.device}; "
                    "put all blocks of a problem on one device"
                )
        self._sizes = [block.n for block in self.blocks]

    @cached_property
    def weights(self) -> torch.Tensor:
        """w."""
        return torch.cat([block.weights for block in self.blocks])

    @cached_property
    def gradient(self) -> torch.Tensor | None:
        """g with zeros where a block has none; None where no block has one."""
        if all(block.gradient is None for block in self.blocks):
            return None
        return torch.cat([torch.zeros_like(b.weights) if b.gradient is None else b.gradient for b in self.blocks])

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """H_ii."""
        return torch.cat([block.diagonal for block in self.blocks])

    @cached_property
    def linear(self) -> torch.Tensor:
        """c = Hw − g, the linear term of the joint objective ½ vᵀHv − cᵀv + const."""
        product = self.multiply(self.weights)
        return product if self.gradient is None else product - self.gradient

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A vector (n,) by blocks, as views."""
        return torch.split(x, self._sizes)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """H x."""
        return torch.cat([b.multiply(part) for b, part in zip(self.blocks, self.split(x), strict=True)])

    def of(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A copy of a numpy vector or mask on the device."""
        return torch.tensor(array, device=self.device)
