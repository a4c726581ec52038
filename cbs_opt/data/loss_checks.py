"""What a loss must be like for rows of gradients to stand for it; refused before work starts.

Rows are gradients of the losses ℓ_i of single samples (or of batches of b), while training and judging use the loss of
a batch. Both mean the same only if the loss of a batch is the mean of the losses of its samples, in value and gradient:

    ℓ(B) = mean_{i ∈ B} ℓ({i}),      ∇ℓ(B) = mean_{i ∈ B} ∇ℓ({i}).

It does not hold where a loss normalises, weighs, sorts or compares within the batch, sums over it, or broadcasts
targets against outputs. It is tried with different samples, of different classes where the targets tell. Where it is
the network that treats a sample by what is beside it (routing, early exits), rows are what it does with samples alone,
and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData, Index
from cbs_opt.data.forward import Forward
from cbs_opt.data.trees import Tree, leaves
from solvers.errors import CBSError, ModelError

#: Samples that are taken alone and together, and how far to go on where their losses and gradients are all zero.
_SAMPLES, _MOST_SAMPLES = 8, 64
#: Relative differences of losses and of gradients, and absolute ones of losses, that rounding explains, by dtype.
_ROUNDING = {torch.float64: (1e-7, 1e-6, 1e-12), torch.float32: (2e-3, 5e-3, 1e-6)}
_ROUGH = (5e-2, 1e-1, 1e-3)


@contextmanager
def typed_failures(
    inputs: Tree,
    targets: Tree | None,
    numbers: Index | None = None,
    passing: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn whatever network or loss throw at calibration samples into a ModelError that shows what they were given.

    Parameters
    ----------
    inputs, targets
    numbers : int64, optional
        The samples, by number.
    passing : tuple of exceptions
        Those that are not failures.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (CBSError, *passing)):
            raise
        given = [f"{path or 'x'} {tuple(t.shape)} {t.dtype}" for path, t in leaves(inputs)]
        expected = [f"{path or 'y'} {tuple(t.shape)} {t.dtype}" for path, t in leaves(targets)]
        which = "calibration samples" if numbers is None else f"calibration {_named(numbers)}"
        remedy = "check shapes, dtypes and the range of the targets"
        if isinstance(error, TypeError) and "positional argument" in str(error):
            remedy = "give a network of several inputs a dict of them by name, ({'x1': a, 'x2': b}, y)"
        raise ModelError(
            f"network or loss fail on {which} of {', '.join(given + expected)}: {type(error).__name__}: "
            f"{str(error).strip()}; {remedy}"
        ) from error


def explain_loss(loss: float, numbers: Index, data: CalibrationData) -> ModelError:
    """The error for a loss that is not finite, of some samples."""
    remedy = "look for NaN or infinite parameters, buffers or targets out of range"
    _, targets = data.batch(numbers.reshape(-1), "cpu")
    whole = [t.reshape(len(t), -1) for _, t in leaves(targets) if not t.is_floating_point()]
    if any(bool((t < 0).all(1).any()) for t in whole):
        remedy = (
            "all its targets are negative, which losses ignore (ignore_index): a mean over none is nan; leave it out"
        )
    return ModelError(f"the loss of {_named(numbers)} is {loss}; {remedy}")


@dataclass(frozen=True, eq=False)
class _Taken:
    """Loss, its gradient with respect to the weights, and the output, of some samples together."""

    loss: float
    gradient: list[Tensor]
    output: Any

    @property
    def norm(self) -> float:
        """Of the gradient."""
        return _norm(self.gradient)


def check_loss(
    model: nn.Module,
    weights: Sequence[Tensor],
    data: CalibrationData,
    forward: Forward,
    index: Index,
    device: torch.device,
) -> tuple[str, ...]:
    """The loss is a finite scalar, the same when taken twice, and a mean over the batch.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    weights : sequence of tensors
        What gradients are compared with respect to.
    data, forward
    index : int64 (r, b)
        Sample numbers of the rows to come.
    device : torch.device

    Returns
    -------
    tuple of str
        What has to be said of rows of several samples whose loss is no mean.

    Raises
    ------
    ModelError
        With the remedy.
    """

    def take(numbers: Index, differentiate: bool = True) -> _Taken:
        return _take(model, weights if differentiate else (), data, forward, numbers, device)

    first, second = (take(index[0], differentiate=False).loss for _ in range(2))
    if first != second:
        raise ModelError(
            f"the network is random in eval mode: the loss of one sample is {first!r} and then {second!r}; "
            "switch off functional dropout and other noise"
        )
    size, count = index.shape[1], _SAMPLES
    while True:
        pieces = _pieces(data, index, count)
        parts = [take(numbers) for numbers in pieces]
        if size > 1 or count >= _MOST_SAMPLES or any(part.loss != 0.0 or part.norm > 0.0 for part in parts):
            break
        count = _MOST_SAMPLES
    whole = take(np.concatenate(pieces))
    return _compare(parts, whole, *data.batch(np.concatenate(pieces), device), forward, size, weights[0].dtype)


def _compare(
    parts: list[_Taken],
    whole: _Taken,
    inputs: Tree,
    targets: Tree | None,
    forward: Forward,
    size: int,
    dtype: torch.dtype,
) -> tuple[str, ...]:
    """Refuse a loss of a batch that is not the mean of its parts', or say so."""
    count = len(parts)
    relative, steep, absolute = _ROUNDING.get(dtype, _ROUGH)
    losses = np.array([part.loss for part in parts])
    level, slope = float(np.abs(losses).mean()), float(np.mean([part.norm for part in parts]))
    if not np.isfinite(slope):
        # Refused with its row and layer where rows are taken.
        return ()
    mean = [sum(gradients) / count for gradients in zip(*(part.gradient for part in parts), strict=True)]

    def is_whole(times: float) -> bool:
        """Whether the batch gives `times` the mean, in value and gradient."""
        allowed = relative * max(times * level, abs(whole.loss)) + times * absolute
        apart = _norm([w - times * m for w, m in zip(whole.gradient, mean, strict=True)])
        return abs(whole.loss - times * losses.mean()) <= allowed and apart <= steep * max(times * slope, whole.norm)

    if is_whole(1.0):
        if count > 2 and slope > 0.0 and np.ptp(losses) == 0.0 and whole.loss == losses[0]:
            raise ModelError(
                f"the loss is {whole.loss} whatever the sample, while its gradient is not zero: it does not say how "
                "good the network is; leave out what cancels it (such as minus its own value)"
            )
        return ()
    what = f"{count} samples" if size == 1 else f"{count} rows of {size} samples"
    found = f"the loss of {what} together is {whole.loss:.6g}, the mean of their losses {losses.mean():.6g}"
    shapes = [tuple(t.shape) for t in (whole.output, targets) if isinstance(t, Tensor) and t.is_floating_point()]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise ModelError(
            f"{found}: outputs of shape {shapes[0]} and targets of shape {shapes[1]} are broadcast against one "
            "another; give both the same shape, e.g. targets.unsqueeze(1)"
        )
    if is_whole(float(count)):
        raise ModelError(f"{found}: loss_fn sums over the batch; it must return the mean (reduction='mean')")
    if size > 1:
        return (
            f"{found}: the loss is no mean over samples, and rows of {size} stand for its value on batches of {size}",
        )
    if slope > 0.0 and all(part.norm > 0.0 for part in parts) and _mixes(parts, whole, relative):
        joined = torch.cat([part.output for part in parts]).detach()
        alone = float(forward.loss(joined, inputs, targets).detach())
        if abs(alone - losses.mean()) <= relative * max(level, abs(alone)) + absolute:
            return (
                f"{found}: what the network does with a sample depends on those beside it; rows are of samples alone",
            )
    raise ModelError(
        f"{found} (their gradients likewise differ): the loss of a batch is not the mean of those of its samples, so "
        "rows of one sample do not stand for it. Make loss_fn the mean over samples of what each alone gives (a class "
        "weight: (weight[y] * losses).mean(); a root: without it), or, where it needs a batch (contrastive terms, "
        "statistics or sorting within the batch), take rows of as many samples as it is trained with: "
        "FisherOptions(batch_size=b)"
    )


def _mixes(parts: list[_Taken], whole: _Taken, relative: float) -> bool:
    """Whether the network gives samples other outputs together than alone."""
    outputs = [whole.output, *(part.output for part in parts)]
    if not all(isinstance(output, Tensor) and output.ndim for output in outputs):
        return False
    joined = torch.cat(outputs[1:])
    if joined.shape != whole.output.shape:
        return False
    return bool((joined - whole.output).abs().max() > relative * whole.output.abs().max())


def _take(
    model: nn.Module,
    weights: Sequence[Tensor],
    data: CalibrationData,
    forward: Forward,
    numbers: Index,
    device: torch.device,
) -> _Taken:
    inputs, targets = data.batch(numbers, device)
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.set_grad_enabled(len(weights) > 0), typed_failures(inputs, targets, numbers):
            output = forward.output(model, inputs, targets)
            loss = forward.loss(output, inputs, targets)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ModelError(
                    f"loss_fn must return a scalar tensor, the mean over the batch, not {found}; "
                    "use reduction='mean' or .mean()"
                )
            if not bool(torch.isfinite(loss)):
                raise explain_loss(float(loss.detach()), numbers, data)
            gradient: Sequence[Tensor | None] = [None] * len(weights)
            if loss.requires_grad:
                gradient = torch.autograd.grad(loss, list(weights), allow_unused=True)
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    zeros = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradient, strict=True)]
    return _Taken(float(loss.detach()), zeros, output)


def _pieces(data: CalibrationData, index: Index, count: int) -> list[Index]:
    """Sample numbers to be taken alone and together: `count` single samples, or two rows."""
    if index.shape[1] > 1:
        return [index[0], index[1 % len(index)]]
    chosen = list(dict.fromkeys([*_of_rare_classes(data, count // 2), *index.reshape(-1).tolist()]))[:count]
    if len(chosen) == 1:
        chosen *= 2
    return [np.array([number], dtype=np.int64) for number in chosen]


def _of_rare_classes(data: CalibrationData, count: int) -> list[int]:
    """The first sample of each of the rarest classes, where some tensor has a whole number for every sample."""
    trees = (data.inputs,) if data.targets is None else (data.targets,)
    for _, tensor in leaves(trees):
        if tensor.ndim == 1 and not tensor.is_floating_point():
            _, first, often = np.unique(tensor.numpy(), return_index=True, return_counts=True)
            return [int(i) for i in first[np.argsort(often, kind="stable")][:count]]
    return []


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([t.double().norm() for t in tensors]).norm())


def _named(numbers: Index) -> str:
    """Samples by number, the first few of many."""
    flat = numbers.reshape(-1).tolist()
    shown = ", ".join(map(str, flat[:5])) + (", …" if len(flat) > 5 else "")
    return f"sample {shown}" if len(flat) == 1 else f"samples {shown}"
