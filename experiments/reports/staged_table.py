"""The literature's table beside ours, from the rows of staged paths: JSON lines, markdown and a plot."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbs_opt import StageOptions
from experiments.datasets.cache import write_file
from experiments.networks.experiment import ImageExperiment, StagedTable
from experiments.reports.literature import NAMES, columns
from experiments.reports.plots import Series, plot_metric, series_of
from experiments.reports.tables import mean_cell, quoted_series
from solvers.errors import DataError, OptionError, OutputError

OURS = "ours (staged)"
_PARTS = ("gradients", "solve", "update")


def write_table(
    folder: Path,
    experiment: ImageExperiment,
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    dense: float,
) -> None:
    """``table.md`` and ``table.png`` from the rows."""
    table, staged = experiment.table, experiment.staged
    if not isinstance(table, StagedTable):
        raise OptionError(f"{experiment.name} has no table of stages; give another experiment")
    quoted = columns(experiment.name)
    points = {s: [row["accuracy"] for row in rows if row["sparsity"] == s] for s in table.reported}
    measured = [*series_of(others), Series(OURS, {s: values for s, values in points.items() if values})]
    text = [f"# {experiment.name}: test accuracy (%), no training", ""]
    heads = ["sparsity", *quoted, *(s.label for s in measured), "stages", "gradients + solve + update (s)"]
    text += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for sparsity in table.reported:
        cells = [f"{sparsity:g}"]
        cells += [f"{values[sparsity]:.2f}" if sparsity in values else "" for values in quoted.values()]
        cells += [mean_cell(s.points.get(sparsity, ())) for s in measured]
        here = [row for row in rows if row["sparsity"] == sparsity]
        seconds = [sum(row[f"seconds_{part}"] for row in here) / max(len(here), 1) for part in _PARTS]
        cells += [f"{here[0]['stages']}", " + ".join(f"{value:.0f}" for value in seconds)] if here else ["", ""]
        text.append("| " + " | ".join(cells) + " |")
    seeds = sorted({int(row["seed"]) for row in rows})
    notes = ", ".join(f"{key} = {NAMES[key]}" for key in quoted)
    text += [
        "",
        f"Dense: {dense:.2f}. Seeds {', '.join(map(str, seeds))}: mean ± standard error."
        + (f" Quoted from the literature: {notes}." if quoted else ""),
        f"Ours: `{table.solver}`, {staged.fisher.n_rows} rows of {staged.fisher.batch_size} training images per stage, "
        f"λ = {staged.fisher.ridge:g} for the choice, searched for the step on {staged.options.held_out} training "
        f"images that no gradient sees.{_distilled(staged.options)} One nested path per seed: stages "
        "and seconds (wall, of this machine as it was) are those from the dense network on.",
        "",
        "```",
        command(),
        "```",
        "",
    ]
    write_text(folder / "table.md", "\n".join(text))
    lines = quoted_series(experiment.name, table.reported)
    plot_metric(folder / "table.png", f"{experiment.name}: pruning without training", [*measured, *lines], dense)


def _distilled(options: StageOptions) -> str:
    """A sentence about the loss where it is not that of the labels alone."""
    how = options.distillation
    if how is None:
        return ""
    return (
        f" The calibration loss is {1 - how.weight:g} of the labels and {how.weight:g} of the dense network's own "
        f"outputs (temperature {how.temperature:g})."
    )


def command(module: str = "tables") -> str:
    """The command line that is running, with the interpreter's and the script's place left out."""
    return f"python -m experiments.{module} " + " ".join(shlex.quote(part) for part in sys.argv[1:])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; raises DataError."""
    try:
        return [json.loads(line) for line in path.expanduser().read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the rows in {path}: {error}") from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows as JSON lines; raises OutputError."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; raises OutputError."""
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
