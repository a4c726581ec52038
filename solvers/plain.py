"""The process-wide settings of torch and numpy as a new process has them, while our own code and a network run.

Inside ``torch.autocast`` products lose most of their digits, inside ``inference_mode`` nothing can be differentiated,
and under another default dtype, device or precision of matrix products the same call means another computation. None
of it is part of what a caller asks for here, so entry points put it aside for as long as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def plain_state(dtype: torch.dtype | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Settings as in a new process.

    Parameters
    ----------
    dtype, device : optional
        Of a network: a default that agrees with it stays, since its code may count on it.
    """
    before, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    place = torch.get_default_device()
    with ExitStack() as stack:
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if before not in (torch.float32, dtype):
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if place.type != "cpu" and (device is None or place.type != device.type):
            stack.enter_context(torch.device("cpu"))
        yield


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function under `plain_state`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with plain_state():
            return function(*args, **kwargs)

    return run
