"""Accuracy, or what else a network is judged by, against sparsity as a PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbs_opt import Sensitivity
from experiments.networks.criterion import METRICS, Metric
from solvers.errors import OutputError

#: Colour-blind safe (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
#: Layers that are named in a plot.
MOST_NAMES = 12


@dataclass(frozen=True)
class Series:
    """A line of a plot: a label and, by sparsity, the values of the metric measured there, one per seed."""

    label: str
    points: Mapping[float, Sequence[float]]
    quoted: bool = False


def series_of(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Rows of one experiment grouped by solver and update, in order of appearance."""
    groups: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        value = row[metric_of(row).name]
        values = groups.setdefault(row_label(row), {}).setdefault(float(row["sparsity"]), [])
        values.append(float("nan") if value is None else float(value))
    return [Series(label, dict(sorted(points.items()))) for label, points in groups.items()]


def metric_of(row: Mapping[str, Any]) -> Metric:
    """What a row is judged by."""
    return METRICS[row.get("metric", "accuracy")]


def row_label(row: Mapping[str, Any]) -> str:
    """Solver, update and stages of a row in words."""
    label = str(row["solver"])
    if row.get("update", "none") != "none":
        label += f" + {row['update']}"
    if row.get("update_scale", 1.0) != 1.0:
        label += f" × {row['update_scale']:g}"
    if int(row.get("stages") or 1) > 1:
        label += f", {row['stages']} stages"
    if budget := (row.get("extra") or {}).get("budget"):
        label += f", {budget}"
    if "shares" in row:
        label += f", shares {row['allocation']}"
    if distill := (row.get("extra") or {}).get("distill"):
        label += f", {distill['steps']} steps of distillation"
    if tuned := (row.get("extra") or {}).get("finetune"):
        label += f", {tuned['epochs']:g} epochs"
    return label


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return float(np.mean(values)), error


@contextmanager
def drawn(path: Path, title: str) -> Iterator[Any]:
    """Axes of a plot that is written as PNG at the end; raises OutputError."""
    # The object interface needs no display and leaves the caller's pyplot state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write the plot {path} ({error.strerror or error})") from error


def plot_metric(
    path: Path,
    title: str,
    series: Sequence[Series],
    dense: float | None = None,
    metric: Metric = METRICS["accuracy"],
) -> None:
    """Draw the mean over seeds, with standard errors, against the sparsity.

    Parameters
    ----------
    series
        Measured lines are solid; quoted ones are dotted, without markers.
    dense
        The dense network's, a thin horizontal line.
    metric
        Where less is better the axis is logarithmic: a network that is broken has a perplexity of thousands.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    with drawn(path, title) as axes:
        if dense is not None:
            axes.axhline(dense, color="0.6", linewidth=0.8)
            axes.annotate(
                f"dense {dense:.2f}",
                (0.99, dense),
                xycoords=("axes fraction", "data"),
                color="0.4",
                fontsize=8,
                ha="right",
                va="bottom",
            )
        measured = [s for s in series if not s.quoted]
        for i, line in enumerate(measured):
            means, errors = zip(*(mean_and_error(v) for v in line.points.values()), strict=True)
            axes.errorbar(
                _steps(line.points),
                means,
                yerr=errors if any(errors) else None,
                label=line.label,
                capsize=2,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.4,
            )
        for i, line in enumerate(s for s in series if s.quoted):
            quoted = [mean_and_error(v)[0] for v in line.points.values()]
            colour = COLOURS[-1 - i % len(COLOURS)]
            axes.plot(_steps(line.points), quoted, ":", color=colour, linewidth=1.1, label=line.label)
        everything = sorted({s for line in series for s in line.points})
        axes.set_xticks(_steps(everything), [f"{100 * s:g}" for s in everything])
        axes.set_xlabel("sparsity (%), scaled by the logarithm of the weights kept")
        axes.set_ylabel(f"test {metric.name}" + (f" ({metric.unit.strip()})" if metric.unit else ""))
        if metric.lower_is_better:
            axes.set_yscale("log")


def plot_sensitivity(path: Path, title: str, found: Sensitivity) -> None:
    """Draw what pruning each layer alone does, a line a layer from the first (dark) to the last (light).

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    from matplotlib import colormaps

    with drawn(path, title) as axes:
        colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(found.layers)))
        last = len(found.layers) - 1
        for i, (row, colour) in enumerate(zip(found.layers, colours, strict=True)):
            excess = np.array(row.values) - found.dense
            # A legend of dozens of layers would hide them.
            label = row.name if last < MOST_NAMES or i in (0, last) else None
            axes.plot(
                found.levels,
                np.where(excess > 0.0, excess, np.nan),
                label=label,
                color=colour,
                linestyle="-" if row.measured else ":",
                marker="." if row.measured else "",
                linewidth=1.1,
            )
        axes.set_yscale("log")
        axes.set_xlabel("share of the layer's weights removed")
        axes.set_ylabel(f"{found.measure}, above the dense network's")


def _steps(sparsities: Any) -> list[float]:
    """Abscissae: -log of the share kept, so that 90, 95 and 98 % do not crowd together."""
    return [-float(np.log(1.0 - s)) for s in sparsities]
