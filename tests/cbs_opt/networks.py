"""Small networks and data for the tests, and slow, obviously right gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.forward import Forward
from cbs_opt.network.layers import PrunableLayers


class Mlp(nn.Module):
    """6 → 5 → 4 → 3 with a bias in the first layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(5, 4, bias=False)
        self.fc3 = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(F.relu(self.fc1(x), inplace=True))))


class ConvNet(nn.Module):
    """Strides that leave positions over, groups, dilation, string padding, circular padding, batch norm, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False)
        self.circular = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), padding_mode="circular", groups=3)
        self.dilated = nn.Conv2d(6, 4, 2, dilation=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn(self.conv1(x)))
        x = self.grouped(x)
        x = x + torch.tanh(self.circular(x))
        return self.fc(self.dilated(x).mean((2, 3)))


class SequenceNet(nn.Module):
    """A Conv1d and a Linear applied at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.linear = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.conv(x).transpose(1, 2))).mean(1))


class Tied(nn.Module):
    """One weight in two Linear layers and a third one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(self.twice(torch.tanh(self.twice(x))))


class TiedEmbedding(nn.Module):
    """A Linear whose weight is that of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x).mean(1))))


class Branching(nn.Module):
    """Python control flow that depends on the data: nothing batched can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 4)
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if bool(hidden.sum() > 0):
            hidden = torch.tanh(hidden)
        return self.fc2(hidden)


def build(cls: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network with random weights and, where it has batch norm, random statistics; in eval mode."""
    torch.manual_seed(seed)
    model = cls().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def inputs_for(
    cls: type[nn.Module], n: int, seed: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(x, y) of n samples for one of the networks above, three classes (seven for the embedding)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {Mlp: (6,), ConvNet: (2, 9, 8), SequenceNet: (3, 7), Tied: (4,), Branching: (6,)}
    if cls is TiedEmbedding:
        x = torch.randint(0, 7, (n, 3), generator=generator)
        return x, torch.randint(0, 7, (n,), generator=generator)
    x = torch.randn(n, *shapes[cls], generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def oracle_rows(model: nn.Module, layers: PrunableLayers, forward: Forward, data: CalibrationData, index) -> Tensor:
    """Gradients (r, n) of the mean loss of each row of `index`, by plain autograd, not divided by anything."""
    weights = layers.parameters(model)
    rows = []
    for row in index:
        inputs, targets = data.batch(row, "cpu")
        loss = forward.loss(forward.output(model, inputs, targets), inputs, targets)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        flat = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in flat]))
    return torch.stack(rows)


def train_briefly(model: nn.Module, x: Tensor, y: Tensor, steps: int = 60) -> nn.Module:
    """A few steps of Adam, so that gradients are not those of random weights."""
    torch.manual_seed(0)
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval()
