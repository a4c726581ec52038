"""Arguments checked by type at the surface, each kind once: what passes has the type that is written down.

Python and numpy take True for 1, "60" is larger than no number at all, and a masked array hands out what it masks; none
of it is meant. Each function returns the value in the plain type and raises an error that names the argument.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch

from solvers.errors import CBSError, OptionError, ProblemError, UnknownNameError

T = TypeVar("T")
#: Seeds above do not fit into the generators of torch.
_LARGEST_SEED = (1 << 63) - 1


def integer(
    name: str, value: object, least: int = 1, most: int | None = None, *, error: type[CBSError] = OptionError
) -> int:
    """An integer in [least, most]."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
    if not whole or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        kinds = {0: "an integer, zero or more", 1: "a positive integer"}
        wanted = kinds.get(least, f"an integer of at least {least}")
        wanted = wanted if most is None else f"an integer in [{least}, {most}]"
        raise error(f"{name} must be {wanted}, not {_shown(value)}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    positive: bool = False,
    remedy: str = "",
    error: type[CBSError] = OptionError,
) -> float:
    """A finite real number in [least, most]; above zero where `positive`."""
    found = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
    if not math.isfinite(found) or not least <= found <= most or (positive and found <= 0.0):
        wanted = "a finite number"
        if positive:
            wanted = "positive and finite"
        elif math.isfinite(most):
            wanted += f" in [{least:g}, {most:g}]"
        elif math.isfinite(least):
            wanted += ", zero or more" if least == 0 else f" of at least {least:g}"
        raise error(f"{name} must be {wanted}, not {_shown(value)}{remedy and '; '}{remedy}")
    return found


def ridge_of(damping: object) -> float:
    """λ of a curvature."""
    return number("damping", damping, least=0, error=ProblemError)


def seconds(value: object) -> float | None:
    """A time limit; None is none."""
    return None if value is None else number("time_limit", value, positive=True, remedy="seconds; None means no limit")


def seed_of(value: object, name: str = "seed") -> int:
    """A seed of random numbers."""
    return integer(name, value, 0, _LARGEST_SEED)


def sparsity_of(value: object) -> float:
    """A fraction of weights to remove, in [0, 1)."""
    found = number("sparsity", value, remedy="the fraction of weights to remove, in [0, 1)")
    if not 0.0 <= found < 1.0:
        hint = "; write 0.9 for 90 %" if 1.0 < found <= 100.0 else ""
        raise OptionError(f"sparsity must lie in [0, 1), the fraction of weights removed, not {found!r}{hint}")
    return found


def one_of(kind: str, value: object, known: Iterable[str]) -> str:
    """One of some names; raises UnknownNameError."""
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise UnknownNameError.of(kind, value, names)
    return value


def flag(name: str, value: object, *, error: type[CBSError] = OptionError) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise error(f"{name} must be True or False, not {_shown(value)}")
    return bool(value)


def instance(name: str, value: object, kind: type[T], *, error: type[CBSError] = OptionError) -> T:
    """An object of a class."""
    if not isinstance(value, kind):
        raise error(f"{name} must be a {kind.__name__}, not {_shown(value)}")
    return value


def real_tensor(value: Any, what: str, *, error: type[CBSError] = ProblemError) -> torch.Tensor:
    """Real numbers as a dense tensor of float32 or float64, without a copy where that is possible.

    Whole numbers become float64; halves become float32.
    """
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
    else:
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise error(
                f"{what} is a masked array, whose mask would be ignored; fill it or leave the masked entries out"
            )
        try:
            array = np.asarray(value)
            if not array.flags.writeable or any(stride < 0 for stride in array.strides):
                array = array.copy()
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError, RuntimeError, OverflowError) as problem:
            raise error(
                f"{what} cannot be read as numbers ({problem}); pass a numpy array or a torch tensor"
            ) from problem
    kind = odd_kind(tensor)
    if kind or tensor.is_complex() or tensor.dtype is torch.bool:
        raise error(f"{what} is {kind or tensor.dtype}; pass real numbers in a dense tensor or array")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
    return tensor


def odd_kind(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being plain numbers in memory, in words; empty for a plain one."""
    if tensor.is_meta:
        return "a meta tensor, without values"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    return "" if tensor.layout is torch.strided else f"a sparse tensor ({tensor.layout})"


def _shown(value: object) -> str:
    """A value, short enough for a message."""
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) <= 60 else f"a {type(value).__name__}"
