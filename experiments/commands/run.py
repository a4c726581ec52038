"""``python -m experiments.run``: prune the network of an experiment and report accuracies.

Without any option it prunes a small network on embedded data: no file is needed and nothing is downloaded.
"""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from cbs_opt import resolve_device
from cbs_opt.measure.fisher import DEFAULT_ROWS
from experiments.commands.shell import wide_console
from experiments.datasets.cache import CacheWarning
from experiments.networks import DEFAULT, EXPERIMENTS, get_experiment
from experiments.reports.accuracy import accuracy_table, quoted_series, rows_table
from experiments.reports.display import RunDisplay
from experiments.reports.plots import Series, plot_accuracy, series_of
from experiments.runs.options import Rounding, RunOptions
from experiments.runs.rows import ResultsFile
from experiments.runs.runner import Listener, Runner

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Rows beyond which the table with a line per row is left to results.jsonl.
MOST_ROWS = 60


@app.command()
def main(
    solver: Annotated[list[str], typer.Option(help="Selection rules, e.g. greedy_ls woodfisher 'rmp[draws=10]'.")] = [
        "greedy_ls"
    ],
    experiment: Annotated[str, typer.Option(help=f"One of {', '.join(EXPERIMENTS)}.")] = DEFAULT,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Shares of the weights removed; default: those of the paper's table.")
    ] = None,
    seed: Annotated[list[int], typer.Option(help="Of the calibration sample and the solver.")] = [0],
    update: Annotated[list[str], typer.Option(help="Of the kept weights: none, single, combinatorial or searched.")] = [
        "combinatorial"
    ],
    update_scale: Annotated[float, typer.Option(help="Multiplies the update.")] = 1.0,
    objective: Annotated[
        str | None, typer.Option(help="What the solver minimises: selection or joint; default: what it can.")
    ] = None,
    fisher_samples: Annotated[int | None, typer.Option(help="Gradients, rows of the factor.")] = None,
    fisher_batch: Annotated[int | None, typer.Option(help="Images averaged into each gradient.")] = None,
    damping: Annotated[float | None, typer.Option(help="Added to the diagonal of the Fisher matrix.")] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help="Fisher blocks: one, per_layer, per_row, fixed:SIZE, components[:T], clusters:SIZE."),
    ] = None,
    first_order: Annotated[bool, typer.Option("--first-order", help="Keep the mean gradient in the model.")] = False,
    stages: Annotated[
        int,
        typer.Option(
            help="Prune in as many steps, each from gradients anew, with the experiment's settings; a few more polish."
        ),
    ] = 1,
    include: Annotated[list[str] | None, typer.Option(help="Patterns of the layers to prune.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of the layers to leave alone.")] = None,
    allocation: Annotated[
        str | None, typer.Option(help="Split the budget over the blocks instead of sharing it, e.g. uniform.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for each call of a solver.")] = None,
    bound: Annotated[
        str | None,
        typer.Option(
            help="Certify each mask by a lower bound: auto, frank_wolfe, qcr or lagrangian; takes minutes on a network."
        ),
    ] = None,
    sparsity_rounding: Annotated[
        Rounding, typer.Option(help="exact, or as many weights as the published code keeps.")
    ] = Rounding.EXACT,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder which holds mnist/ and cifar10/, or that of one data set; default: download."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Trained weights (safetensors); default: beside the data, then the cache, then train."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output_dir: Annotated[Path, typer.Option(help="Gets results.jsonl and the plot.")] = Path("results"),
    refit: Annotated[
        bool,
        typer.Option(help="Judge every mask by the joint objective too, whatever the update; costs as much as one."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make rows again which are there already.")] = False,
    reference: Annotated[
        bool, typer.Option(help="Show plain magnitude pruning beside the results of small networks.")
    ] = True,
) -> None:
    """Prune the network of an experiment, and report accuracy, objective, bound and time of every row."""
    started = time.perf_counter()
    chosen = get_experiment(experiment)
    usual = chosen.staged.fisher if stages > 1 else chosen.fisher
    options = RunOptions(
        experiment=chosen,
        solvers=tuple(solver),
        sparsities=tuple(sparsity) if sparsity else chosen.sparsities,
        seeds=tuple(seed),
        updates=tuple(update),
        fisher_samples=(usual.n_rows or DEFAULT_ROWS) if fisher_samples is None else fisher_samples,
        fisher_batch=usual.batch_size if fisher_batch is None else fisher_batch,
        damping=usual.damping if damping is None else damping,
        blocks=blocks or usual.blocks,
        objective=objective,
        update_scale=update_scale,
        first_order=first_order,
        stages=stages,
        rounding=sparsity_rounding,
        include=tuple(include) if include else chosen.include,
        exclude=tuple(exclude) if exclude else chosen.exclude,
        allocation=allocation,
        time_limit=time_limit,
        bound=bound,
        data_dir=data_dir,
        checkpoint=checkpoint,
        refit=refit,
        overwrite=overwrite,
        reference=reference and chosen.reference,
    )
    where = resolve_device(device)
    console = wide_console()
    results = ResultsFile(output_dir)
    if results.dropped:
        console.print(f"the last line of {results.path} was cut off and has been removed", soft_wrap=True)
    rows: list[dict[str, object]] = []
    try:
        with RunDisplay(console, options.n_rows) as display, warnings.catch_warnings():
            warnings.showwarning = lambda message, category, *_: display.say(f"warning: {message}")
            warnings.simplefilter("always", CacheWarning)
            runner = Runner(options, results, where, Listener(display.say, display.working, display.finished))
            rows.extend(runner.run())
            plain = runner.reference() if options.reference else {}
    except KeyboardInterrupt:
        console.print(
            f"interrupted; finished rows are in {results.path}, the same command goes on from there",
            style="yellow",
            soft_wrap=True,
        )
        raise
    extra = [Series("magnitude, no update (for comparison)", {s: (a,) for s, a in plain.items()})] if plain else []
    if len(rows) <= MOST_ROWS:
        console.print(rows_table(rows, f"{chosen.name}: every row"))
    console.print(accuracy_table(chosen.name, rows, extra, runner.dense.accuracy))
    plot = write_plot(chosen.name, rows, extra, runner.dense.accuracy, output_dir)
    console.print(
        f"rows: {results.path}\nplot: {plot}\n{time.perf_counter() - started:.1f} s in all",
        soft_wrap=True,
        highlight=False,
    )


def write_plot(experiment: str, rows: list[dict[str, object]], extra: list[Series], dense: float, folder: Path) -> Path:
    """Draw the rows and the literature into ``folder``; returns the file."""
    path = folder.expanduser() / f"accuracy-{re.sub(r'[^a-z0-9-]+', '_', experiment)}.png"
    series = [*series_of(rows), *extra]
    sparsities = sorted({s for line in series for s in line.points})
    plot_accuracy(path, experiment, [*series, *quoted_series(experiment, sparsities)], dense)
    return path
