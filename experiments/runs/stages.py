"""The path of stages of one seed: through every sparsity of a table, most sparse last (see `StagedTable`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import cbs_opt
from cbs_opt import StageRecord
from cbs_opt.engine.journal import Journal, StageState
from cbs_opt.engine.stages import run_stages
from cbs_opt.network.batch_norm import restore_statistics
from experiments.datasets.augmentation import CropAndFlip
from experiments.networks import ImageExperiment, Network
from experiments.networks.experiment import StagedTable
from experiments.runs.rows import versions
from solvers.errors import OptionError

#: Called with the record of a stage, and the test accuracy where it is one of the table's.
Say = Callable[[StageRecord, "float | None"], None]


class _LowPrecision(cbs_opt.Forward):
    """The network in bfloat16, which halves the time of convolutions on processors that have it."""

    def output(self, call: Any, inputs: Any, targets: Any) -> Any:
        """Logits in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits = super().output(call, inputs, targets)
        return logits.float()


class StagedPath:
    """The path of one seed.

    Parameters
    ----------
    network
        Of an experiment with a table; each path works on a copy, and sees training images for everything but the
        reported accuracy.
    seed
    folder
        Journals go below it.

    Raises
    ------
    OptionError
        The experiment has no table.
    """

    def __init__(self, network: Network, seed: int, folder: Path) -> None:
        experiment, train = network.experiment, network.dataset.train
        if not isinstance(experiment, ImageExperiment) or not isinstance(experiment.table, StagedTable):
            raise OptionError(f"{experiment.name} has no table of stages; give another experiment")
        self.network, self.table, self.staged = network, experiment.table, experiment.staged
        self.seed, self.folder = seed, folder
        self.model = copy.deepcopy(network.model).eval()
        if train.images.shape[1] > 1:
            # Convolutions of small images run about twice as fast with channels last on a CPU.
            self.model = self.model.to(memory_format=torch.channels_last)
        self.dense = copy.deepcopy(self.model)
        setup = cbs_opt.Setup(
            fisher=self.staged.fisher,
            include=experiment.include or ("*",),
            exclude=experiment.exclude,
            device=network.device,
            seed=seed,
        )
        self.workspace = cbs_opt.Workspace(
            self.model,
            cbs_opt.find_layers(self.model, include=setup.include, exclude=setup.exclude),
            cbs_opt.CalibrationData(*train.batch(slice(None)), len(train)),
            (_LowPrecision if self.table.bfloat16 else cbs_opt.Forward)(self.model, F.cross_entropy),
            setup,
        )
        self.augment = CropAndFlip.of(train) if experiment.recipe.augment else None

    def run(self, until: float, say: Say) -> list[dict[str, Any]]:
        """All stages up to a sparsity; one row per sparsity of the table."""
        start: StageState | None = None
        rows: list[dict[str, Any]] = []
        past: list[StageRecord] = []
        layers = self.workspace.layers
        for position, phase in enumerate(self.table.phases):
            levels = tuple(level for level in phase.sparsities if level <= until)
            if not levels:
                break
            # The final level is listed by the number of stages at it, as `levels` leaves the target's own entries out.
            polish = sum(level == levels[-1] for level in levels) - 1
            options = replace(
                self.staged.options, levels=levels, n_polish=polish, regrow=phase.regrow, augment=self.augment
            )
            choice = cbs_opt.Choice(n_kept=layers.n_kept(levels[-1]), solver=self.table.solver)
            n_start = None if start is None else start.n_kept
            journal = self.folder / "journals" / f"seed-{self.seed}-phase-{position}-{len(levels)}"
            run = run_stages(
                self.workspace,
                choice,
                cbs_opt.Plan.staged(options, n=layers.n, n_kept=choice.kept(layers.n), n_start=n_start),
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
        say: Say,
    ) -> list[dict[str, Any]]:
        """A row for the last state at each reported sparsity."""
        book = Journal.open(journal)
        layers = self.workspace.layers
        found = []
        for sparsity in self.table.reported:
            kept = layers.n_kept(sparsity)
            at = [i for i, record in enumerate(records) if record.n_kept == kept]
            if sparsity not in levels or not at:
                continue
            state = book.state(at[-1])
            layers.write(self.model, state.weights)
            restore_statistics(self.model, state.statistics)
            accuracy = self.network.score(self.model)
            done = [*past, *records[: at[-1] + 1]]
            say(records[at[-1]], accuracy)
            found.append(
                {
                    "experiment": self.network.experiment.name,
                    "solver": self.table.solver,
                    "update": "combinatorial",
                    "sparsity": sparsity,
                    "seed": self.seed,
                    "n_weights": layers.n,
                    "n_kept": state.n_kept,
                    "accuracy": accuracy,
                    "held_out_loss": records[at[-1]].loss_after,
                    "stages": len(done),
                    "images": sum(r.n_images for r in done),
                    "seconds_gradients": sum(r.seconds_gradients for r in done),
                    "seconds_solve": sum(r.seconds_solve for r in done),
                    "seconds_update": sum(r.seconds_update + r.seconds_batch_norm for r in done),
                    "device": self.network.device.type,
                    "threads": torch.get_num_threads(),
                    "versions": versions(),
                }
            )
        return found
