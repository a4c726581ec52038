"""ResNet20 on CIFAR-10, as in WoodFisher, CBS and CHITA: the 18 block convolutions are pruned."""

from __future__ import annotations

from cbs_opt import Distillation, FisherOptions, StageOptions
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
    fisher=FisherOptions(n_rows=1_000, batch_size=1, damping=1e-5, blocks="per_layer"),
    # Rows per layer, because a step spans the rows of each layer by itself. At equal images 125 rows of 64 went further
    # than 250 of 32 or 64 of 128, and the weight ½ of the dense network's outputs further than none or 0.9. From the
    # dense network to 60 % the choice was better without the gradient at every λ, and a third better at small λ.
    staged=StageDefaults(
        FisherOptions(n_rows=125, batch_size=64, damping=2e-4, blocks="per_layer", method="loop"),
        StageOptions(
            held_out=1000,
            max_evaluations=6,
            batch_norm_samples=5000,
            step_damping=5e-3,
            momentum=0.8,
            first_order=False,
            distillation=Distillation(weight=0.5, temperature=2.0),
        ),
    ),
    include=("layer*.conv*",),
    stale_batch_norm=True,
)
