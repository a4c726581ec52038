"""Eval mode for a while, and what batch norms must be like for gradients per sample to exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from solvers.errors import ModelError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in eval mode and restore every training flag afterwards; see `check_mode`."""
    check_mode(model)
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def check_mode(model: nn.Module) -> None:
    """Raise ModelError if batch norm would mix the samples of a batch."""
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is None:
            raise ModelError(
                f"batch norm {name!r} keeps no running statistics, so gradients per sample do not exist; build it with "
                "track_running_stats=True"
            )
        if module.training:
            raise ModelError(
                f"batch norm {name!r} is in train mode; call model.eval() first, after re-estimating its running "
                "statistics if they are stale"
            )
