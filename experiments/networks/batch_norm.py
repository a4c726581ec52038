"""Re-estimate batch-norm statistics: one augmented pass over the training set in train mode.

Checkpoints may carry statistics which do not belong to their weights, and pruning changes what they should be.
The statistics are reset and averaged over the batches of the pass with equal weight (``momentum=None``), so
that they do not depend on which batches came last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from experiments.datasets.images import ImageSet, crop_and_flip

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a module tracks running statistics."""
    return any(isinstance(m, BatchNorm) and m.track_running_stats for m in model.modules())


def reestimate(
    model: nn.Module,
    samples: ImageSet,
    *,
    seed: int = 0,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Replace the running statistics of every batch norm, in place; weights and mode stay as they are.

    Parameters
    ----------
    samples
        Training images; random crop (padding 4) and flip are applied.
    seed
        Of the order and the augmentation: the same seed gives the same statistics.
    progress
        Called with batches done and batches in all.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    training = model.training
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    batches = torch.split(order, batch_size)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    try:
        with torch.no_grad():
            for done, indices in enumerate(batches, 1):
                images = crop_and_flip(samples.images[indices], generator)
                model(samples.normalise(images).to(device, memory_format=torch.channels_last))
                if progress is not None:
                    progress(done, len(batches))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)
