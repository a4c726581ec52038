"""Images held as bytes and normalised batch by batch, so that CIFAR-10 takes 150 MB and not 600."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images.

    Attributes
    ----------
    images
        uint8 ``(N, C, H, W)``.
    labels
        int64 ``(N,)``.
    mean, std
        Per channel, in units of ``image / scale``; a batch is ``(image / scale - mean) / std``.
    scale
        The value of a white pixel.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0

    def __len__(self) -> int:
        return len(self.images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``(B, C, H, W)`` -> float32 of the same shape."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return images.to(torch.float32).div_(self.scale).sub_(mean).div_(std)

    def batch(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Normalised images float32 and labels int64 of the samples asked for."""
        return self.normalise(self.images[indices]), self.labels[indices]

    def subset(self, indices: Tensor | slice) -> ImageSet:
        """The samples asked for, in that order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def sample(self, count: int, seed: int) -> ImageSet:
        """``count`` samples drawn without replacement (all, shuffled, if there are no more)."""
        generator = torch.Generator().manual_seed(seed)
        return self.subset(torch.randperm(len(self), generator=generator)[:count])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples in order, normalised, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images, and in words where they came from."""

    name: str
    train: ImageSet
    test: ImageSet
    source: str

    def calibration(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """A sample of the training set, drawn with the seed: normalised images and labels."""
        return self.train.sample(count, seed).batch(slice(None))


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random crop after zero padding and random horizontal flip, each image its own draw.

    Parameters
    ----------
    images
        ``(B, C, H, W)``, any dtype.
    generator
        CPU generator; the same state gives the same augmentation.
    padding
        Pixels added on every side before a window of the old size is cut.
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(flip, width - 1 - columns, columns)
    which = torch.arange(count).view(-1, 1, 1)
    # Indexing around a slice puts the indexed axes first: (B, H, W, C).
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
