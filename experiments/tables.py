"""``python -m experiments.tables``: the literature's table beside ours, staged pruning without training.

One nested path of stages per seed (see `experiments.plans`). Everything is resumable: each stage is in a journal below
the output folder, and the same command goes on where it was interrupted. Rows of `experiments.run` may be shown beside.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional as F

from cbs_opt import CalibrationData, Forward, StageRecord, find_layers, resolve_device
from cbs_opt.batch_norm import restore_statistics
from cbs_opt.journal import Journal, StageState
from cbs_opt.layers import PrunableLayers
from cbs_opt.stages import run_stages
from experiments.augmentation import CropAndFlip
from experiments.cache import write_atomically
from experiments.catalog import get_experiment
from experiments.cli import run_app, wide_console
from experiments.datasets import load_dataset
from experiments.datasets.images import Dataset
from experiments.evaluation import evaluate
from experiments.literature import NAMES, columns
from experiments.networks import load_network
from experiments.plans import PLANS, Plan, get_plan
from experiments.plots import Series, mean_and_error, plot_accuracy, series_of
from experiments.results import versions
from solvers.errors import DataError, OutputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
OURS = "ours (staged)"
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


class _LowPrecision(Forward):
    """The network in bfloat16, which halves the time of convolutions on processors that have it."""

    def output(self, call: Any, inputs: Any, targets: Any) -> Any:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits = super().output(call, inputs, targets)
        return logits.float()


class StagedPath:
    """The path of one seed.

    Parameters
    ----------
    plan
    model
        Trained network in eval mode; each path works on a copy.
    dataset
        Training images for everything but the reported accuracy.
    include, exclude
        Which layers.
    folder
        Journals go below it.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        dataset: Dataset,
        include: Sequence[str],
        exclude: Sequence[str],
        device: torch.device,
        seed: int,
        folder: Path,
    ) -> None:
        import copy

        self.plan, self.dataset, self.device, self.seed, self.folder = plan, dataset, device, seed, folder
        self.model = copy.deepcopy(model).eval()
        if dataset.train.images.shape[1] > 1:
            # Convolutions of small images run about twice as fast with channels last on a CPU.
            self.model = self.model.to(memory_format=torch.channels_last)
        self.dense = copy.deepcopy(self.model)
        self.layers: PrunableLayers = find_layers(self.model, include=include, exclude=exclude)
        self.forward = (_LowPrecision if plan.bfloat16 else Forward)(self.model, F.cross_entropy)
        train = dataset.train
        self.data = CalibrationData(*train.batch(slice(None)), len(train))
        self.augment = CropAndFlip.of(train) if plan.augment else None

    def run(self, until: float, say: Any) -> list[dict[str, Any]]:
        """All stages up to a sparsity; one row per sparsity of the table."""
        start: StageState | None = None
        rows: list[dict[str, Any]] = []
        past: list[StageRecord] = []
        for position, phase in enumerate(self.plan.phases):
            levels = tuple(level for level in phase.sparsities if level <= until)
            if not levels:
                break
            last = self.layers.n_kept(levels[-1])
            # The final level is listed by the number of stages at it, as `levels` leaves the target's own entries out.
            polish = sum(level == levels[-1] for level in levels) - 1
            options = replace(
                self.plan.stages, levels=levels, n_polish=polish, regrow=phase.regrow, augment=self.augment
            )
            journal = self.folder / "journals" / f"seed-{self.seed}-phase-{position}-{len(levels)}"
            fisher = replace(self.plan.fisher, n_rows=phase.n_rows or self.plan.fisher.n_rows)
            run = run_stages(
                self.model,
                self.layers,
                self.data,
                self.forward,
                n_kept=last,
                solver=self.plan.solver,
                options=options,
                fisher=fisher,
                device=self.device,
                seed=self.seed,
                start=start,
                teacher=self.dense,
                journal=journal,
                progress=lambda record, _: say(record, None),
            )
            rows.extend(self._rows(journal, run.records, past, levels, say))
            past.extend(run.records)
            start = run.state
        return rows

    def _rows(
        self,
        journal: Path,
        records: Sequence[StageRecord],
        past: Sequence[StageRecord],
        levels: Sequence[float],
        say: Any,
    ) -> list[dict[str, Any]]:
        """A row for the last state at each reported sparsity."""
        book = Journal.open(journal)
        found = []
        for sparsity in self.plan.reported:
            kept = self.layers.n_kept(sparsity)
            at = [i for i, record in enumerate(records) if record.n_kept == kept]
            if sparsity not in levels or not at:
                continue
            state = book.state(at[-1])
            self.layers.write(self.model, state.weights)
            restore_statistics(self.model, state.statistics)
            test = evaluate(self.model, self.dataset.test, device=self.device)
            done = [*past, *records[: at[-1] + 1]]
            say(records[at[-1]], test.accuracy)
            found.append(
                {
                    "experiment": self.plan.experiment,
                    "solver": self.plan.solver,
                    "update": "combinatorial",
                    "sparsity": sparsity,
                    "seed": self.seed,
                    "n_weights": self.layers.n,
                    "n_kept": state.n_kept,
                    "accuracy": test.accuracy,
                    "held_out_loss": records[at[-1]].loss_after,
                    "stages": len(done),
                    "images": sum(r.n_images for r in done),
                    "seconds_gradients": sum(r.seconds_gradients for r in done),
                    "seconds_solve": sum(r.seconds_solve for r in done),
                    "seconds_update": sum(r.seconds_update + r.seconds_batch_norm for r in done),
                    "device": self.device.type,
                    "threads": torch.get_num_threads(),
                    "versions": versions(),
                }
            )
        return found


def write_table(
    folder: Path, plan: Plan, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], dense: float
) -> None:
    """``table.md`` and ``table.png`` from the rows."""
    quoted = columns(plan.experiment)
    measured = [*series_of(others), Series(OURS, _points(rows))]
    text = [f"# {plan.experiment}: test accuracy (%), no training", ""]
    heads = ["sparsity", *quoted, *(s.label for s in measured), "stages", "gradients + solve + update (s)"]
    text += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for sparsity in plan.reported:
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
        f"Ours: `{plan.solver}`, {plan.fisher.n_rows} rows of {plan.fisher.batch_size} training images per stage, "
        f"λ = {plan.fisher.damping:g} for the choice, searched for the step on {plan.stages.held_out} training "
        "images that no gradient sees. One nested path per seed: stages and seconds (wall, of this machine as it was) "
        "are those from the dense network on.",
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
    plot_accuracy(folder / "table.png", f"{plan.experiment}: pruning without training", [*measured, *lines], dense)


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


if __name__ == "__main__":
    run_app(app, several=("--seed", "--rows"))
