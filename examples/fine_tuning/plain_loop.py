"""Prune a small network, then train it in a loop of one's own: the masks come with the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt


def network() -> nn.Module:
    """Fresh from somewhere else; here it is trained a little."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))


def samples(n: int = 2000) -> tuple[Tensor, Tensor]:
    """Points and the largest of four sums of their coordinates."""
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    return x, x.reshape(n, 4, 4).sum(2).argmax(1)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> float:
    """An ordinary loop, which knows nothing of masks; the loss of the last epoch."""
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    total = 0.0
    model.train()
    for _ in range(epochs):
        total = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(targets) / len(y)
    model.eval()
    return total


def main(epochs: int = 5) -> cbs_opt.PruneResult:
    """Train, prune, train on; returns the result, whose network has its masks still."""
    x, y = samples()
    model = network()
    train(model, x, y, epochs)
    result = cbs_opt.prune(model, (x, y), F.cross_entropy, sparsity=0.9, solver="obs", device="cpu")
    loss = train(result.model, x, y, epochs)
    found = cbs_opt.check(result.model, result.masks)
    print(f"pruned to {result.report.n_kept} weights, loss {result.report.loss_pruned:.3f}; trained on: {loss:.3f}")
    print(found)
    # A plain network again, zeros and all, once nothing is trained any more.
    plain = cbs_opt.remove_masks(result.model)
    cbs_opt.apply_masks(plain, result.masks)
    return result


if __name__ == "__main__":
    main()
