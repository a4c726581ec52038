"""The augmentation networks are trained with, for images that are normalised already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.datasets.images import ImageSet, crop_and_flip
from solvers.errors import DataError


@dataclass(frozen=True)
class CropAndFlip:
    """Random crop (padding 4) and horizontal flip of normalised images, as `cbs_opt.StageOptions.augment` takes it.

    Attributes
    ----------
    mean, std
        Of the normalisation, per channel: the border is black, as it is where images are cropped before.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, samples: ImageSet) -> CropAndFlip:
        """With the normalisation of some images."""
        return cls(samples.mean, samples.std)

    def __call__(self, inputs: Any, generator: torch.Generator) -> Tensor:
        """Augment images ``(B, C, H, W)``, float."""
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise DataError("only images of shape (B, C, H, W) can be cropped and flipped")
        black = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], dtype=inputs.dtype)
        black = black.view(1, -1, 1, 1).to(inputs.device)
        return crop_and_flip(inputs - black, generator) + black
