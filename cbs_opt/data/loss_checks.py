"""What a loss must be like for gradients per sample to exist; refused before work starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData, Index
from cbs_opt.data.forward import Forward
from cbs_opt.data.trees import Tree, leaves
from solvers.errors import CBSError, ModelError


@contextmanager
def typed_failures(inputs: Tree, targets: Tree | None) -> Iterator[None]:
    """Turn whatever network or loss throw at calibration samples into a ModelError that shows what they were given."""
    try:
        yield
    except CBSError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        given = [f"{path or 'x'} {tuple(t.shape)} {t.dtype}" for path, t in leaves(inputs)]
        expected = [f"{path or 'y'} {tuple(t.shape)} {t.dtype}" for path, t in leaves(targets)]
        raise ModelError(
            f"network or loss fail on calibration samples of {', '.join(given + expected)}: {type(error).__name__}: "
            f"{str(error).strip()}; check shapes, dtypes and the range of the targets"
        ) from error


def check_loss(model: nn.Module, data: CalibrationData, forward: Forward, row: Index, device: torch.device) -> None:
    """The loss is a finite scalar, a mean, and the same when taken twice."""
    single = np.array([int(row[0])])

    def loss_of(numbers: Index) -> Tensor:
        inputs, targets = data.batch(numbers, device)
        with torch.no_grad(), typed_failures(inputs, targets):
            loss = forward.loss(forward.output(model, inputs, targets), inputs, targets)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ModelError(
                f"loss_fn must return a scalar tensor, the mean over the batch, not {found}; "
                "use reduction='mean' or .mean()"
            )
        if not bool(torch.isfinite(loss)):
            raise ModelError(
                f"the loss of sample {int(numbers[0])} is {float(loss)}; look for NaN or infinite parameters, buffers "
                "or targets out of range"
            )
        return loss

    first, second = loss_of(single), loss_of(single)
    if not torch.equal(first, second):
        raise ModelError(
            f"the network is random in eval mode: the loss of one sample is {float(first)!r} and then "
            f"{float(second)!r}; switch off functional dropout and other noise"
        )
    double = loss_of(np.repeat(single, 2))
    size = abs(float(first))
    if size > 0 and abs(float(double) - 2 * float(first)) < 1e-3 * size:
        raise ModelError(
            f"loss_fn sums over the batch: one sample gives {float(first):.6g}, the same one twice "
            f"{float(double):.6g}; it must return the mean (reduction='mean')"
        )
