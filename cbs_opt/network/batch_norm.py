"""Batch-norm statistics under changed weights.

Removing weights shifts what the layers behind them see, so the running statistics of a pruned network are stale.
Re-estimating them is a forward pass over training data in train mode; no weight changes. The statistics of the batches
are averaged by their numbers of samples, so that it does not matter which batch came last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def tracked_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics by qualified name, on the CPU."""
    return {
        f"{name}.{key}": buffer.detach().to("cpu", copy=True)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key, buffer in module.named_buffers(recurse=False)
        if buffer is not None
    }


@torch.no_grad()
def restore_statistics(model: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Write running statistics, or whatever else has these names, back in place."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in statistics.items():
        held[name].copy_(value)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch at hand and leave their running statistics alone; the rest is in eval mode.

    It shows the loss that the network would have with its statistics re-estimated, without doing so.
    """
    norms = tracked_norms(model)
    flags = {module: module.training for module in model.modules()}
    kept = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    model.eval()
    for norm in norms:
        # Without running statistics a batch norm uses those of the batch, also in eval mode.
        norm.running_mean, norm.running_var, norm.num_batches_tracked = None, None, None
    try:
        yield
    finally:
        for norm, (mean, variance, count) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
        for module, flag in flags.items():
            module.training = flag


def reestimate(
    model: nn.Module, output: Callable[[nn.Module, Any, Any], Any], batches: Iterable[tuple[Any, Any, int]]
) -> None:
    """Replace the running statistics by the mean over `batches`, in place.

    Means are those of all samples; variances are means of variances within batches, each unbiased, deeper in the
    network of what is normalised by the batch. Batch norms that are never called keep what they have.

    Parameters
    ----------
    model : nn.Module
        Only its batch norms are put into train mode; every flag is restored.
    output : callable
        (network, inputs, targets) → output, as `cbs_opt.Forward.output`.
    batches : iterable of (inputs, targets, samples)
        On the device of the network, each of many samples.
    """
    norms = tracked_norms(model)
    flags = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    seen: dict[nn.Module, int] = dict.fromkeys(norms, 0)
    size = 0

    def weigh(norm: Any, _: Any) -> None:
        if not seen[norm]:
            norm.reset_running_stats()
        seen[norm] += size
        norm.momentum = size / seen[norm]

    model.eval()
    hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
    for norm in norms:
        norm.train()
    try:
        with torch.no_grad():
            for inputs, targets, size in batches:  # noqa: B007
                output(model, inputs, targets)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, flag in flags.items():
            module.training = flag
