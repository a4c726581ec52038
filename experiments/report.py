"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.literature import NAMES, columns
from experiments.plots import Series, mean_and_error, series_of


def rows_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line per row: what was pruned, how well, at what cost."""
    table = Table(title=title, title_justify="left")
    for heading in ("solver", "update"):
        table.add_column(heading, no_wrap=True)
    for heading in ("sparsity", "seed", "kept", "accuracy %", "train loss", "objective", "refit", "gap", "solve s",
                    "update s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["solver"]), str(row["update"]), f"{row['sparsity']:g}", str(row["seed"]), f"{row['n_kept']:,}",
            f"{row['accuracy']:.2f}", f"{row['train_loss']:.4f}", number(row["objective"]),
            number(row["refit_objective"]), "" if row["gap"] is None else f"{100 * row['gap']:.1f} %",
            f"{row['seconds_solve']:.2f}", f"{row['seconds_update']:.2f}",
        )
    return table


def accuracy_table(experiment: str, rows: Sequence[Mapping[str, Any]], reference: Sequence[Series] = (),
                   dense: float | None = None) -> Table:
    """A line per solver and update, a column per sparsity: mean test accuracy and standard error over the seeds.

    Parameters
    ----------
    rows
        Of one experiment.
    reference
        Further lines which were measured beside the rows.
    dense
        Accuracy of the dense network, for the caption.
    """
    series = series_of(rows)
    sparsities = sorted({s for line in series for s in line.points})
    caption = "test accuracy in %, mean over the seeds" + ("" if dense is None else f"; dense: {dense:.2f} %")
    table = Table(title=f"{experiment}: accuracy against sparsity", caption=caption, title_justify="left")
    table.add_column("solver", no_wrap=True)
    for sparsity in sparsities:
        table.add_column(f"{sparsity:g}", justify="right", no_wrap=True)
    for line in (*series, *reference):
        table.add_row(line.label, *(_cell(line.points.get(s, ())) for s in sparsities))
    quoted = quoted_series(experiment, sparsities)
    if quoted:
        table.add_section()
    for line in quoted:
        table.add_row(line.label, *(_cell(line.points.get(s, ())) for s in sparsities), style="dim")
    return table


def quoted_series(experiment: str, sparsities: Sequence[float]) -> list[Series]:
    """The literature's accuracies at some of these sparsities."""
    found = []
    for name, column in columns(experiment).items():
        points = {s: (column[s],) for s in sparsities if s in column}
        if points:
            found.append(Series(f"{NAMES[name]} (quoted)", points, quoted=True))
    return found


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.2f}" + (f" ± {error:.2f}" if len(values) > 1 else "")


def number(value: float | None) -> str:
    """Four significant digits, or nothing."""
    return "" if value is None else f"{value:.4g}"
