"""``python -m experiments.tables``: the literature's table beside ours, staged pruning without training.

One nested path of stages per seed (see `experiments.plans`). Everything is resumable: each stage is in a journal below
the output folder, and the same command goes on where it was interrupted. Rows of `experiments.run` may be shown beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cbs_opt import StageRecord, resolve_device
from experiments.catalog import get_experiment
from experiments.cli import run_app, wide_console
from experiments.datasets import load_dataset
from experiments.evaluation import evaluate
from experiments.networks import load_network
from experiments.plans import PLANS, get_plan
from experiments.staged_path import StagedPath
from experiments.table_report import read_rows, write_rows, write_table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROWS_FILE = "table.jsonl"


@app.command()
def main(
    experiment: Annotated[str, typer.Argument(help=f"One of {', '.join(PLANS)}.")],
    seed: Annotated[list[int], typer.Option(help="A path of stages for each.")] = [0, 1, 2, 3, 4],
    until: Annotated[float, typer.Option(help="Stop the path at this sparsity.")] = 1.0,
    data_dir: Annotated[Path | None, typer.Option(help="Folder which holds mnist/ and cifar10/.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained weights (safetensors).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rows: Annotated[list[Path] | None, typer.Option(help="results.jsonl of experiments.run, shown beside.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Gets table, plot, rows and journals.")] = Path("tables"),
) -> None:
    """Measure the table of an experiment, and write it as markdown and PNG."""
    plan, console = get_plan(experiment), wide_console()
    folder = output_dir.expanduser() / experiment
    chosen, where = get_experiment(experiment), resolve_device(device)
    others = [row for path in rows or [] for row in read_rows(path) if row.get("experiment") == experiment]
    dataset = load_dataset(chosen.dataset, data_dir)
    network = load_network(
        chosen,
        dataset,
        checkpoint=checkpoint,
        data_dir=data_dir,
        device=where,
        say=lambda message: console.print(message, soft_wrap=True),
    )
    dense = evaluate(network.model, dataset.test, device=where).accuracy
    measured: list[dict[str, Any]] = []
    for number in seed:
        path = StagedPath(plan, network.model, dataset, chosen.include or ("*",), chosen.exclude, where, number, folder)

        def say(record: StageRecord, accuracy: float | None, number: int = number) -> None:
            shown = "" if accuracy is None else f", test accuracy {accuracy:.2f} %"
            console.print(
                f"seed {number}, stage {record.stage}: {record.kind} to {record.sparsity:.2%}, held-out loss "
                f"{record.loss_after:.4f}{shown}",
                soft_wrap=True,
                highlight=False,
            )

        measured.extend(path.run(min(until, max(plan.reported)), say))
        write_rows(folder / ROWS_FILE, measured)
        write_table(folder, plan, measured, others, dense)
    console.print((folder / "table.md").read_text(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_app(app, several=("--seed", "--rows"))
