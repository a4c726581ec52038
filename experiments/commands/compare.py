"""``python -m experiments.compare``: how good is a solver, really, beside the best value known.

Solvers × blocks × budgets × objectives, each in a child process with a time limit; a row per solve, a table with
the gap to the best known value, and plots. The blocks are .npz files, or cut from a network with ``--from``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.commands.shell import on_backend, wide_console
from experiments.reports.gaps import (
    best_values,
    proven_values,
    summary,
    summary_table,
    write_markdown,
    write_plots,
)
from experiments.runs.cutting import cut_blocks
from experiments.runs.rows import ResultsFile
from experiments.runs.solves import Comparison, find_blocks, plan, stored_optima
from solvers.errors import OptionError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    solver: Annotated[list[str], typer.Option(help="Solvers, e.g. greedy_ls 'branch_bound[node_limit=1000]'.")],
    blocks: Annotated[Path | None, typer.Option(help="Folder of .npz blocks, perhaps with an optima.json.")] = None,
    source: Annotated[str | None, typer.Option("--from", help="Cut the blocks from this experiment's network.")] = None,
    block_size: Annotated[int, typer.Option(help="Weights of each block that is cut.", min=2)] = 100,
    count: Annotated[int, typer.Option(help="Blocks to cut.", min=1)] = 20,
    fraction: Annotated[list[float] | None, typer.Option(help="Shares of the weights removed [0.5 0.8 0.9].")] = None,
    n_prune: Annotated[list[int] | None, typer.Option(help="Numbers of weights removed, besides.")] = None,
    objective: Annotated[list[str], typer.Option(help="selection, joint.")] = ["selection"],
    seed: Annotated[list[int], typer.Option(help="Of randomised solvers; the first also cuts blocks.")] = [0],
    time_limit: Annotated[float | None, typer.Option(help="Seconds per solve, for solvers that keep a limit.")] = 60.0,
    gradient: Annotated[bool, typer.Option("--gradient", help="Keep the linear term of the blocks.")] = False,
    workers: Annotated[int, typer.Option(help="Solves at a time, each on one thread; -1: as many as cores.")] = 1,
    backend: Annotated[str | None, typer.Option(help="Of joblib: dask or ray solve on a cluster.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="With --from: folder which holds the data sets.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="With --from: trained weights.")] = None,
    fisher_samples: Annotated[int | None, typer.Option(help="With --from: rows of the factor.", min=1)] = None,
    damping: Annotated[float | None, typer.Option(help="With --from: instead of the experiment's.", min=0.0)] = None,
    output_dir: Annotated[Path, typer.Option(help="Gets results.jsonl, table.md and plots.")] = Path("results"),
) -> None:
    """Compare solvers on small problems against the best value known, proven where some solver can."""
    if (blocks is None) == (source is None):
        raise OptionError("give either --blocks DIR or --from EXPERIMENT")
    if workers == 0:
        raise OptionError("--workers must be at least 1, or -1 for as many as there are cores, not 0")
    if time_limit is not None and not 0 < time_limit < float("inf"):
        raise OptionError(f"--time-limit must be positive seconds, not {time_limit!r}")
    fractions = [0.5, 0.8, 0.9] if fraction is None and n_prune is None else fraction or []
    for share in fractions:
        if not 0.0 <= share <= 1.0:
            raise OptionError(f"--fraction must lie between 0 and 1, not {share!r}")
    console = wide_console()
    results = ResultsFile(output_dir)
    folder = blocks
    if folder is None:
        folder = cut_blocks(
            str(source),
            results.folder / "blocks",
            size=block_size,
            count=count,
            seed=seed[0],
            data_dir=data_dir,
            checkpoint=checkpoint,
            samples=fisher_samples,
            damping=damping,
            say=lambda message: console.print(message, soft_wrap=True, highlight=False, markup=False),
        )
    found = find_blocks(folder)
    stored = stored_optima(folder, found)
    tasks, left_out = plan(
        found,
        solver,
        fractions=fractions,
        budgets=n_prune or [],
        objectives=objective,
        seeds=seed,
        time_limit=time_limit,
        gradient=gradient,
    )
    for reason in left_out:
        console.print(f"left out: {reason}", soft_wrap=True, highlight=False, markup=False)
    if not tasks:
        raise OptionError("nothing is left to compare: no solver takes any of these problems")
    comparison = Comparison(tasks, {b.digest: b.path for b in found}, results, stored, workers)
    console.print(f"{len(tasks)} solves, {len(comparison.finished)} of them done before", highlight=False)
    began = time.perf_counter()
    failed = 0
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with on_backend(backend), Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("solving", total=len(comparison.missing))
            for row in comparison.run():
                progress.advance(bar)
                if row["error"] is not None:
                    failed += 1
                    progress.console.print(
                        f"failed: {row['solver']} on {row['block']}, n_prune={row['n_prune']}: {row['error']}",
                        style="red",
                        soft_wrap=True,
                        highlight=False,
                        markup=False,
                    )
    except KeyboardInterrupt:
        console.print(
            f"interrupted; finished rows are in {results.path}, the same command goes on from there",
            style="yellow",
            soft_wrap=True,
        )
        raise
    # Values of all rows in the folder count as known, the table shows those that were asked for.
    best = best_values([row for row in results.rows if "digest" in row], stored)
    entries = summary(comparison.finished, best, list(dict.fromkeys(task.solver for task in tasks)))
    console.print(summary_table(entries))
    proven = len(proven_values(comparison.finished))
    write_markdown(results.folder / "table.md", entries)
    plots = write_plots(results.folder, comparison.finished, best)
    instances = len({task.instance for task in tasks})
    console.print(
        f"{instances} instances, {proven} of them proven here; {failed} failed\nrows: {results.path}\n"
        f"table: {results.folder / 'table.md'}\nplots: {', '.join(str(path) for path in plots)}\n"
        f"{time.perf_counter() - began:.1f} s in all",
        soft_wrap=True,
        highlight=False,
    )
