"""Multilayer perceptrons: the literature's MLPNet for MNIST and a small one for the embedded digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


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
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits
