"""What an export is asked for, and what it says: what got smaller or faster, and what did not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.data.trees import leaves, map_tree
from cbs_opt.network.identity import copy_network
from cbs_opt.network.masks import remove_masks
from solvers.errors import BackendError, DataError

#: Calls that are timed, after a first one.
_CALLS = 9


@dataclass(frozen=True)
class ExportReport:
    """An exported network; ``print`` it.

    Attributes
    ----------
    format : str
    path : str
        Empty where the network stays in memory.
    bytes_plain : int
        Of the parameters and buffers of the plain network, zeros included.
    bytes_stored : int
        Of the file, or of what stays in memory.
    difference : float
        Largest, of any output from the masked network's, relative to the largest output; nan where none was computed.
    seconds_plain, seconds_exported : float
        A call on the example here: of the plain network in torch, and of what was exported; nan where none was timed.
    notes : tuple of str
        What was done to which layers, what was left out, and why; where a change of speed comes from.
    """

    format: str
    path: str
    bytes_plain: int
    bytes_stored: int
    difference: float
    seconds_plain: float
    seconds_exported: float
    notes: tuple[str, ...]

    @property
    def smaller(self) -> bool:
        """Whether less is stored than for the plain network."""
        return self.bytes_stored < 0.99 * self.bytes_plain

    def __str__(self) -> str:
        size = f"{self.bytes_stored:,} bytes, {self.bytes_stored / self.bytes_plain:.0%} of the plain network's"
        lines = [
            f"{self.format}{f' in {self.path}' if self.path else ''}: {size}"
            + (": smaller" if self.smaller else ": not smaller")
        ]
        if self.seconds_exported == self.seconds_exported:
            lines.append(
                f"a call takes {self.seconds_exported * 1e3:.3g} ms, the plain network in torch "
                f"{self.seconds_plain * 1e3:.3g} ms, on this machine"
            )
        if self.difference == self.difference:
            lines.append(f"outputs differ from the masked network's by {self.difference:.1e} at most")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, eq=False)
class Example:
    """What a network is called with: positional arguments, or keywords."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: object) -> Example:
        """From one tensor, a tuple of arguments, or a dict of keywords; raises DataError."""
        if isinstance(inputs, Tensor):
            return cls((inputs,), {})
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        if isinstance(inputs, Sequence) and not isinstance(inputs, str):
            return cls(tuple(inputs), {})
        raise DataError(
            "example must be a tensor, a tuple of arguments or a dict of keywords that the network is called with, "
            f"not {type(inputs).__name__}"
        )

    def first(self, n: int) -> Example:
        """The first samples of it."""
        cut: Callable[[Tensor], Tensor] = lambda t: t[:n]  # noqa: E731
        return Example(
            tuple(map_tree(cut, a) for a in self.args), {k: map_tree(cut, v) for k, v in self.kwargs.items()}
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        return [leaf for part in (*self.args, *self.kwargs.values()) for _, leaf in leaves(part)]


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without masks, in eval mode."""
    return remove_masks(copy_network(model)).eval()


def size_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers, masks left out, shared ones once."""
    seen = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.dtype != torch.bool}
    return sum(t.numel() * t.element_size() for t in seen.values())


def output_of(call: Callable[..., Any], example: Example) -> list[Tensor]:
    """The tensors of an output."""
    with torch.no_grad():
        found = call(*example.args, **example.kwargs)
    if hasattr(found, "to_tuple"):
        found = found.to_tuple()
    return [tensor.detach() for tensor in _tensors(found)]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for part in tree.values() for t in _tensors(part)]
    if isinstance(tree, (list, tuple)):
        return [t for part in tree for t in _tensors(part)]
    return []


def compared(what: str, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> float:
    """The largest difference between outputs, relative to the largest output.

    Raises
    ------
    BackendError
        If it is more than a tolerance, or outputs are missing.
    """
    if not expected or len(found) < len(expected):
        raise BackendError(f"{what} gives {len(found)} outputs, the network {len(expected)}")
    worst = 0.0
    for one, other in zip(expected, found, strict=False):
        if one.shape != other.shape:
            raise BackendError(f"{what} gives an output of shape {tuple(other.shape)}, the network {tuple(one.shape)}")
        gap = (one.double() - other.to(one.device).double()).abs().max() if one.numel() else torch.zeros(())
        scale = max(float(one.double().abs().max()) if one.numel() else 0.0, 1e-12)
        worst = max(worst, float(gap) / scale)
    if not worst <= tolerance:
        raise BackendError(f"{what} gives outputs that differ by {worst:.1e} from the network's; it is not to be used")
    return worst


def timed(*calls: Callable[[], Any]) -> tuple[float, ...]:
    """Seconds of each call: the median of several after a first one, in turns, which a busy machine slows alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(_CALLS + 1):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - started)
    return tuple(map(median, seconds))


def size_on_disk(path: Path) -> int:
    """Bytes of a file, with those beside it that hold its tensors."""
    return sum(part.stat().st_size for part in {path, *path.parent.glob(path.name + ".data")})
