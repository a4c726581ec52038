"""Milliseconds of layers, measured on this machine with fewer of their rows, and a budget of them: `Latency`.

Zeros inside a dense matrix save no time, so what can be bought is whole rows (neurons, filters). Each layer is run
alone on the inputs that it gets for a few samples, with some shares of its rows, in turns, so that a busy machine
disturbs them alike; the median of the repetitions counts, and half the distance between the quartiles is the error. A
line a + b · rows through the medians makes b what a row costs and a what stays whatever is removed. That later layers
then get fewer inputs is not counted: what is predicted is an upper bound on what the layers take.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData, CalibrationOptions
from cbs_opt.data.forward import Forward
from cbs_opt.data.stream import BatchStream
from cbs_opt.measure.costs import SAMPLES, CostBudget
from cbs_opt.measure.layer_inputs import Streamed, quiet, watched
from cbs_opt.network.finding import find_layers
from cbs_opt.network.layers import Layer, PrunableLayers
from solvers.arguments import instance, integer, number
from solvers.arrays import Array
from solvers.errors import DataError, ModelError, OptionError, OutputError
from solvers.files import write_atomically

#: Kinds of layers that are smaller with fewer rows.
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of a call of a layer with some numbers of rows, rising, and how far these are uncertain."""

    name: str
    rows: tuple[int, ...]
    milliseconds: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def line(self) -> tuple[float, float]:
        """(a, b) of a + b · rows, neither below zero."""
        x, y = np.array(self.rows, dtype=np.float64), np.array(self.milliseconds)
        spread = x - x.mean()
        slope = max(float(spread @ y / (spread @ spread)), 0.0)
        return max(float(y.mean() - slope * x.mean()), 0.0), slope


@dataclass(frozen=True)
class LatencyTable:
    """Times of all prunable layers of a network on one machine.

    Attributes
    ----------
    machine : str
    samples : int
        In each call.
    layers : tuple of LayerTimes
    """

    machine: str
    samples: int
    layers: tuple[LayerTimes, ...]

    @property
    def error(self) -> float:
        """Of the times of whole layers together, as a share of them."""
        return sum(layer.errors[-1] for layer in self.layers) / sum(layer.milliseconds[-1] for layer in self.layers)

    def save(self, path: str | Path) -> None:
        """Write it as JSON; raises OutputError."""
        try:
            write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote; raises DataError, also for a table of another machine."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = [
                LayerTimes(row["name"], *(tuple(row[part]) for part in ("rows", "milliseconds", "errors")))
                for row in values["layers"]
            ]
            found = cls(str(values["machine"]), int(values["samples"]), tuple(layers))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is no latency table ({error}); measure one with cbs_opt.latency_table") from error
        return found.checked()

    def checked(self) -> LatencyTable:
        """Itself; raises DataError if it is of another machine."""
        here = machine_name()
        if self.machine != here:
            raise DataError(
                f"the latency table is of another machine ({self.machine}) than this one ({here}); measure one here"
            )
        return self


def machine_name() -> str:
    """What times depend on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def latency_table(
    model: nn.Module,
    data: object,
    *,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    repeats: int = 15,
    path: str | Path | None = None,
) -> LatencyTable:
    """Measure the layers of a network on the CPU of this machine.

    Parameters
    ----------
    model, data, include, exclude
        As for `cbs_opt.prune`; the first samples are run.
    shares : sequence of float in (0, 1]
        Of the rows that stay; 1 is added.
    repeats : int
    path : optional
        A table that is there is read, and nothing is measured; else it is written.

    Raises
    ------
    ModelError
        For layers whose rows cannot be left out.
    DataError
        For a table that is there and of another machine, or of other layers.
    """
    integer("repeats", repeats, 1)
    wanted = sorted({1.0, *(number("a share", share, positive=True, most=1.0) for share in shares)})
    layers = find_layers(model, include=include, exclude=exclude)
    if path is not None and Path(path).exists():
        found = LatencyTable.load(path)
        _ = _lines(found, layers)
        return found
    own = copy.deepcopy(model).cpu().eval()
    for layer in layers:
        module = own.get_submodule(layer.uses[0][0])
        if not isinstance(module, _KINDS) or layer.view.groups > 1 or len(layer.uses) > 1:
            raise ModelError(
                f"layer {layer.name!r} ({layer.kind}, {layer.view.groups} groups, used {len(layer.uses)} times) cannot "
                "be timed with fewer rows; exclude it"
            )
    calls = _calls(own, layers, data)
    times = tuple(_times(own, layer, calls[layer.name], wanted, repeats) for layer in layers)
    table = LatencyTable(machine_name(), calls.pop(""), times)
    if path is not None:
        table.save(path)
    return table


def _calls(model: nn.Module, layers: PrunableLayers, data: object) -> dict[str, Any]:
    """What each layer is called with, in the order of calls; under "" how many samples there are."""
    read = CalibrationData.read(data, CalibrationOptions(order="first"))
    size = min(SAMPLES, read.n)
    streamed = Streamed(
        model, layers, BatchStream(read), Forward(model, lambda *_: torch.zeros(())), torch.device("cpu")
    )
    found: dict[str, Any] = {layer.name: [] for layer in layers}

    def see(module: nn.Module, uses: list[tuple[Layer, str]], args: Any, kwargs: Any, _: Any) -> None:
        for layer, _attribute in uses:
            found[layer.name].append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

    with torch.no_grad(), quiet(model), watched(streamed, layers, see):
        streamed.call((*read.batch(slice(0, size), "cpu"), size))
    missing = [name for name, inputs in found.items() if not inputs]
    if missing:
        raise ModelError(f"the network does not call layer {missing[0]!r}, so it has no time; exclude it")
    return {**found, "": size}


@torch.no_grad()
def _times(model: nn.Module, layer: Layer, inputs: list[Tensor], shares: list[float], repeats: int) -> LayerTimes:
    whole = model.get_submodule(layer.uses[0][0])
    rows = sorted({max(round(share * layer.n_rows), 1) for share in shares})
    smaller = [_with_rows(whole, count) for count in rows]
    seconds: list[list[float]] = [[] for _ in rows]
    for repeat in range(repeats + 2):
        for at, module in enumerate(smaller):
            started = time.perf_counter()
            for x in inputs:
                module(x)
            # The first ones warm up.
            if repeat >= 2:
                seconds[at].append(1e3 * (time.perf_counter() - started))
    medians = tuple(statistics.median(values) for values in seconds)
    errors = tuple(float(np.subtract(*np.percentile(values, (75, 25)))) / 2.0 for values in seconds)
    return LayerTimes(layer.name, tuple(rows), medians, errors)


def _with_rows(module: nn.Module, rows: int) -> nn.Module:
    """The module with its first rows only."""
    found = copy.deepcopy(module)
    for name, value in (("weight", module.weight), ("bias", module.bias)):
        if isinstance(value, Tensor):
            setattr(found, name, nn.Parameter(value.detach()[:rows].clone(), requires_grad=False))
    setattr(found, "out_features" if isinstance(module, nn.Linear) else "out_channels", rows)
    return found


def _lines(table: LatencyTable, layers: PrunableLayers) -> dict[str, tuple[float, float]]:
    """(a, b) by layer; raises DataError where a layer has no times, or those of another."""
    times = {layer.name: layer for layer in table.layers}
    for layer in layers:
        if layer.name not in times or times[layer.name].rows[-1] != layer.n_rows:
            raise DataError(
                f"the latency table has no times of layer {layer.name!r} with {layer.n_rows} rows; measure it, "
                "or exclude the layer"
            )
    return {layer.name: times[layer.name].line for layer in layers}


@dataclass(frozen=True)
class Latency(CostBudget):
    """Milliseconds of the prunable layers one after the other, by a table; channels go, since zeros save no time.

    Attributes
    ----------
    table : LatencyTable
        Of this machine.
    """

    groups: str | None = "channels"
    table: LatencyTable | None = None
    name = "milliseconds"
    counts = False
    kinds = ("channels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups is None:
            raise OptionError("zeros make nothing faster: a budget of milliseconds is of groups='channels'")
        instance("table", self.table, LatencyTable).checked()

    def per_weight(self, layers: PrunableLayers, model: nn.Module, uses: Mapping[str, Array]) -> Array:
        """b of the weight's row, shared among its weights."""
        assert self.table is not None
        lines = _lines(self.table, layers)
        return np.concatenate([np.full(layer.n, lines[layer.name][1] / layer.view.inputs) for layer in layers])

    def fixed(self, layers: PrunableLayers) -> float:
        """The sum of a."""
        assert self.table is not None
        lines = _lines(self.table, layers)
        return sum(lines[layer.name][0] for layer in layers)
