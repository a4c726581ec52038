"""A small perceptron on scikit-learn's digits: runs anywhere in seconds, with no data on disk."""

from __future__ import annotations

from cbs_opt import FisherOptions, StageOptions
from experiments.catalog.experiment import Experiment, StageDefaults
from experiments.models import DigitsMLP
from experiments.training import Recipe

DIGITS = Experiment(
    name="digits-mlp",
    summary="64-32-16-10 perceptron, scikit-learn's 8x8 digits, 2,720 weights; embedded",
    model=DigitsMLP,
    dataset="digits",
    checkpoint="digits_mlp.safetensors",
    # The strong decay keeps the training loss, and with it the gradients, from vanishing.
    recipe=Recipe(epochs=40, batch_size=32, learning_rate=0.05, weight_decay=1e-2),
    train_on_demand=True,
    sparsities=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    fisher=FisherOptions(n_rows=1_000, batch_size=1, damping=1e-3),
    staged=StageDefaults(FisherOptions(n_rows=200, batch_size=16, damping=1e-3), StageOptions()),
    reference=True,
)
