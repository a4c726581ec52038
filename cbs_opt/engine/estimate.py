"""What a plan takes: memory, known before any data are read, and time, from gradients of a few rows.

Only what is certain to be held at once is counted: the network's copies, the factor A (r × n), some vectors of n
float64 values, and for CBS-U the kept columns of A. Solvers may take more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cbs_opt.engine.choice import Extent
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.fisher import DEFAULT_ROWS
from cbs_opt.network.layers import Layer, PrunableLayers
from solvers.errors import OptionError

#: Vectors of n float64 values that choosing and updating hold at once.
_VECTORS = 6
#: Rows whose gradients are timed.
_PROBE = 2
#: Entries of a factor from which on a few rows are timed first, and seconds from which on the time is a warning.
_LARGE, _LONG = 1e9, 60.0
_LOG = logging.getLogger("cbs_opt")


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds that a plan takes.

    Attributes
    ----------
    memory : dict of str to int
        Bytes by what they hold, on the device.
    available : int
        Bytes there are.
    seconds : float
        Of all gradients, the longest part of most plans; 0 where none are taken.
    """

    memory: dict[str, int]
    available: int
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.memory.values())


def estimate_memory(
    model: nn.Module,
    layers: PrunableLayers,
    setup: Setup,
    need: Extent,
    *,
    n_columns: int = 0,
    n_samples: int | None = None,
) -> Estimate:
    """Bytes that pruning a network takes; raises OptionError if there are not as many.

    Parameters
    ----------
    model, layers
        The network, of which only shapes are looked at.
    setup : Setup
    need : Extent
        What is measured.
    n_columns : int
        Kept weights of a combinatorial update.
    n_samples : int, optional
        Calibration samples, where that is known.
    """
    n, fisher = layers.n, setup.options
    network = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    memory = {"the pruned network and its masks": network + 3 * n}
    if need is Extent.CURVATURE:
        rows = fisher.n_rows
        if rows is None:
            rows = DEFAULT_ROWS if n_samples is None else min(DEFAULT_ROWS, n_samples // fisher.batch_size)
        width = fisher.torch_dtype.itemsize
        memory[f"the gradients of {rows:,} rows for {n:,} weights"] = rows * n * width
        memory["vectors"] = _VECTORS * n * 8
        # Above three quarters of all columns, products go through the whole factor.
        memory["the kept columns"] = rows * n_columns * width if 4 * n_columns <= 3 * n else 0
    remedy = (
        "use fewer rows (FisherOptions(n_rows=...)), fewer layers (include, exclude), float32, or a solver and update "
        "that need no curvature (magnitude and none)"
    )
    return _enough(memory, setup.place, remedy)


def estimate_layerwise(model: nn.Module, segments: Iterable[Sequence[Layer]], setup: Setup) -> Estimate:
    """Bytes that pruning a network layer by layer takes; raises OptionError if there are not as many.

    Beside the network there are the input moments of one segment, summed up and once as means, in float64; with
    ``towards_dense`` those with the dense network too. Kept outputs and activations come on top.
    """
    options = setup.layer_inputs
    copies = 3 if options is not None and options.towards_dense else 2

    def moments(segment: Sequence[Layer]) -> int:
        sums = [layer.view.groups * layer.view.inputs**2 for layer in segment]
        # Means are made of one layer after the other.
        return 8 * ((copies - 1) * sum(sums) + max(sums, default=0))

    largest = max(segments, key=moments)
    widest = max(largest, key=lambda layer: layer.view.groups * layer.view.inputs**2)
    memory = {f"the input moments of the {len(largest)} layers of a segment": moments(largest)}
    if setup.place.type == "cpu":
        # On another device there is only what runs.
        network = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        memory["the pruned network"] = network
    remedy = f"exclude the widest layers ({widest.name!r} has {widest.view.inputs:,} inputs)"
    if options is not None and not options.segments:
        remedy += ", or measure segment by segment (LayerInputOptions(segments=True))"
    return _enough(memory, setup.place, remedy)


def _enough(memory: dict[str, int], place: torch.device, remedy: str) -> Estimate:
    found = Estimate(memory, available_memory(place))
    if found.total > found.available:
        parts = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in memory.items())
        raise OptionError(
            f"this takes at least {found.total / 1e9:.2f} GB of memory on {place}, and there are "
            f"{found.available / 1e9:.2f} GB: {parts}; {remedy}"
        )
    return found


def probe_seconds(workspace: Workspace, n_steps: int = 1) -> float:
    """Seconds that the gradients of some steps take, at most about, from those of a few rows."""
    fisher = workspace.setup.options
    rows = fisher.rows_for(workspace.data)
    sample = workspace.gradients(workspace.weights, replace(fisher, n_rows=min(_PROBE, rows)), keep_rows=False)
    return sample.seconds_per_row * rows * n_steps


def announce(workspace: Workspace, n_steps: int = 1) -> None:
    """Say how long the gradients will take where that may be long."""
    if workspace.setup.options.rows_for(workspace.data) * workspace.layers.n * n_steps >= _LARGE:
        seconds = probe_seconds(workspace, n_steps)
        level = logging.WARNING if seconds > _LONG else logging.INFO
        _LOG.log(level, "gradients of %s weights will take about %.0f s", f"{workspace.layers.n:,}", seconds)


def available_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        sizes += [int(limit)] if limit.isdigit() else []
    except (OSError, ValueError):
        # Elsewhere than on Linux, or without control groups: what the machine has.
        pass
    return min(sizes)
