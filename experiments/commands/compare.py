"""``python -m experiments.compare``: how good is a solver, really, beside the best value known.

Solvers × blocks × budgets × objectives, each in a child process with a time limit; a row per solve, a table with
the gap to the best known value, and plots. The blocks are those of the package (docs/instances.md), .npz files of a
folder with ``--blocks``, or cut from a network with ``--from``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cbs_opt.cli.shell import wide_console
from experiments.commands.grouping import grouped
from experiments.commands.shell import on_backend
from experiments.networks.load import Source
from experiments.reports.gaps import (
    best_values,
    proven_values,
    summary,
    summary_table,
    write_markdown,
    write_plots,
)
from experiments.runs.cutting import CutOptions, cut_blocks
from experiments.runs.instances import matching
from experiments.runs.rows import ResultsFile
from experiments.runs.solves import Comparison, SolveOptions, find_blocks, plan, stored_optima
from solvers import Instance, load_instance
from solvers.errors import OptionError
from solvers.instances import FOLDER

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class CompareOptions:
    """Instances, and where they are solved."""

    instances: Annotated[
        tuple[str, ...],
        "Of the package, as patterns of their names: 'resnet20-*-joint-*'; default: those of at most 100 weights that "
        "were proven within two seconds.",
    ] = ()
    blocks: Annotated[Path | None, "Instead: a folder of .npz blocks, perhaps with an optima.json."] = None
    from_network: Annotated[str | None, "Or: cut the blocks from this experiment's network.", "--from"] = None
    workers: Annotated[int, "Solves at a time, each on one thread; -1: as many as cores."] = 1
    backend: Annotated[str | None, "Of joblib: dask or ray solve on a cluster."] = None
    output_dir: Annotated[Path, "Gets results.jsonl, table.md and plots."] = Path("results")

    def __post_init__(self) -> None:
        given = [bool(self.instances), self.blocks is not None, self.from_network is not None]
        if sum(given) > 1:
            raise OptionError("give one of --instances PATTERN, --blocks DIR and --from EXPERIMENT")
        if self.workers == 0:
            raise OptionError("--workers must be at least 1, or -1 for as many as there are cores, not 0")


@grouped(app)
def main(instances: CompareOptions, solves: SolveOptions, cut: CutOptions, source: Source) -> None:
    """Compare solvers on small problems against the best value known, proven where some solver can."""
    console = wide_console()
    results = ResultsFile(instances.output_dir)
    folder, chosen = instances.blocks or FOLDER, None
    if instances.from_network is not None:
        folder = cut_blocks(
            instances.from_network,
            results.folder / "blocks",
            cut,
            seed=solves.seed[0],
            source=source,
            say=lambda message: console.print(message, soft_wrap=True, highlight=False, markup=False),
        )
    elif instances.blocks is None:
        chosen = {name: load_instance(name) for name in matching(instances.instances)}
    found = find_blocks(folder, None if chosen is None else {one.block for one in chosen.values()})
    stored = stored_optima(folder, found)
    tasks, left_out = plan(found, solves, chosen)
    for reason in left_out:
        console.print(f"left out: {reason}", soft_wrap=True, highlight=False, markup=False)
    if not tasks:
        raise OptionError("nothing is left to compare: no solver takes any of these problems")
    comparison = Comparison(tasks, {b.digest: b.path for b in found}, results, stored, instances.workers)
    console.print(f"{len(tasks)} solves, {len(comparison.finished)} of them done before", highlight=False)
    began = time.perf_counter()
    failed = 0
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with on_backend(instances.backend), Progress(*columns, console=console, transient=True) as progress:
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
    console.print(
        f"{len({task.instance for task in tasks})} instances, {proven} of them proven here; {failed} failed\n"
        f"{_known(chosen)}"
        f"rows: {results.path}\n"
        f"table: {results.folder / 'table.md'}\nplots: {', '.join(str(path) for path in plots)}\n"
        f"{time.perf_counter() - began:.1f} s in all",
        soft_wrap=True,
        highlight=False,
    )


def _known(chosen: Mapping[str, Instance] | None) -> str:
    """How good the best known values are."""
    if chosen is None:
        return ""
    proven = sum(one.proven for one in chosen.values())
    return f"instances of the package: best values of {proven} of these {len(chosen)} are proven optima\n"
