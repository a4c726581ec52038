"""Eval mode for a while, and what batch norms must be like for gradients per sample to exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from solvers.errors import ModelError
from solvers.plain import plain_state

P = ParamSpec("P")
R = TypeVar("R")


def in_plain_state(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of a network, or of something that has one, under `solvers.plain.plain_state`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.values())
        held = (getattr(getattr(value, "workspace", value), "model", value) for value in given)
        model = next((value for value in held if isinstance(value, nn.Module)), nn.Module())
        weight = next((p for p in model.parameters() if p.is_floating_point()), None)
        with plain_state() if weight is None else plain_state(weight.dtype, weight.device):
            return function(*args, **kwargs)

    return run


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
