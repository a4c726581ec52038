"""``python -m experiments.tables``: the literature's table beside ours, staged pruning without training.

One nested path of stages per seed (see `StagedTable`). Everything is resumable: each stage is in a journal below the
output folder, and the same command goes on where it was interrupted. Rows of `experiments.run` may be shown beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cbs_opt import StageRecord
from experiments.commands.grouping import grouped
from experiments.commands.shell import wide_console
from experiments.networks import EXPERIMENTS, get_experiment
from experiments.networks.load import Source, open_network
from experiments.reports.staged_table import read_rows, write_rows, write_table
from experiments.runs.stages import StagedPath
from solvers.errors import OptionError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROWS_FILE = "table.jsonl"
TABLES = tuple(name for name, experiment in EXPERIMENTS.items() if experiment.table is not None)


@grouped(app)
def main(
    experiment: Annotated[str, typer.Argument(help=f"One of {', '.join(TABLES)}.")],
    source: Source,
    seed: Annotated[list[int], typer.Option(help="A path of stages for each.")] = [0, 1, 2, 3, 4],
    until: Annotated[float, typer.Option(help="Stop the path at this sparsity.")] = 1.0,
    rows: Annotated[list[Path] | None, typer.Option(help="results.jsonl of experiments.run, shown beside.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Gets table, plot, rows and journals.")] = Path("tables"),
) -> None:
    """Measure the table of an experiment, and write it as markdown and PNG."""
    chosen, console = get_experiment(experiment), wide_console()
    if chosen.table is None:
        raise OptionError(f"{experiment} has no table of stages; give {' or '.join(TABLES)}")
    folder = output_dir.expanduser() / experiment
    others = [row for path in rows or [] for row in read_rows(path) if row.get("experiment") == experiment]
    network = open_network(chosen, source, lambda message: console.print(message, soft_wrap=True))
    dense = network.accuracy()
    measured: list[dict[str, Any]] = []
    for number in seed:

        def say(record: StageRecord, accuracy: float | None, number: int = number) -> None:
            shown = "" if accuracy is None else f", test accuracy {accuracy:.2f} %"
            console.print(
                f"seed {number}, stage {record.stage}: {record.kind} to {record.sparsity:.2%}, held-out loss "
                f"{record.loss_after:.4f}{shown}",
                soft_wrap=True,
                highlight=False,
            )

        path = StagedPath(network, number, folder)
        measured.extend(path.run(min(until, max(chosen.table.reported)), say))
        write_rows(folder / ROWS_FILE, measured)
        write_table(folder, chosen, measured, others, dense)
    console.print((folder / "table.md").read_text(), markup=False, highlight=False, soft_wrap=True)
