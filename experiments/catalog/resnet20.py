"""ResNet20 on CIFAR-10, as in WoodFisher, CBS and CHITA: the 18 block convolutions are pruned."""

from __future__ import annotations

from experiments.catalog.experiment import Experiment, StageDefaults
from experiments.models import ResNet20
from experiments.training import Recipe

RESNET20 = Experiment(
    name="resnet20-cifar10",
    summary="ResNet20, CIFAR-10, 267,264 weights in 18 block convolutions",
    model=ResNet20,
    dataset="cifar10",
    checkpoint="resnet20_cifar10.safetensors",
    recipe=Recipe(epochs=160, batch_size=128, learning_rate=0.1, weight_decay=5e-4, augment=True),
    train_on_demand=False,
    sparsities=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    fisher_samples=1_000,
    fisher_batch=1,
    damping=1e-5,
    blocks="per_layer",
    staged=StageDefaults(500, 16, 2e-3),
    include=("layer*.conv*",),
    stale_batch_norm=True,
)
