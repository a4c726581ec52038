"""``python -m experiments.run``: prune the network of an experiment, and report how well it still does.

Without any option it prunes a small network on embedded data: no file is needed and nothing is downloaded.
"""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cbs_opt import Sensitivity
from cbs_opt.cli.shell import wide_console
from experiments.commands.grouping import grouped
from experiments.commands.shell import on_backend
from experiments.datasets.cache import CacheWarning
from experiments.networks.criterion import Metric
from experiments.networks.load import Source
from experiments.reports.display import RunDisplay
from experiments.reports.plots import Series, plot_metric, plot_sensitivity, series_of
from experiments.reports.tables import metric_table, quoted_series, rows_table
from experiments.runs.bench import Listener
from experiments.runs.options import ChoiceOptions, CurvatureOptions, NetworkOptions, RunOptions, SweepOptions
from experiments.runs.rows import ResultsFile
from experiments.runs.sweep import Sweep
from solvers.errors import OptionError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Rows beyond which the table with a line per row is left to results.jsonl.
MOST_ROWS = 60


@dataclass(frozen=True)
class OutputOptions:
    """What comes out, and where the work is done."""

    output_dir: Annotated[Path, "Gets results.jsonl and the plot."] = Path("results")
    save_masks: Annotated[bool, "Keep the mask of every row, in OUTPUT_DIR/masks."] = False
    save_networks: Annotated[
        bool, "Layer by layer: keep pruned networks, in OUTPUT_DIR/networks; distillations go on from them."
    ] = False
    overwrite: Annotated[bool, "Make rows again which are there already."] = False
    reference: Annotated[bool, "Show plain magnitude pruning beside the results of small networks."] = True
    workers: Annotated[int | None, "Masks at a time, each in a child process; -1: as many as cores."] = None
    backend: Annotated[str | None, "Of joblib: dask or ray make masks on a cluster."] = None


@grouped(app)
def main(
    network: NetworkOptions,
    sweep: SweepOptions,
    curvature: CurvatureOptions,
    choice: ChoiceOptions,
    source: Source,
    output: OutputOptions,
) -> None:
    """Prune the network of an experiment, and report accuracy or perplexity, objective, bound and time of every row."""
    started = time.perf_counter()
    options = RunOptions(network, source, curvature, sweep, choice, output.save_masks, output.save_networks)
    if output.workers == 0:
        raise OptionError("--workers must be at least 1, or -1 for as many as there are cores, not 0")
    workers = -1 if output.backend is not None and output.workers is None else output.workers
    console = wide_console()
    results = ResultsFile(output.output_dir)
    if results.dropped:
        console.print(f"the last line of {results.path} was cut off and has been removed", soft_wrap=True)
    rows: list[dict[str, object]] = []
    plain: dict[float, float] = {}
    found: Sensitivity | None = None
    try:
        with RunDisplay(console, len(options.tasks)) as display, warnings.catch_warnings():
            warnings.showwarning = lambda message, category, *_: display.say(f"warning: {message}")
            warnings.simplefilter("always", CacheWarning)
            run = Sweep(options, results, Listener(display.say, display.working, display.finished), output.overwrite)
            if curvature.measure_only:
                run.measure()
                return
            if curvature.sensitivity:
                found = run.bench.sensitivity()
            else:
                with on_backend(output.backend):
                    rows.extend(run.run(workers))
                if output.reference and options.experiment.reference:
                    plain = run.reference()
    except KeyboardInterrupt:
        console.print(
            f"interrupted; finished rows are in {results.path}, the same command goes on from there",
            style="yellow",
            soft_wrap=True,
        )
        raise
    if found is not None:
        console.print(found)
        path = results.folder / f"sensitivity-{_plain_name(options.experiment.name)}.png"
        plot_sensitivity(path, f"{options.experiment.name}: one layer pruned at a time", found)
        console.print(f"plot: {path}", soft_wrap=True, highlight=False)
        return
    extra = [Series("magnitude, no update (for comparison)", {s: (a,) for s, a in plain.items()})] if plain else []
    good, name, dense = [row for row in rows if row["error"] is None], options.experiment.name, run.bench.dense
    if len(good) <= MOST_ROWS:
        console.print(rows_table(good, f"{name}: every row"))
    metric = run.bench.metric
    console.print(metric_table(name, good, extra, dense, metric))
    plot = write_plot(name, good, extra, dense, results.folder, metric)
    failed = f"{len(rows) - len(good)} rows failed\n" if len(good) < len(rows) else ""
    console.print(
        f"{failed}rows: {results.path}\nplot: {plot}\n{time.perf_counter() - started:.1f} s in all",
        soft_wrap=True,
        highlight=False,
    )


def write_plot(
    experiment: str,
    rows: list[dict[str, object]],
    extra: list[Series],
    dense: float,
    folder: Path,
    metric: Metric,
) -> Path:
    """Draw the rows and the literature into ``folder``; returns the file."""
    path = folder / f"{metric.name}-{_plain_name(experiment)}.png"
    series = [*series_of(rows), *extra]
    sparsities = sorted({s for line in series for s in line.points})
    plot_metric(path, experiment, [*series, *quoted_series(experiment, sparsities)], dense, metric)
    return path


def _plain_name(experiment: str) -> str:
    """As part of the name of a file."""
    return re.sub(r"[^a-z0-9-]+", "_", experiment)
