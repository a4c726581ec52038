"""Where to compute."""

from __future__ import annotations

import torch

from solvers.errors import OptionError


def resolve_device(device: torch.device | str = "auto") -> torch.device:
    """``"auto"`` is the CUDA device where there is one, else the CPU.

    Raises
    ------
    OptionError
        For a device that does not exist.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', not {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', not {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {device!r} is asked for, but no CUDA device is available; use 'auto' or 'cpu'")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise OptionError(f"there is no CUDA device {chosen.index}; there are {torch.cuda.device_count()}")
    return chosen
