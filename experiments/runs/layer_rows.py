"""Rows of networks that are pruned layer by layer. What took long is kept for other rows that want the same.

``shares/KEY.json``: what each layer loses, where the network was asked; all methods that ask in the same way share it.
``networks/KEY/``: a pruned network (`PruneResult.save`) with the figures of its row; distilling goes on from there.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import cbs_opt
from cbs_opt.engine.choice import BEST, MEASURED
from cbs_opt.engine.distil_pruned import distil_pruned
from cbs_opt.engine.layer_network import Judging
from cbs_opt.engine.layerwise import find_shares, prune_layerwise
from cbs_opt.engine.shares import Shares
from cbs_opt.measure.costs import Split
from experiments.networks.load import Network
from experiments.runs.options import RunOptions, Task
from experiments.runs.rows import RowKeys
from solvers.errors import OutputError
from solvers.files import write_atomically

#: Of the row, beside its network.
FIGURES = "figures.json"


class LayerRows:
    """Makes such rows.

    Parameters
    ----------
    options, folder, network, layers
        As of the bench.
    data
        Seed → calibration data.
    working
        Told of what is under way, and gives what is told how far it is.
    figures
        Of a result.
    """

    def __init__(
        self,
        options: RunOptions,
        folder: Path,
        network: Network,
        layers: cbs_opt.PrunableLayers,
        data: Callable[[int], Any],
        working: Callable[[str], Callable[[int, int], None]],
        figures: Callable[[cbs_opt.PruneResult], dict[str, Any]],
    ) -> None:
        self.options, self.folder, self.network, self.layers = options, folder, network, layers
        self.data, self.working, self.figures = data, working, figures

    def measure(self, task: Task, keys: RowKeys) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures and masks of a row."""
        options = self.options
        path = self.kept(keys)
        found = None if options.distill is None else self._load(path)
        figures, result = found or self._pruned(task, keys)
        if found is None and (options.distill is not None or options.save_networks):
            self._save(path, result, figures)
        if options.distill is not None:
            figures = self._distilled(task, result.model, figures)
        return figures, result.masks

    def kept(self, keys: RowKeys) -> Path:
        """Where the network of a row is kept."""
        return self.folder / "networks" / keys.undistilled

    def _pruned(self, task: Task, keys: RowKeys) -> tuple[dict[str, Any], cbs_opt.PruneResult]:
        model, loss, setup = self.network.model, self._loss, self.options.setup(task.seed)
        choice = replace(self.options.choice_of(task, self.layers.n), distill=None)
        what = str(task)
        shares, figures = self._shares(task, keys, choice, f"{what}, shares")
        progress = self.working(f"{what}, layers")
        judging = Judging(self.options.refit, self.options.choice.bound)
        result = prune_layerwise(model, self.data(task.seed), loss, setup, choice, progress, shares, judging)
        return {**self.figures(result), **figures}, result

    def _shares(
        self, task: Task, keys: RowKeys, choice: cbs_opt.Choice, what: str
    ) -> tuple[Shares | None, dict[str, Any]]:
        """Those found before, or now, and what the row says of them; None where nothing is to be found."""
        asks = choice.allocation in (BEST, MEASURED) or isinstance(choice.allocation, tuple)
        if not asks:
            return None, {}
        path = self.folder / "shares" / f"{keys.shares}.json"
        if not path.exists():
            started, progress = time.perf_counter(), self.working(what)
            setup = self.options.setup(task.seed)
            found = find_shares(self.network.model, self.data(task.seed), self._loss, setup, choice, progress)
            about = {
                "rule": found.rule,
                "seconds": time.perf_counter() - started,
                "candidates": [asdict(candidate) for candidate in found.candidates],
                "notes": found.notes,
                "split": None if found.split is None else asdict(found.split),
                "pruned": dict(zip(self.layers.names, found.counts.tolist(), strict=True)),
            }
            _write(path, json.dumps(about, indent=1))
        about = json.loads(path.read_text())
        counts = np.array([about["pruned"][name] for name in self.layers.names], dtype=np.int64)
        candidates = tuple(cbs_opt.Candidate(**candidate) for candidate in about["candidates"])
        split = Split(**about["split"]) if about.get("split") else None
        shares = Shares(counts, about["rule"], None, candidates, tuple(about["notes"]), split)
        return shares, {"shares": shares.rule, "seconds_shares": about["seconds"]}

    def _distilled(self, task: Task, model: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        assert self.options.distill is not None
        network, metric = self.network, self.network.experiment.criterion.metric.name
        done = distil_pruned(
            model,
            network.model,
            self.data(task.seed),
            self._loss,
            self.options.setup(task.seed),
            self.options.distill,
            self.working(f"{task}, distillation"),
        )
        return {
            # With old batch norms there is but the network before.
            **{name: value for name, value in figures.items() if name != f"{metric}_old_norms"},
            metric: network.score(done.model.to(network.device).eval()),
            f"{metric}_undistilled": figures[metric],
            "train_loss": done.loss,
            "train_loss_undistilled": figures["train_loss"],
            "repairs": (*figures["repairs"], *done.record.notes),
            **distil_figures(done.record),
        }

    @property
    def _loss(self) -> Any:
        return self.network.experiment.criterion.loss

    def _save(self, folder: Path, result: cbs_opt.PruneResult, figures: dict[str, Any]) -> None:
        result.save(folder)
        # Last, so that a folder that has it is whole.
        _write(folder / FIGURES, json.dumps(figures))

    def _load(self, folder: Path) -> tuple[dict[str, Any], cbs_opt.PruneResult] | None:
        """What `_save` has kept, if it has."""
        if not (folder / FIGURES).exists():
            return None
        figures = json.loads((folder / FIGURES).read_text())
        return figures, cbs_opt.load(folder, copy.deepcopy(self.network.model))


def distil_figures(done: cbs_opt.DistillRecord) -> dict[str, Any]:
    """What a row says of a distillation."""
    names = ("loss_before", "loss_after", "steps_kept", "lr", "n_samples", "n_held_out")
    return {"seconds_distill": done.seconds, **{f"distill_{name}": getattr(done, name) for name in names}}


def _write(path: Path, text: str) -> None:
    """A file that is whole or not there; raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
