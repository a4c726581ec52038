"""Numbers as options hold them."""

from __future__ import annotations

from typing import Any

import numpy as np

from solvers.errors import OptionError


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as an integer of at least `least`; raises OptionError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise OptionError(f"{name} must be an integer of at least {least}, not {value!r}")
    return int(value)


def check_sparsity(sparsity: float) -> float:
    """`sparsity` as a float in [0, 1); raises OptionError."""
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        raise OptionError(f"sparsity must be a number in [0, 1), not {sparsity!r}") from None
    if not 0.0 <= value < 1.0:
        raise OptionError(
            f"sparsity must lie in [0, 1), the fraction of weights removed, not {value!r}"
            + ("; write 0.9 for 90 %" if 1.0 < value <= 100.0 else "")
        )
    return value
