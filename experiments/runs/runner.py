"""Carry out a run: solvers x sparsities x seeds x updates on one network, a row of results each.

Gradients are computed once per seed and serve every solver and sparsity. Test data are looked at only to report an
accuracy, after everything has been decided.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.datasets import Dataset, load_dataset
from experiments.datasets.parquet import SOURCES
from experiments.networks.evaluation import Evaluation, evaluate
from experiments.networks.load import Network, load_network
from experiments.runs.options import RunOptions
from experiments.runs.pruning import Pruned, Pruner, check_solvers, layers_of, objective_of, prune_in_stages
from experiments.runs.rows import Measured, ResultsFile, Settings, row_of


@dataclass(frozen=True)
class Task:
    """One row to be made."""

    solver: str
    sparsity: float
    seed: int
    update: str


@dataclass(frozen=True)
class Listener:
    """Who is told of what happens: a line of text, work begun and how far it is, a finished row and if it is new."""

    say: Callable[[str], None]
    working: Callable[[str, int, int], None]
    finished: Callable[[Mapping[str, Any], bool], None]


class Runner:
    """Everything a run needs, loaded and checked.

    Parameters
    ----------
    options
    results
        Rows which are there already are not made again.
    device
    listener

    Raises
    ------
    CBSError
        Data, checkpoint or layers are missing or bad; nothing has been pruned by then.
    """

    def __init__(self, options: RunOptions, results: ResultsFile, device: torch.device, listener: Listener) -> None:
        self.options = options
        self.results = results
        self.device = device
        self.listener = listener
        experiment = options.experiment
        listener.working("loading data", 0, 0)
        if options.data_dir is None and experiment.dataset in SOURCES:
            listener.say(f"no --data-dir: asking the Hugging Face hub for {SOURCES[experiment.dataset].repository}")
        self.dataset: Dataset = load_dataset(experiment.dataset, options.data_dir)
        listener.say(f"data: {self.dataset.source}")
        self.network: Network = load_network(
            experiment,
            self.dataset,
            checkpoint=options.checkpoint,
            data_dir=options.data_dir,
            device=device,
            say=listener.say,
        )
        self.weights = digest(self.network.model)
        check_solvers(layers_of(self.network.model, options), options)
        listener.working("evaluating the dense network", 0, 0)
        self.dense: Evaluation = evaluate(self.network.model, self.dataset.test, device=device)
        listener.say(f"dense network: test accuracy {self.dense.accuracy:.2f} %, {self.dense.n_samples:,} images")
        self.rows: list[dict[str, Any]] = []
        self._pruner: Pruner | None = None

    def run(self) -> Iterator[dict[str, Any]]:
        """Make the rows which are missing; each is on disk when it is yielded. Old rows are yielded as they are."""
        # The combinatorial update yields the refit objective of a mask, which the others of that mask then share.
        updates = sorted(self.options.updates, key=lambda update: update != "combinatorial")
        for seed in self.options.seeds:
            # A gradient matrix can take gigabytes: it is made when first needed and let go with the seed.
            self._pruner = None
            for solver in self.options.solvers:
                for sparsity in self.options.sparsities:
                    for update in updates:
                        yield self._row(Task(solver, sparsity, seed, update))
        self._pruner = None

    def _row(self, task: Task) -> dict[str, Any]:
        settings = self.settings(task)
        row = None if self.options.overwrite else self.results.find(settings)
        if row is not None and row["refit_objective"] is None and self.options.refit:
            row = None
        if row is not None and row["bound"] is None and self.options.bound is not None:
            row = None
        new = row is None
        if row is None:
            row = row_of(settings, self.measure(task))
            self.results.append(row)
            # The stages' states have served: the row is on disk.
            shutil.rmtree(self._journal(settings), ignore_errors=True)
        self.rows.append(row)
        self.listener.finished(row, new)
        return row

    def reference(self) -> dict[float, float]:
        """Accuracy by sparsity of plain magnitude pruning without update; empty where the run has it as rows."""
        if any(row["solver"] == "magnitude" and row["update"] == "none" for row in self.rows):
            return {}
        self.listener.working("magnitude, for comparison", 0, 0)
        layers = layers_of(self.network.model, self.options)
        weights = layers.read(self.network.model)
        order = weights.abs().argsort(descending=True, stable=True)
        model = copy.deepcopy(self.network.model)
        points = {}
        for sparsity in self.options.sparsities:
            kept = order[: self.n_kept(layers.n, sparsity)]
            pruned = torch.zeros_like(weights)
            pruned[kept] = weights[kept]
            layers.write(model, pruned)
            points[sparsity] = evaluate(model, self.dataset.test, device=self.device).accuracy
        return points

    def measure(self, task: Task) -> Measured:
        """Make one row."""
        pruned = self.prune(task)
        test = evaluate(pruned.model, self.dataset.test, device=self.device)
        return Measured(
            n_weights=pruned.n,
            n_kept=pruned.n_kept,
            accuracy=test.accuracy,
            train_loss=pruned.train_loss,
            dense_accuracy=self.dense.accuracy,
            objective=pruned.objective,
            refit_objective=pruned.refit_objective,
            bound=pruned.bound,
            gap=pruned.gap,
            status=pruned.status,
            seconds_gradients=pruned.seconds_gradients,
            seconds_solve=pruned.seconds_solve,
            seconds_update=pruned.seconds_update,
            repairs=pruned.repairs,
        )

    def prune(self, task: Task) -> Pruned:
        """The pruned network of a row."""
        what = f"{task.solver}, sparsity {task.sparsity:g}, seed {task.seed}"
        model, train = self.network.model, self.dataset.train
        if self.options.stages > 1:
            n_kept = self.n_kept(layers_of(model, self.options).n, task.sparsity)
            journal = self._journal(self.settings(task))
            if self.options.overwrite:
                shutil.rmtree(journal, ignore_errors=True)
            return prune_in_stages(
                model,
                train,
                self.options,
                task.seed,
                self.device,
                task.solver,
                n_kept,
                journal,
                progress=self._progress(f"{what}, stages"),
            )
        if self._pruner is None:
            gradients = f"gradients, seed {task.seed}"
            pruner = Pruner(model, train, self.options, task.seed, self.device, progress=self._progress(gradients))
            self.listener.say(
                f"{gradients}: {self.options.fisher_samples:,} of {self.options.fisher_batch} for "
                f"{pruner.n:,} weights in {pruner.seconds_gradients:.1f} s"
            )
            self._pruner = pruner
        self.listener.working(what, 0, 0)
        return self._pruner.prune(task.solver, self.n_kept(self._pruner.n, task.sparsity), task.update)

    def _journal(self, settings: Settings) -> Path:
        """Where the stages of a row leave their states until it is finished."""
        return self.results.folder / "journals" / settings.key

    def _progress(self, what: str) -> Callable[[int, int], None]:
        self.listener.working(what, 0, 0)
        return lambda done, total: self.listener.working(what, done, total)

    def n_kept(self, n: int, sparsity: float) -> int:
        """Weights which stay of ``n``."""
        return self.options.rounding.n_kept(n, sparsity)

    def settings(self, task: Task) -> Settings:
        """What identifies a task's row."""
        o = self.options
        return Settings(
            experiment=o.experiment.name,
            solver=task.solver,
            update=task.update,
            update_scale=o.update_scale,
            sparsity=task.sparsity,
            sparsity_rounding=o.rounding.value,
            seed=task.seed,
            objective_kind=objective_of(task.solver, o),
            fisher_samples=o.fisher_samples,
            fisher_batch=o.fisher_batch,
            damping=o.damping,
            blocks=o.blocks,
            first_order=o.first_order,
            stages=o.stages,
            allocation=o.allocation,
            time_limit=o.time_limit,
            weights=self.weights,
            device=self.device.type,
            extra={"include": list(o.include), "exclude": list(o.exclude)},
        )


def digest(model: nn.Module) -> str:
    """Digest of a network's state."""
    stamp = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        stamp.update(key.encode())
        stamp.update(value.detach().cpu().contiguous().numpy().tobytes())
    return stamp.hexdigest()[:16]
