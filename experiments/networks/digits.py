"""A small perceptron on scikit-learn's digits: runs anywhere in seconds, with no data on disk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbs_opt import FisherOptions, StageOptions
from experiments.networks.experiment import ImageExperiment, Phase, StageDefaults, StagedTable
from experiments.networks.training import Recipe


class DigitsMLP(nn.Module):
    """64-32-16-10 perceptron for scikit-learn's 8x8 digits: 2,720 weights (and 58 biases, never pruned).

    Takes images ``(N, 1, 8, 8)``, returns logits ``(N, 10)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 16)
        self.fc3 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


DIGITS = ImageExperiment(
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
    table=StagedTable(
        phases=(Phase(((0.5, 2), (0.7, 1), (0.8, 2))), Phase(((0.9, 3), (0.95, 4)), regrow=0.3)),
        reported=(0.5, 0.8, 0.9, 0.95),
    ),
)
