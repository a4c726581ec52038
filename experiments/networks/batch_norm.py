"""Batch-norm statistics from one augmented pass over the training set.

Checkpoints may carry statistics which do not belong to their weights.
"""

from __future__ import annotations

import torch
from torch import nn

from cbs_opt.network.batch_norm import reestimate
from experiments.datasets.images import ImageSet, crop_and_flip


def fresh_statistics(
    model: nn.Module, samples: ImageSet, *, seed: int = 0, batch_size: int = 128, device: torch.device | str = "cpu"
) -> None:
    """Replace the running statistics of every batch norm, in place; weights and mode stay as they are.

    Parameters
    ----------
    samples
        Training images; random crop (padding 4) and flip are applied.
    seed
        Of the order and the augmentation: the same seed gives the same statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    batches = (
        samples.normalise(crop_and_flip(samples.images[indices], generator)) for indices in order.split(batch_size)
    )
    reestimate(
        model,
        lambda network, images, _: network(images),
        ((images.to(device, memory_format=torch.channels_last), None, len(images)) for images in batches),
    )
