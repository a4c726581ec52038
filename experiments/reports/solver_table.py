"""The table of a network that is pruned at one go: a line per method, a column per sparsity, as markdown and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.networks.experiment import Experiment, Method
from experiments.reports.plots import Series, plot_metric, series_of
from experiments.reports.staged_table import command, write_text
from experiments.reports.tables import mean_cell

_PARTS = ("gradients", "solve", "update")


def write_solver_table(
    folder: Path,
    experiment: Experiment,
    rows: Sequence[tuple[Method, Mapping[str, Any]]],
    others: Sequence[Mapping[str, Any]],
    dense: float,
) -> None:
    """``table.md`` and ``table.png`` from rows, which may be a part of those asked for; raises OutputError."""
    metric = experiment.criterion.metric
    good = [(method, row) for method, row in rows if row.get("error") is None]
    sparsities = sorted({row["sparsity"] for _, row in good})
    seconds = {
        method.label: np.mean([[row[f"seconds_{part}"] for part in _PARTS] for m, row in good if m == method], axis=0)
        for method, _ in good
    }
    measured = [
        Series(label, series_of([{**row, "update": "none"} for method, row in good if method.label == label])[0].points)
        for label in seconds
    ]
    heads = ["method", *(f"{s:g}" for s in sparsities), "measure + solve + update (s)"]
    text = [f"# {experiment.name}: test {metric.name}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in (*measured, *series_of(others)):
        times = " + ".join(f"{value:.0f}" for value in seconds[line.label]) if line.label in seconds else ""
        cells = [line.label, *(mean_cell(line.points.get(s, ())) for s in sparsities), times]
        text.append("| " + " | ".join(cells) + " |")
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for _, row in good}))
    better = "Lower is better. " if metric.lower_is_better else ""
    text += [
        "",
        f"{better}Dense: {dense:.2f}. Seeds {seeds}: mean ± standard error. {experiment.fisher.n_rows} calibration "
        "samples. Seconds are wall, of this machine as it was, and means over sparsities and seeds.",
        "",
        "```",
        command(),
        "```",
        "",
    ]
    write_text(folder / "table.md", "\n".join(text))
    plot_metric(folder / "table.png", experiment.name, [*measured, *series_of(others)], dense, metric)
