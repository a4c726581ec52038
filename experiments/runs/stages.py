"""The path of stages of one seed: through every sparsity of a table, most sparse last (see `StagedTable`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import CalibrationData, Choice, Forward, Setup, StageRecord, Workspace, find_layers
from cbs_opt.engine.journal import Journal, StageState
from cbs_opt.engine.stages import run_stages
from cbs_opt.network.batch_norm import restore_statistics
from cbs_opt.network.layers import PrunableLayers
from experiments.datasets.augmentation import CropAndFlip
from experiments.datasets.images import Dataset
from experiments.networks.evaluation import evaluate
from experiments.networks.experiment import Experiment
from experiments.runs.rows import versions
from solvers.errors import OptionError


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
    experiment
        One with a table.
    model
        Trained network in eval mode; each path works on a copy.
    dataset
        Training images for everything but the reported accuracy.
    folder
        Journals go below it.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: nn.Module,
        dataset: Dataset,
        device: torch.device,
        seed: int,
        folder: Path,
    ) -> None:
        if experiment.table is None:
            raise OptionError(f"{experiment.name} has no table; give another experiment")
        self.experiment, self.table, self.dataset = experiment, experiment.table, dataset
        self.device, self.seed, self.folder = device, seed, folder
        self.model = copy.deepcopy(model).eval()
        if dataset.train.images.shape[1] > 1:
            # Convolutions of small images run about twice as fast with channels last on a CPU.
            self.model = self.model.to(memory_format=torch.channels_last)
        self.dense = copy.deepcopy(self.model)
        self.layers: PrunableLayers = find_layers(
            self.model, include=experiment.include or ("*",), exclude=experiment.exclude
        )
        self.forward = (_LowPrecision if self.table.bfloat16 else Forward)(self.model, F.cross_entropy)
        train = dataset.train
        self.data = CalibrationData(*train.batch(slice(None)), len(train))
        self.augment = CropAndFlip.of(train) if experiment.recipe.augment else None

    def run(self, until: float, say: Any) -> list[dict[str, Any]]:
        """All stages up to a sparsity; one row per sparsity of the table."""
        start: StageState | None = None
        rows: list[dict[str, Any]] = []
        past: list[StageRecord] = []
        for position, phase in enumerate(self.table.phases):
            levels = tuple(level for level in phase.sparsities if level <= until)
            if not levels:
                break
            last = self.layers.n_kept(levels[-1])
            # The final level is listed by the number of stages at it, as `levels` leaves the target's own entries out.
            polish = sum(level == levels[-1] for level in levels) - 1
            options = replace(
                self.experiment.staged.options,
                levels=levels,
                n_polish=polish,
                regrow=phase.regrow,
                augment=self.augment,
            )
            journal = self.folder / "journals" / f"seed-{self.seed}-phase-{position}-{len(levels)}"
            setup = Setup(fisher=self.experiment.staged.fisher, device=self.device, seed=self.seed)
            workspace = Workspace(self.model, self.layers, self.data, self.forward, setup)
            n_start = None if start is None else start.n_kept
            run = run_stages(
                workspace,
                Choice(n_kept=last, solver=self.table.solver),
                cbs_opt.Plan.staged(options, n=self.layers.n, n_kept=last, n_start=n_start),
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
        for sparsity in self.table.reported:
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
                    "experiment": self.experiment.name,
                    "solver": self.table.solver,
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
