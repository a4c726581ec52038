"""The tables of a network that is pruned at one go: a line a method, a column a sparsity, as markdown and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.networks.experiment import Comparison, Experiment, Method, SolverTable
from experiments.reports.plots import Series, mean_and_error, plot_metric, series_of
from experiments.reports.staged_table import command, write_text
from experiments.reports.tables import mean_cell

#: What a row has seconds of, and how that is called.
_PARTS = {
    "gradients": "measure",
    "solve": "solve",
    "update": "update",
    "shares": "find shares",
    "distill": "distil",
}


def write_solver_table(
    folder: Path,
    experiment: Experiment,
    table: SolverTable,
    rows: Sequence[tuple[Method, Mapping[str, Any]]],
    others: Sequence[Mapping[str, Any]],
    dense: float,
) -> None:
    """``table.md`` and ``table.png`` from rows, which may be a part of those asked for; raises OutputError."""
    metric = experiment.criterion.metric
    good = [(method, row) for method, row in rows if row.get("error") is None]
    sparsities = sorted({row["sparsity"] for _, row in good})
    text = [f"# {experiment.name}: test {metric.name}", ""]
    for part in table.parts:
        text += _part(part, good, sparsities)
    beside = series_of(others)
    if beside:
        text += [*_head("Beside", ["method", *(f"{s:g}" for s in sparsities)])]
        text += [_line([line.label, *(mean_cell(line.points.get(s, ())) for s in sparsities)]) for line in beside]
        text.append("")
    better = "Lower is better. " if metric.lower_is_better else ""
    text += [
        f"{better}Dense: {dense:.2f}. Of several seeds, each with calibration samples of its own, mean ± standard "
        f"error and in brackets how many. {experiment.fisher.n_rows} calibration samples. Seconds are wall, of this "
        "machine as it was, and means over seeds, of the largest sparsity that the line has.",
        "",
        "```",
        command(),
        "```",
        "",
    ]
    write_text(folder / "table.md", "\n".join(text))
    measured = [_series(method, good) for method in table.methods if any(m == method for m, _ in good)]
    plot_metric(folder / "table.png", experiment.name, [*measured, *beside], dense, metric)


def _part(part: Comparison, good: Sequence[tuple[Method, Mapping[str, Any]]], sparsities: Sequence[float]) -> list[str]:
    """A table of some methods; empty where there are no rows of them."""
    lines = []
    for method in part.methods:
        rows = [row for m, row in good if m == method]
        if rows:
            points = _series(method, good).points
            cells = [method.label, *(_cell(points.get(s, ())) for s in sparsities), _seconds(rows)]
            lines.append(_line(cells))
    heads = ["method", *(f"{s:g}" for s in sparsities), "seconds"]
    return [*_head(part.title, heads), *lines, ""] if lines else []


def _head(title: str, heads: Sequence[str]) -> list[str]:
    return [f"## {title}", "", _line(heads), "|" + "---|" * len(heads)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _series(method: Method, good: Sequence[tuple[Method, Mapping[str, Any]]]) -> Series:
    rows = [{**row, "solver": method.label, "update": "none", "extra": {}} for m, row in good if m == method]
    return Series(method.label, series_of(rows)[0].points)


def _cell(values: Sequence[float]) -> str:
    return mean_cell(values) + (f" ({len(values)})" if len(values) > 1 else "")


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a pruning took, part by part."""
    most = max(row["sparsity"] for row in rows)
    found = []
    for part, name in _PARTS.items():
        values = [row[f"seconds_{part}"] for row in rows if row["sparsity"] == most and f"seconds_{part}" in row]
        if values and (mean := mean_and_error(values)[0]) >= 0.5:
            found.append(f"{name} {mean:.0f}")
    return ", ".join(found)
