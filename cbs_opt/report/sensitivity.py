"""What pruning a layer does to the network, level by level, and which allocations were tried."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class LayerCurve:
    """One layer.

    Attributes
    ----------
    name : str
    n : int
        Its weights.
    values : tuple of float
        Loss or divergence of the network with only this layer pruned, by level.
    measured : bool
        False where it lies between those of its neighbours of the same kind, which were measured.
    """

    name: str
    n: int
    values: tuple[float, ...]
    measured: bool = True


@dataclass(frozen=True)
class Sensitivity:
    """Curves of all layers of a network.

    Attributes
    ----------
    measure : {"loss", "divergence"}
        What the values are: the calibration loss, or how far the outputs are from the dense network's; see
        `cbs_opt.data.divergence`.
    dense : float
        Of the dense network.
    levels : tuple of float
        Shares of the weights of a layer that are removed, rising to 1.
    layers : tuple of LayerCurve
    solver : str
        What chose and updated the weights, with the update.
    samples : int
        Held out of the data by which layers are pruned; values are means over them.
    seconds : float
        What it took.
    """

    measure: str
    dense: float
    levels: tuple[float, ...]
    layers: tuple[LayerCurve, ...]
    solver: str
    samples: int
    seconds: float

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.measure} with one layer pruned by {self.solver}, {self.samples} samples held out, dense "
            f"{self.dense:.4g}, {self.seconds:.1f} s"
        )
        table.add_column("layer")
        table.add_column("weights", justify="right")
        for level in self.levels:
            table.add_column(f"{level:.1%}", justify="right")
        for row in self.layers:
            name = row.name if row.measured else f"{row.name} (interpolated)"
            table.add_row(Text(name), f"{row.n:,}", *(f"{value:.4g}" for value in row.values))
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().rstrip()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `dataclasses.asdict`, through JSON too."""
        rows = tuple(LayerCurve(**{**row, "values": tuple(row["values"])}) for row in values["layers"])
        return cls(**{**values, "levels": tuple(values["levels"]), "layers": rows})


@dataclass(frozen=True)
class Candidate:
    """An allocation that was tried.

    Attributes
    ----------
    name : str
        A rule, or ``half a, half b`` for the middle between two.
    value : float
        Loss or divergence of the network pruned by it, on samples held out.
    seconds : float
    """

    name: str
    value: float
    seconds: float
