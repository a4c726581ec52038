"""CIFARNet: three 5x5 convolutions and two linear layers, 116,704 weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CIFARNet(nn.Module):
    """Small convolutional network for CIFAR-10 images ``(N, 3, 32, 32)``, returns logits ``(N, 10)``.

    The spatial size runs 32, 15, 7, 3. Only the weights are pruned, not the 202 biases.

    References
    ----------
    Yu et al., "The Combinatorial Brain Surgeon", ICML 2022 (its CIFARNet).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(576, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.max_pool2d(self.conv1(x), 3, 2))
        x = F.avg_pool2d(torch.relu(self.conv2(x)), 3, 2)
        x = F.avg_pool2d(torch.relu(self.conv3(x)), 3, 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
