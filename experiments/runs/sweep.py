"""Carry out a run: every combination of a sweep on one network, a row of results each.

Masks are independent of one another, so they can be made in other processes, on a cluster too: there every process has
the network and the gradients to itself. Test data are looked at only to report a figure, after everything has been
decided.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import nn

from cbs_opt.engine.sensitivity import quick
from experiments.networks.load import Network
from experiments.runs.bench import Bench, Listener
from experiments.runs.options import RunOptions, Task
from experiments.runs.parallel import Call, completed
from experiments.runs.rows import ResultsFile, RowKeys, key_of, row_of
from solvers.errors import BackendError, CBSError

#: Seconds that updating and judging a mask may take beside three times its solver's limit, where one is kept.
_BESIDE = 900.0


class Sweep:
    """The rows of a run.

    Parameters
    ----------
    options
    results
        Rows which are there already are not made again.
    listener
    overwrite
        They are.
    network
        As for `Bench`.

    Raises
    ------
    CBSError
        As `Bench`.
    """

    def __init__(
        self,
        options: RunOptions,
        results: ResultsFile,
        listener: Listener,
        overwrite: bool = False,
        network: Network | None = None,
    ) -> None:
        self.options, self.results, self.listener, self.overwrite = options, results, listener, overwrite
        self.bench = Bench(options, results.folder, listener, network)
        self.weights = digest(self.bench.network.model)
        self.rows: list[dict[str, Any]] = []

    def run(self, workers: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows, those which are missing made; each is on disk when it is yielded.

        Parameters
        ----------
        workers
            Masks at a time, each made in a child process, see `completed`: a child that dies or hangs costs the rows of
            its mask, which say so. None is what ``joblib.parallel_config`` says; where that is one, all is done here.
        """
        here = workers is None and joblib.effective_n_jobs(None) == 1
        made = self._here if here else lambda masks: self._elsewhere(masks, workers)
        masks = []
        for _, tasks in groupby(self.bench.tasks, lambda task: (task.seed, task.solver, task.sparsity, task.budget)):
            missing = []
            for task in tasks:
                row = self._found(task)
                if row is None:
                    missing.append(task)
                else:
                    yield self._told(row, new=False)
            if missing:
                masks.append(missing)
        with closing(made(masks)) as outcomes:
            for task, figures in outcomes:
                settings = self.settings(task)
                row = row_of(settings, figures)
                self.results.append(row)
                # The stages' states have served: the row is on disk.
                shutil.rmtree(self.bench.journal(key_of(settings)), ignore_errors=True)
                if self.options.distill is not None and self.options.layerwise and not self.options.save_networks:
                    shutil.rmtree(self.bench.layer_rows.kept(self.keys(task)), ignore_errors=True)
                yield self._told(row, new=True)

    def found(self) -> Iterator[dict[str, Any]]:
        """The rows that are there."""
        for row in filter(None, map(self._found, self.bench.tasks)):
            yield self._told(row, new=False)

    def measure(self) -> None:
        """Fill the folder of gradients, and make no row."""
        for seed in self.options.sweep.seed:
            self.bench.prepared(seed)

    def reference(self) -> dict[float, float]:
        """The metric by sparsity of plain magnitude pruning without update; empty where the run has it as rows."""
        if any(row["solver"] == "magnitude" and row["update"] == "none" for row in self.rows):
            return {}
        self.listener.working("magnitude, for comparison", 0, 0)
        network, layers = self.bench.network, self.bench.layers
        weights = layers.read(network.model)
        order = weights.abs().argsort(descending=True, stable=True)
        model = copy.deepcopy(network.model)
        points = {}
        for sparsity in dict.fromkeys(task.sparsity for task in self.bench.tasks):
            kept = order[: self.options.choice.sparsity_rounding.n_kept(layers.n, sparsity)]
            pruned = torch.zeros_like(weights)
            pruned[kept] = weights[kept]
            layers.write(model, pruned)
            points[sparsity] = network.score(model)
        return points

    def settings(self, task: Task) -> dict[str, Any]:
        """Everything which decides what a row shows; rows of equal settings are the same measurement.

        ``weights`` is a digest of the dense network's, ``device`` its type: a GPU rounds differently.
        """
        o = self.options
        setup, choice = o.setup(task.seed), o.choice_of(task)
        extra = {"include": list(o.network.include or o.experiment.include), "exclude": list(setup.exclude)}
        if o.layerwise:
            extra["curvature"], extra["layer_damping"] = setup.curvature, o.curvature.damping
            for name in ("in_order", "towards_dense"):
                if value := getattr(o.curvature, name):
                    extra[name] = value
        if task.budget:
            extra["budget"] = str(choice.budget or task.budget)
        if choice.min_kept is not None:
            extra["min_kept"] = choice.min_kept
        if choice.batch_norm != "keep":
            extra["batch_norm"] = choice.batch_norm
        if choice.distill is not None:
            extra["distill"] = asdict(choice.distill)
        if choice.finetune is not None:
            extra["finetune"] = {**asdict(choice.finetune)}
        solver = task.solver
        if o.sweep.masks:
            solver = Path(task.solver).stem
            extra["masks"] = hashlib.sha256(Path(task.solver).read_bytes()).hexdigest()[:16]
        return {
            "experiment": o.experiment.name,
            "solver": solver,
            "update": task.update,
            "update_scale": task.update_scale,
            "sparsity": task.sparsity,
            "sparsity_rounding": o.choice.sparsity_rounding.value,
            "seed": task.seed,
            "objective_kind": choice.goal(o.staged).value,
            "fisher_samples": o.fisher.n_rows,
            "fisher_batch": o.fisher.batch_size,
            "row_sampling": o.fisher.row_sampling,
            "damping": o.fisher.ridge,
            "blocks": str(o.fisher.blocks),
            "first_order": o.fisher.first_order,
            "stages": o.choice.stages,
            "allocation": o.choice.allocation,
            "time_limit": choice.time_limit,
            "weights": self.weights,
            "device": setup.place.type,
            "extra": extra,
        }

    def keys(self, task: Task) -> RowKeys:
        """What names the files of a row."""
        settings = self.settings(task)
        extra = {name: value for name, value in settings["extra"].items() if name != "distill"}
        plain = {**settings, "extra": extra}
        asks = quick(self.options.choice_of(task), self.bench.layers.n)
        free = ("solver", "update", "update_scale", "objective_kind", "time_limit")
        shares = {name: value for name, value in plain.items() if name not in free}
        shares |= {"solver": asks.solver.spec, "update": asks.update.value}
        return RowKeys(key_of(settings), key_of(plain), key_of(shares))

    def _found(self, task: Task) -> dict[str, Any] | None:
        """The row of a task, if it is there with everything that is asked for."""
        row = None if self.overwrite else self.results.find(key_of(self.settings(task)))
        choice = self.options.choice
        asked = {
            "refit_objective": self.options.refit,
            "bound": choice.bound is not None,
            "operations_small": choice.shrink,
        }
        return None if row is None or any(row.get(name) is None for name, wanted in asked.items() if wanted) else row

    def _told(self, row: dict[str, Any], *, new: bool) -> dict[str, Any]:
        self.rows.append(row)
        self.listener.finished(row, new)
        return row

    def _here(self, masks: Sequence[Sequence[Task]]) -> Iterator[tuple[Task, dict[str, Any]]]:
        for task in (task for tasks in masks for task in tasks):
            if self.overwrite and self.options.staged:
                shutil.rmtree(self.bench.journal(key_of(self.settings(task))), ignore_errors=True)
            yield task, _measured(self.bench, task, self.keys(task))

    def _elsewhere(self, masks: Sequence[Sequence[Task]], workers: int | None) -> Iterator[tuple[Task, dict[str, Any]]]:
        options, folder = self.options, self.results.folder.resolve()
        if options.curvature.gradients is not None:
            # Kept on disk before the children want them.
            self.measure()
        threads = max(joblib.cpu_count() // joblib.effective_n_jobs(workers), 1)
        limit = None if options.choice.time_limit is None else 3.0 * options.choice.time_limit + _BESIDE
        calls = []
        for tasks in masks:
            named = [(task, self.keys(task)) for task in tasks]
            before = Call(_prepare, (options, folder, tasks[0].seed, threads))
            calls.append(Call(_measure, (options, folder, named), limit, before))
        for at, outcome in completed(calls, workers):
            if isinstance(outcome, CBSError):
                if not isinstance(outcome, BackendError):
                    raise outcome
                outcome = [_failed(outcome)] * len(masks[at])
            yield from zip(masks[at], outcome, strict=True)


def _measured(bench: Bench, task: Task, keys: RowKeys) -> dict[str, Any]:
    """The figures of a row, or why its solver failed."""
    try:
        return bench.measure(task, keys)
    except BackendError as error:
        return _failed(error)


def _failed(error: CBSError) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"}


@lru_cache(maxsize=1)
def _bench(options: RunOptions, folder: Path) -> Bench:
    return Bench(options, folder)


def _prepare(options: RunOptions, folder: Path, seed: int, threads: int) -> None:
    """In a child: load and measure what its masks share."""
    torch.set_num_threads(threads)
    bench = _bench(options, folder)
    if not options.staged:
        bench.prepared(seed)


def _measure(options: RunOptions, folder: Path, tasks: Sequence[tuple[Task, RowKeys]]) -> list[dict[str, Any]]:
    """In a child: the rows of a mask."""
    return [_measured(_bench(options, folder), task, keys) for task, keys in tasks]


def digest(model: nn.Module) -> str:
    """Digest of a network's state."""
    stamp = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        stamp.update(key.encode())
        stamp.update(value.detach().cpu().contiguous().numpy().tobytes())
    return stamp.hexdigest()[:16]
