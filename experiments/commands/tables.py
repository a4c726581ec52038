"""``python -m experiments.tables``: the literature's table beside ours, staged pruning without training.

One nested path of stages per seed (see `StagedTable`), or a row per solver, sparsity and seed (see `SolverTable`).
Everything is resumable: each stage is in a journal below the output folder, each row in its ``results.jsonl``, and the
same command goes on where it was interrupted. Rows of `experiments.run` may be shown beside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cbs_opt import StageRecord
from cbs_opt.cli.shell import wide_console
from experiments.commands.grouping import grouped
from experiments.networks import EXPERIMENTS, Experiment, Network, get_experiment
from experiments.networks.experiment import SolverTable, StagedTable
from experiments.networks.load import Source, open_network
from experiments.reports.display import RunDisplay
from experiments.reports.solver_table import write_solver_table
from experiments.reports.staged_table import read_rows, write_rows, write_table
from experiments.runs.bench import Listener
from experiments.runs.methods import method_rows
from experiments.runs.rows import ResultsFile
from experiments.runs.stages import StagedPath
from solvers.errors import OptionError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROWS_FILE = "table.jsonl"
TABLES = tuple(name for name, experiment in EXPERIMENTS.items() if experiment.table is not None)


@grouped(app)
def main(
    experiment: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    source: Source,
    seed: Annotated[list[int] | None, typer.Option(help="A path of stages, or calibration data, for each.")] = None,
    until: Annotated[float, typer.Option(help="Stop at this sparsity.")] = 1.0,
    sparsity: Annotated[list[float] | None, typer.Option(help="Of a table of solvers, no others than these.")] = None,
    found: Annotated[bool, typer.Option("--found", help="Of a table of solvers, show rows that are there.")] = False,
    rows: Annotated[list[Path] | None, typer.Option(help="results.jsonl of experiments.run, shown beside.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Gets table, plot, rows and journals.")] = Path("tables"),
) -> None:
    """Measure the table of an experiment, and write it as markdown and PNG."""
    chosen, console = get_experiment(experiment), wide_console()
    table = chosen.table
    if table is None:
        raise OptionError(f"{experiment} has no table; give {' or '.join(TABLES)}")
    seeds = tuple(seed or table.seeds)
    folder = output_dir.expanduser() / experiment
    others = [row for path in rows or [] for row in read_rows(path) if row.get("experiment") == experiment]
    asked = _Asked(chosen, source, seeds, until, folder, others, console)
    if isinstance(table, SolverTable):
        wanted = tuple(s for s in table.reported if s <= until and (not sparsity or s in sparsity))
        if not wanted:
            reported = ", ".join(f"{s:g}" for s in table.reported)
            raise OptionError(f"--until and --sparsity leave none of the table's sparsities, {reported}")
        _solver_table(asked, replace(table, reported=wanted), found)
    elif sparsity or found:
        raise OptionError(
            f"the table of {experiment} is a path through its sparsities; leave --sparsity and --found out"
        )
    else:
        _staged_table(asked, table)
    console.print((folder / "table.md").read_text(), markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Asked:
    """What a table is made of."""

    experiment: Experiment
    source: Source
    seeds: tuple[int, ...]
    until: float
    folder: Path
    others: list[dict[str, Any]]
    console: Console

    def network(self) -> Network:
        return open_network(self.experiment, self.source, self.say)

    def say(self, message: str) -> None:
        self.console.print(message, soft_wrap=True, markup=False, highlight=False)


def _solver_table(asked: _Asked, table: SolverTable, found: bool) -> None:
    results = ResultsFile(asked.folder)
    network = asked.network()
    count = len(asked.seeds) * len(table.methods) * len(table.reported)
    rows = []
    with RunDisplay(asked.console, count) as display:
        listener = Listener(display.say, display.working, display.finished)
        made = method_rows(network, table, asked.source, asked.seeds, results, listener, found)
        for method, row in made:
            rows.append((method, row))
            write_solver_table(asked.folder, asked.experiment, table, rows, asked.others, network.dense)
    if not rows:
        raise OptionError(f"{results.path} has no row of this table; leave --found out")


def _staged_table(asked: _Asked, table: StagedTable) -> None:
    network = asked.network()
    measured: list[dict[str, Any]] = []
    for number in asked.seeds:

        def say(record: StageRecord, accuracy: float | None, number: int = number) -> None:
            shown = "" if accuracy is None else f", test accuracy {accuracy:.2f} %"
            asked.say(
                f"seed {number}, stage {record.stage}: {record.kind} to {record.sparsity:.2%}, held-out loss "
                f"{record.loss_after:.4f}{shown}"
            )

        path = StagedPath(network, number, asked.folder)
        measured.extend(path.run(min(asked.until, max(table.reported)), say))
        write_rows(asked.folder / ROWS_FILE, measured)
        write_table(asked.folder, asked.experiment, measured, asked.others, network.dense)
