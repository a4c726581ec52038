"""The literature's table beside ours, from the rows of staged paths: JSON lines, markdown and a plot."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbs_opt import StageOptions
from experiments.datasets.cache import write_atomically
from experiments.networks.experiment import Experiment
from experiments.reports.literature import NAMES, columns
from experiments.reports.plots import Series, mean_and_error, plot_accuracy, series_of
from solvers.errors import DataError, OptionError, OutputError

OURS = "ours (staged)"


def write_table(
    folder: Path,
    experiment: Experiment,
    rows: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    dense: float,
) -> None:
    """``table.md`` and ``table.png`` from the rows."""
    table, staged = experiment.table, experiment.staged
    if table is None:
        raise OptionError(f"{experiment.name} has no table; give another experiment")
    quoted = columns(experiment.name)
    measured = [*series_of(others), Series(OURS, _points(rows))]
    text = [f"# {experiment.name}: test accuracy (%), no training", ""]
    heads = ["sparsity", *quoted, *(s.label for s in measured), "stages", "gradients + solve + update (s)"]
    text += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for sparsity in table.reported:
        cells = [f"{sparsity:g}"]
        cells += [f"{values[sparsity]:.2f}" if sparsity in values else "" for values in quoted.values()]
        cells += [_cell(s.points.get(sparsity, ())) for s in measured]
        here = [row for row in rows if row["sparsity"] == sparsity]
        cells.append(f"{here[0]['stages']}" if here else "")
        cells.append(
            " + ".join(
                f"{sum(row[f'seconds_{part}'] for row in here) / len(here):.0f}"
                for part in ("gradients", "solve", "update")
            )
            if here
            else ""
        )
        text.append("| " + " | ".join(cells) + " |")
    seeds = sorted({int(row["seed"]) for row in rows})
    notes = ", ".join(f"{key} = {NAMES[key]}" for key in quoted)
    text += [
        "",
        f"Dense: {dense:.2f}. Seeds {', '.join(map(str, seeds))}: mean ± standard error."
        + (f" Quoted from the literature: {notes}." if quoted else ""),
        f"Ours: `{table.solver}`, {staged.fisher.n_rows} rows of {staged.fisher.batch_size} training images per stage, "
        f"λ = {staged.fisher.damping:g} for the choice, searched for the step on {staged.options.held_out} training "
        f"images that no gradient sees.{_distilled(staged.options)} One nested path per seed: stages "
        "and seconds (wall, of this machine as it was) are those from the dense network on.",
        "",
        "```",
        command(),
        "```",
        "",
    ]
    try:
        write_atomically(folder / "table.md", lambda stream: _ignore(stream.write("\n".join(text).encode())))
    except OSError as error:
        raise OutputError(f"cannot write {folder / 'table.md'}: {error}") from error
    lines = [
        Series(f"{name} (quoted)", {s: (v,) for s, v in values.items()}, quoted=True) for name, values in quoted.items()
    ]
    plot_accuracy(folder / "table.png", f"{experiment.name}: pruning without training", [*measured, *lines], dense)


def _distilled(options: StageOptions) -> str:
    """A sentence about the loss where it is not that of the labels alone."""
    how = options.distillation
    if how is None:
        return ""
    return (
        f" The calibration loss is {1 - how.weight:g} of the labels and {how.weight:g} of the dense network's own "
        f"outputs (temperature {how.temperature:g})."
    )


def command() -> str:
    """The command line that is running, with the interpreter's and the script's place left out."""
    return "python -m experiments.tables " + " ".join(shlex.quote(part) for part in sys.argv[1:])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; raises DataError."""
    try:
        return [json.loads(line) for line in path.expanduser().read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the rows in {path}: {error}") from error


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows as JSON lines; raises OutputError."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        write_atomically(path, lambda stream: _ignore(stream.write(text.encode())))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[float, list[float]]:
    points: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda r: float(r["sparsity"])):
        points.setdefault(float(row["sparsity"]), []).append(float(row["accuracy"]))
    return points


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.2f} ± {error:.2f}" if len(values) > 1 else f"{mean:.2f}"


def _ignore(_: object) -> None:
    return None
