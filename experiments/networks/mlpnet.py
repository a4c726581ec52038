"""MLPNet on MNIST, as in WoodFisher, CBS and CHITA: a 784-40-20-10 perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbs_opt import FisherOptions, StageOptions
from experiments.networks.experiment import ImageExperiment, Phase, StageDefaults, StagedTable
from experiments.networks.training import Recipe


class MLPNet(nn.Module):
    """784-40-20-10 perceptron with ReLU and no biases: 32,360 weights.

    Takes images ``(N, 1, 28, 28)`` (or anything which flattens to ``(N, 784)``), returns logits ``(N, 10)``.

    References
    ----------
    Singh and Alistarh, "WoodFisher", NeurIPS 2020; Yu et al., "The Combinatorial Brain Surgeon", ICML 2022.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


#: Sparsities late on the path, and stages at each.
_LATE = (
    (0.9, 5), (0.92, 1), (0.935, 1), (0.95, 6), (0.96, 2), (0.967, 1), (0.975, 1), (0.98, 14),
    (0.984, 2), (0.987, 2), (0.99, 14),
)  # fmt: skip

MLPNET = ImageExperiment(
    name="mlpnet-mnist",
    summary="784-40-20-10 perceptron without biases, MNIST, 32,360 weights",
    model=MLPNet,
    dataset="mnist",
    checkpoint="mlpnet_mnist.safetensors",
    sha256="d3aaa9ac2aab2511c1c4c171be320b500e57accd169eddd432d6b6b8ee682540",
    # Stops where the published network does, at a training loss of 0.20 and 94 %; the architecture can reach 97 %.
    recipe=Recipe(epochs=2, batch_size=64, learning_rate=0.005, weight_decay=1e-4),
    train_on_demand=True,
    sparsities=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
    fisher=FisherOptions(n_rows=10_000, batch_size=1, damping=1e-3),
    staged=StageDefaults(
        FisherOptions(n_rows=1000, batch_size=100, damping=1e-4), StageOptions(settle=1, first_order=True)
    ),
    reference=True,
    table=StagedTable(
        phases=(
            Phase(((0.5, 6), (0.6, 3), (0.7, 3), (0.8, 3), (0.85, 2))),
            Phase(_LATE, regrow=0.3),
        ),
        reported=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
    ),
)
