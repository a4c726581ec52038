"""Accuracy and mean loss of a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from experiments.datasets.images import ImageSet
from experiments.networks.criterion import METRICS, Criterion


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent and mean cross-entropy in nats."""

    accuracy: float
    loss: float


def evaluate(
    model: nn.Module, samples: ImageSet, *, batch_size: int = 500, device: torch.device | str = "cpu"
) -> Evaluation:
    """Accuracy and cross-entropy of a classifier in eval mode; the mode is put back afterwards.

    Parameters
    ----------
    model
        Takes ``(B, C, H, W)`` float32, returns logits ``(B, classes)``; already on ``device``.
    samples
        What it is judged on.
    batch_size
        Images per forward pass; it changes speed and nothing else.
    """
    training = model.training
    model.eval()
    correct = 0
    loss = 0.0
    try:
        with torch.inference_mode():
            for x, y in samples.batches(batch_size):
                # Convolutions of small images run about twice as fast with channels last on a CPU.
                x = x.to(device, memory_format=torch.channels_last)
                y = y.to(device)
                logits = model(x)
                correct += int((logits.argmax(1) == y).sum())
                loss += float(F.cross_entropy(logits.double(), y, reduction="sum"))
    finally:
        model.train(training)
    return Evaluation(100.0 * correct / len(samples), loss / len(samples))


def _accuracy(model: nn.Module, samples: ImageSet, device: torch.device) -> float:
    return evaluate(model, samples, device=device).accuracy


#: Of classifiers of images.
ACCURACY = Criterion(METRICS["accuracy"], F.cross_entropy, _accuracy)
