"""Train a small network: SGD with momentum and a cosine step, resumable after every epoch.

The state after an epoch (weights, momentum, epoch) is written atomically beside the checkpoint; order and
augmentation of epoch e depend only on the seed and e, so that a killed training resumes to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.datasets.cache import write_atomically
from experiments.datasets.images import ImageSet, crop_and_flip
from experiments.networks.checkpoints import save_checkpoint
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
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    first = 0
    if state_path is not None and state_path.exists():
        first = _restore(state_path, model, velocity, recipe)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    per_epoch = -(-len(samples) // recipe.batch_size)
    model.train()
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        order = torch.randperm(len(samples), generator=generator)
        total = 0.0
        for step, indices in enumerate(torch.split(order, recipe.batch_size)):
            images = samples.images[indices]
            if recipe.augment:
                images = crop_and_flip(images, generator)
            x = samples.normalise(images).to(device, memory_format=torch.channels_last)
            y = samples.labels[indices].to(device)
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=recipe.bfloat16):
                loss = F.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            rate = _rate(recipe, epoch + step / per_epoch)
            with torch.no_grad():
                for (name, p), g in zip(parameters.items(), gradients, strict=True):
                    # Biases and batch-norm parameters are left out of the decay.
                    decay = recipe.weight_decay if p.dim() > 1 else 0.0
                    velocity[name].mul_(recipe.momentum).add_(g + decay * p)
                    p.sub_(rate * velocity[name])
            total += float(loss.detach()) * len(indices)
        if state_path is not None:
            _store(state_path, model, velocity, recipe, epoch + 1)
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


def _rate(recipe: Recipe, epoch: float) -> float:
    """Learning rate at a fractional epoch."""
    if epoch < recipe.warmup:
        return recipe.learning_rate * (epoch + 0.01) / (recipe.warmup + 0.01)
    done = (epoch - recipe.warmup) / max(recipe.epochs - recipe.warmup, 1e-9)
    return 0.5 * recipe.learning_rate * (1.0 + math.cos(math.pi * min(done, 1.0)))


def _signature(recipe: Recipe) -> str:
    return repr(sorted(asdict(recipe).items()))


def _store(path: Path, model: nn.Module, velocity: dict[str, Tensor], recipe: Recipe, epoch: int) -> None:
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors |= {f"velocity.{k}": v.cpu().contiguous() for k, v in velocity.items()}
    blob = save(tensors, metadata={"recipe": _signature(recipe), "epoch": str(epoch)})
    write_atomically(path, lambda stream: stream.write(blob))


def _restore(path: Path, model: nn.Module, velocity: dict[str, Tensor], recipe: Recipe) -> int:
    """Load a state in place; returns the number of epochs it has behind it."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
        tensors = load(path.read_bytes())
        if metadata.get("recipe") != _signature(recipe):
            raise ValueError("it was begun with another recipe")
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        for name, v in velocity.items():
            v.copy_(tensors[f"velocity.{name}"])
        return int(metadata["epoch"])
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"cannot resume the training in {path} ({error}); delete the file to begin anew"
        ) from error
