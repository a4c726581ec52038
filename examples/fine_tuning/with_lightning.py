"""Prune a small network, then train it with Lightning: the masks come with the network."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt


class Classifier(lightning.LightningModule):
    """Any module of one's own around the pruned network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets = batch
        return F.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As for any other network."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(epochs: int = 3) -> cbs_opt.PruneResult:
    """Prune, train on; returns the result, whose network has its masks still."""
    torch.manual_seed(0)
    x = torch.randn(1000, 16)
    y = x.reshape(-1, 4, 4).sum(2).argmax(1)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    result = cbs_opt.prune(network, (x, y), F.cross_entropy, sparsity=0.8, solver="obs", device="cpu")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(result.model.train()), DataLoader(TensorDataset(x, y), 64, shuffle=True))
    result.model.eval()
    loss = float(F.cross_entropy(result.model(x), y).detach())
    print(f"pruned to {result.report.n_kept} weights, loss {result.report.loss_pruned:.3f}; trained on: {loss:.3f}")
    print(cbs_opt.check(result.model, result.masks))
    return result


if __name__ == "__main__":
    main()
