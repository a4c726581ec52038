"""Tables of results for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.networks.criterion import METRICS, Metric
from experiments.reports.literature import NAMES, columns
from experiments.reports.plots import Series, mean_and_error, metric_of, series_of

#: Columns of the table of rows: heading, and the row's value as text.
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "solver": lambda row: str(row["solver"]),
    "update": lambda row: str(row["update"]),
    "sparsity": lambda row: f"{row['sparsity']:g}",
    "budget": lambda row: str((row.get("extra") or {}).get("budget", "")),
    "seed": lambda row: str(row["seed"]),
    "kept": lambda row: f"{row['n_kept']:,}",
    "test": lambda row: _two_places(row[metric_of(row).name]),
    "old norms": lambda row: _old_norms(row),
    "train loss": lambda row: f"{row['train_loss']:.4f}",
    "objective": lambda row: _number(row["objective"]),
    "refit": lambda row: _number(row["refit_objective"]),
    "split gap": lambda row: _split_gap(row),
    "operations": lambda row: _of_dense(row, "operations", ".1%"),
    "ms": lambda row: _of_dense(row, "milliseconds", ""),
    "gap": lambda row: "" if row["gap"] is None else f"{100 * row['gap']:.1f} %",
    "solve s": lambda row: f"{row['seconds_solve']:.2f}",
    "update s": lambda row: f"{row['seconds_update']:.2f}",
    "fine-tune s": lambda row: f"{row['seconds_fine_tune']:.2f}" if "seconds_fine_tune" in row else "",
    "distill s": lambda row: f"{row['seconds_distill']:.2f}" if "seconds_distill" in row else "",
}
#: Columns which move into the title where all rows agree; without a value in any row they vanish.
_SHARED = (
    "update",
    "sparsity",
    "budget",
    "seed",
    "split gap",
    "operations",
    "ms",
    "gap",
    "distill s",
    "fine-tune s",
    "old norms",
)


def rows_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line per row: what was pruned, how well, at what cost. What all rows share is said once, in the title."""
    cells = {heading: [value(row) for row in rows] for heading, value in _COLUMNS.items()}
    named = {"test": metric_of(rows[0]).heading} if rows else {}
    for heading in _SHARED:
        values = set(cells[heading])
        if len(values) == 1 and (len(rows) > 1 or "" in values):
            del cells[heading]
            value = values.pop()
            title += f", {heading} {value}" if value else ""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in cells:
        table.add_column(
            named.get(heading, heading), justify="left" if heading in ("solver", "update") else "right", no_wrap=True
        )
    for line in zip(*cells.values(), strict=True):
        table.add_row(*(escape(cell) for cell in line))
    return table


def metric_table(
    experiment: str,
    rows: Sequence[Mapping[str, Any]],
    reference: Sequence[Series] = (),
    dense: float | None = None,
    metric: Metric = METRICS["accuracy"],
) -> Table:
    """A line per solver and update, a column per sparsity: mean on test data and standard error over the seeds.

    Parameters
    ----------
    rows
        Of one experiment.
    reference
        Further lines which were measured beside the rows.
    dense
        The dense network's, for the title.
    metric
        Of the rows.
    """
    series = series_of(rows)
    sparsities = sorted({s for line in series for s in line.points})
    what = f"{metric.name} in{metric.unit}" if metric.unit else f"{metric.name} (lower is better)"
    title = f"{experiment}: test {what} by sparsity, mean over the seeds"
    title += "" if dense is None else f"; dense network {dense:.2f}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("solver + update")
    for sparsity in sparsities:
        table.add_column(f"{sparsity:g}", justify="right", no_wrap=True)
    for line in (*series, *reference):
        table.add_row(escape(line.label), *(mean_cell(line.points.get(s, ())) for s in sparsities))
    quoted = quoted_series(experiment, sparsities)
    if quoted:
        table.add_section()
    for line in quoted:
        table.add_row(escape(line.label), *(mean_cell(line.points.get(s, ())) for s in sparsities), style="dim")
    return table


def quoted_series(experiment: str, sparsities: Sequence[float]) -> list[Series]:
    """The literature's accuracies at some of these sparsities."""
    found = []
    for name, column in columns(experiment).items():
        points = {s: (column[s],) for s in sparsities if s in column}
        if points:
            found.append(Series(f"{NAMES[name]} (quoted)", points, quoted=True))
    return found


def mean_cell(values: Sequence[float]) -> str:
    """Mean ± standard error, or nothing."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.2f}" + (f" ± {error:.2f}" if len(values) > 1 else "")


def _old_norms(row: Mapping[str, Any]) -> str:
    """The metric with the statistics of batch norms that the dense network has, where they were re-estimated."""
    name = f"{metric_of(row).name}_old_norms"
    return _two_places(row[name]) if name in row else ""


def _split_gap(row: Mapping[str, Any]) -> str:
    """How far the scores by which a limit on costs was shared out are from their Lagrangian bound."""
    if row.get("split") is None:
        return ""
    value, bound = row["split"], row["split_bound"]
    return "0 %" if value <= bound else f"{100 * (value - bound) / abs(bound):.2g} %" if bound else "∞"


def _of_dense(row: Mapping[str, Any], what: str, form: str) -> str:
    """What a call of the smaller network takes, as a share of or beside what the dense one does."""
    if row.get(f"{what}_small") is None:
        return ""
    small, dense = row[f"{what}_small"], row[f"{what}_dense"]
    return f"{small / dense:{form}}" if form else f"{small:.3g} of {dense:.3g}"


def _two_places(value: float | None) -> str:
    """Two decimal places, or what JSON has instead of what is not finite."""
    return "not finite" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    """Four significant digits, or nothing."""
    return "" if value is None else f"{value:.4g}"
