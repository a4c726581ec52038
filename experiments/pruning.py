"""From a trained network to a pruned one: gradients once per seed, then any solver, sparsity and update.

`cbs_opt.prune` does all of it in one call; a run has many rows which share the gradients, and several updates which
share a mask, so it puts the same pieces together itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from cbs_opt.calibration import CalibrationData, Forward
from cbs_opt.fisher import FisherBlocks, FisherOptions, build_blocks
from cbs_opt.gradients import GradientSample, sample_gradients
from cbs_opt.layers import PrunableLayers, find_layers
from cbs_opt.losses import LossMeter
from cbs_opt.update import Updated, update_weights
from experiments.datasets.images import ImageSet
from experiments.options import RunOptions
from solvers import Capability, SelectionProblem, Solution, make_solver, solve

#: Fewest training images of a calibration sample, where the training set has as many.
CALIBRATION_SAMPLES = 5_000


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network.

    Attributes
    ----------
    model
        On the run's device, in eval mode; pruned weights are exactly zero.
    n_kept
        Prunable weights which stay.
    solution
        How they were chosen.
    updated
        What became of them.
    """

    model: nn.Module
    n_kept: int
    solution: Solution
    updated: Updated


class Pruner:
    """The quadratic model of a network's loss at its dense weights, for one seed.

    Parameters
    ----------
    model
        Trained network on ``device`` in eval mode; it is not changed.
    train
        Training images; a sample of them, drawn with ``seed``, is all that is used.
    options
        Of the run.
    seed
        Of the calibration sample, of the rows drawn from it and of randomised solvers.
    progress
        Called with rows of gradients done and in all.
    """

    def __init__(self, model: nn.Module, train: ImageSet, options: RunOptions, seed: int, device: torch.device,
                 progress: Callable[[int, int], None] | None = None) -> None:
        self._model = model
        self._options = options
        self._seed = seed
        self.layers: PrunableLayers = layers_of(model, options)
        fisher = FisherOptions(n_rows=options.fisher_samples, batch_size=options.fisher_batch, damping=options.damping,
                               blocks=options.blocks, first_order=options.first_order, seed=seed)
        count = max(CALIBRATION_SAMPLES, options.fisher_samples * options.fisher_batch)
        x, y = train.sample(min(count, len(train)), seed).batch(slice(None))
        data = CalibrationData.read((x, y))
        forward = Forward(model, F.cross_entropy)
        rows = min(fisher.rows_for(data), data.n) if fisher.batch_size == 1 else fisher.rows_for(data)
        sample: GradientSample = sample_gradients(
            model, self.layers, data, forward, data.draw(rows, fisher.batch_size, seed), device=device,
            dtype=fisher.torch_dtype, method=fisher.gradient_method, progress=progress)
        self._weights = self.layers.read(model)
        self._fisher: FisherBlocks = build_blocks(sample, self._weights, self.layers, fisher, seed)
        self._meter = LossMeter(copy.deepcopy(model), self.layers, data, forward, device=device, seed=seed)
        self.seconds_gradients = sample.seconds
        self._chosen: tuple[tuple[str, int], SelectionProblem, Solution] | None = None

    @property
    def n(self) -> int:
        """Prunable weights."""
        return self.layers.n

    def prune(self, solver: str, n_kept: int, update: str) -> Pruned:
        """Choose the weights which go and update those which stay.

        Consecutive calls which differ only in the update choose once.
        """
        key = (solver, n_kept)
        if self._chosen is None or self._chosen[0] != key:
            self._chosen = (key, *self._choose(solver, n_kept))
        _, problem, solution = self._chosen
        updated = update_weights(problem, solution.pruned, update, scale=self._options.update_scale)
        model = copy.deepcopy(self._model)
        self.layers.write(model, self._fisher.partition.to_network(updated.weights))
        return Pruned(model, problem.n_kept, solution, updated)

    def _choose(self, solver: str, n_kept: int) -> tuple[SelectionProblem, Solution]:
        problem = SelectionProblem(list(self._fisher.blocks), self.n - n_kept,
                                   objective_of(solver, self._options.objective))
        solution = solve(problem, solver, time_limit=self._options.time_limit, seed=self._seed,
                         calibration_loss=self._loss, allocation=self._options.allocation)
        return problem, solution

    def _loss(self, pruned: npt.NDArray[np.bool_]) -> float:
        """Training loss of the network with a mask and no update, on at most 5,000 images."""
        where = torch.from_numpy(self._fisher.partition.to_network(pruned))
        return self._meter.of_weights(torch.where(where, 0.0, self._weights))


def layers_of(model: nn.Module, options: RunOptions) -> PrunableLayers:
    """The layers a run prunes."""
    return find_layers(model, include=options.include or ("*",), exclude=options.exclude)


def objective_of(solver: str, asked: str | None) -> str:
    """The objective asked for, else the selection objective where the solver can minimise it, else the joint one."""
    if asked is not None:
        return asked
    can = make_solver(solver).capabilities
    return "selection" if Capability.SELECTION in can else "joint"
