"""CIFARNet on CIFAR-10, as in CBS: every weight is pruned, no bias."""

from __future__ import annotations

from experiments.catalog.experiment import Experiment, StageDefaults
from experiments.models import CIFARNet
from experiments.training import Recipe

CIFARNET = Experiment(
    name="cifarnet-cifar10",
    summary="CIFARNet (3 convolutions of 5x5, 2 linear layers), CIFAR-10, 116,704 weights",
    model=CIFARNet,
    dataset="cifar10",
    checkpoint="cifarnet_cifar10.safetensors",
    # About 15 s per epoch on one core; the test accuracy ends near 80 %, as in the literature.
    recipe=Recipe(epochs=30, batch_size=128, learning_rate=0.05, weight_decay=1e-3, augment=True, bfloat16=True),
    train_on_demand=True,
    sparsities=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    fisher_samples=1_000,
    fisher_batch=1,
    damping=1e-5,
    blocks="per_layer",
    staged=StageDefaults(500, 32, 1e-4),
)
