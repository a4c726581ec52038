"""Train a small network: SGD with momentum and a cosine step, resumable after every epoch.

The state after an epoch (weights, momentum, epoch) is written atomically beside the checkpoint; order and
augmentation of epoch e depend only on the seed and e, so that a killed training resumes to the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from experiments.datasets.images import ImageSet, crop_and_flip
from experiments.networks.checkpoints import read_tensors, save_checkpoint, write_tensors
from solvers.errors import CheckpointError


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes
    ----------
    epochs, batch_size, learning_rate, momentum, weight_decay, seed
        As usual; the step falls to zero along a half cosine, after a linear rise over the first ``warmup`` epochs.
    augment
        Random crop (padding 4) and horizontal flip.
    bfloat16
        Multiply in bfloat16 (weights and sums stay float32): faster where the processor has it.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 1.0
    augment: bool = False
    bfloat16: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What is reported after an epoch: its number from 1, of how many, mean training loss, seconds."""

    number: int
    total: int
    loss: float
    seconds: float


def train(
    model: nn.Module,
    samples: ImageSet,
    recipe: Recipe,
    *,
    state_path: Path | None = None,
    device: torch.device | str = "cpu",
    report: Callable[[Epoch], None] | None = None,
) -> nn.Module:
    """Train a model in place, from its state as given, or from ``state_path`` where a training was cut off.

    Parameters
    ----------
    model
        On ``device``.
    state_path
        Where the state is kept between epochs; None keeps none. A state of another recipe is an error.
    report
        Called after every epoch.

    Raises
    ------
    CheckpointError
        ``state_path`` holds the state of another recipe or network, or is damaged.
    OSError
        The state cannot be written.
    """
    progress = _Progress.begin(model, recipe, -(-len(samples) // recipe.batch_size))
    first = 0 if state_path is None or not state_path.exists() else progress.restore(state_path)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        order = torch.randperm(len(samples), generator=generator)
        total = 0.0
        for indices in torch.split(order, recipe.batch_size):
            images = samples.images[indices]
            if recipe.augment:
                images = crop_and_flip(images, generator)
            x = samples.normalise(images).to(device, memory_format=torch.channels_last)
            y = samples.labels[indices].to(device)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=recipe.bfloat16):
                loss = F.cross_entropy(model(x), y)
            progress.optimizer.zero_grad()
            loss.backward()
            progress.optimizer.step()
            progress.schedule.step()
            total += float(loss.detach()) * len(indices)
        if state_path is not None:
            progress.store(state_path, epoch + 1)
        if report is not None:
            report(Epoch(epoch + 1, recipe.epochs, total / len(samples), time.perf_counter() - started))
    model.eval()
    return model


def train_to_file(
    model: nn.Module,
    samples: ImageSet,
    recipe: Recipe,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[Epoch], None] | None = None,
) -> nn.Module:
    """`train`, with the state kept beside ``path`` until the finished checkpoint is there."""
    state_path = path.with_suffix(".training")
    train(model, samples, recipe, state_path=state_path, device=device, report=report)
    save_checkpoint(model, path, note=f"trained with {recipe}")
    state_path.unlink(missing_ok=True)
    return model


@dataclass(frozen=True, eq=False)
class _Progress:
    """How far a training is: what a state file holds besides the epoch."""

    model: nn.Module
    recipe: Recipe
    optimizer: SGD
    schedule: SequentialLR

    @classmethod
    def begin(cls, model: nn.Module, recipe: Recipe, n_steps: int) -> _Progress:
        """At the first of ``n_steps`` steps of the first epoch."""
        # Biases and batch-norm parameters are left out of the decay.
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
        rise = max(round(recipe.warmup * n_steps), 1)
        schedule = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, 0.01 / (recipe.warmup + 0.01), total_iters=rise),
                CosineAnnealingLR(optimizer, max(recipe.epochs * n_steps - rise, 1)),
            ],
            milestones=[rise],
        )
        return cls(model, recipe, optimizer, schedule)

    @property
    def signature(self) -> str:
        """What a state must have been made with."""
        return repr(sorted(asdict(self.recipe).items()))

    def store(self, path: Path, epoch: int) -> None:
        """Write the state after an epoch."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"velocity.{k}": self.optimizer.state[p]["momentum_buffer"] for k, p in self._parameters()}
        metadata = {"recipe": self.signature, "epoch": str(epoch), "schedule": json.dumps(self.schedule.state_dict())}
        write_tensors(path, tensors, metadata)

    def restore(self, path: Path) -> int:
        """Load a state in place; returns the number of epochs it has behind it."""
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("recipe") != self.signature:
                raise ValueError("it was begun with another recipe")
            self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            for name, p in self._parameters():
                self.optimizer.state[p]["momentum_buffer"] = tensors[f"velocity.{name}"].to(p.device).view_as(p)
            self.schedule.load_state_dict(json.loads(metadata["schedule"]))
            for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
                group["lr"] = rate
            return int(metadata["epoch"])
        except (CheckpointError, RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"cannot resume the training in {path} ({error}); delete the file to begin anew"
            ) from error

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())
