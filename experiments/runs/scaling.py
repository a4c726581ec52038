"""Seconds of layer-wise pruning of networks of one shape, one size varied at a time.

The network is a chain of residual blocks x + W₂ relu(W₁ x) with 2d hidden units, on random inputs that are correlated
as activations are: what it computes does not matter to how long it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cbs_opt


@dataclass(frozen=True)
class Size:
    """Of a network and its calibration data.

    Attributes
    ----------
    tokens
        Positions that every layer sees, 256 a batch.
    width
        d.
    layers
        Blocks, of two prunable matrices each.
    """

    tokens: int = 2_048
    width: int = 192
    layers: int = 4


#: The size around which others are.
MIDDLE = Size()
#: What is varied.
VARIED = {"tokens": (512, 1_024, 2_048, 4_096, 8_192), "width": (48, 96, 192, 384), "layers": (1, 2, 4, 8)}
_BATCH = 256


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) → (N, d)."""
        found: Tensor = x + self.down(torch.relu(self.up(x)))
        return found


def scaling_rows(
    solvers: dict[str, str], sparsity: float, repeats: int, told: Callable[[dict[str, Any]], None]
) -> Iterator[dict[str, Any]]:
    """A row for every size and solver (with its update): least seconds of several runs, in parts."""
    sizes = dict.fromkeys(replace(MIDDLE, **{name: value}) for name, values in VARIED.items() for value in values)
    for solver in solvers:
        # What is compiled and loaded at the first call is none of it.
        _seconds(Size(_BATCH, 16, 1), solver, solvers[solver], sparsity)
    for size in sizes:
        for solver, update in solvers.items():
            runs = [_seconds(size, solver, update, sparsity) for _ in range(repeats)]
            best = min(runs, key=lambda parts: sum(parts.values()))
            row = {**asdict(size), "solver": solver, **best, "seconds": sum(best.values())}
            told(row)
            yield row


def _seconds(size: Size, solver: str, update: str, sparsity: float) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(size.width) for _ in range(size.layers))).eval()
    mixing = torch.randn(size.width, size.width, generator=draw)
    x = torch.randn(size.tokens, size.width, generator=draw) @ mixing / size.width**0.5
    started = time.perf_counter()
    report = cbs_opt.prune(
        model,
        list(x.split(_BATCH)),
        sparsity=sparsity,
        curvature="layer_inputs",
        solver=solver,
        update=update,
        device="cpu",
    ).report
    whole = time.perf_counter() - started
    chosen = report.seconds_solve + report.seconds_update
    return {"seconds_measure": max(whole - chosen, 0.0), "seconds_choose": chosen}


def line_of(rows: list[dict[str, Any]], solver: str, name: str) -> list[dict[str, Any]]:
    """The rows of a solver in which only one size is not the middle one, by that size."""
    others = {other: value for other, value in asdict(MIDDLE).items() if other != name}
    line = [row for row in rows if row["solver"] == solver and all(row[o] == v for o, v in others.items())]
    return sorted(line, key=lambda row: int(row[name]))


def exponents(rows: list[dict[str, Any]], solver: str) -> dict[str, float]:
    """Slopes of seconds in double logarithms over the upper half of each size, by least squares."""
    found = {}
    for name in VARIED:
        line = line_of(rows, solver, name)[-3:]
        x, y = (np.log([row[key] for row in line]) for key in (name, "seconds"))
        found[name] = float(np.polyfit(x, y, 1)[0])
    return found
