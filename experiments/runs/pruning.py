"""From a trained network to a pruned one: gradients once per seed, then any solver, sparsity and update.

`cbs_opt.prune` does all of it in one call. The rows of a run share gradients, and several updates share a mask, so a
run takes the steps of `cbs_opt.Prepared` one by one; only stages, which share nothing, go through `cbs_opt.prune`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
import solvers
from cbs_opt.measure.blocks import contiguous_partition
from experiments.datasets.augmentation import CropAndFlip
from experiments.datasets.images import ImageSet
from experiments.runs.options import RunOptions
from solvers import QuadraticBlock, SelectionProblem, Solution, make_solver
from solvers.running import check_capabilities
from solvers.verify import certify

#: Fewest training images of a calibration sample, where the training set has as many.
CALIBRATION_SAMPLES = 5_000
#: Images whose gradients a stage may want beyond those of one row each.
STAGE_SAMPLES = 20_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network and what was found out about it; figures as in `experiments.runs.rows.Measured`."""

    model: nn.Module
    n: int
    n_kept: int
    train_loss: float
    objective: float
    refit_objective: float
    bound: float
    gap: float
    status: str
    seconds_gradients: float
    seconds_solve: float
    seconds_update: float
    repairs: tuple[str, ...]


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
        Of the calibration sample, of the rows drawn from it, and of randomised solvers.
    device
    progress
        Called with rows of gradients done and in all.
    """

    def __init__(
        self,
        model: nn.Module,
        train: ImageSet,
        options: RunOptions,
        seed: int,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._options = model, options
        self._prepared = cbs_opt.prepare(
            model,
            calibration(train, options, seed),
            F.cross_entropy,
            fisher=fisher_of(options),
            include=options.include or ("*",),
            exclude=options.exclude,
            device=device,
            seed=seed,
            progress=progress,
        )
        self._chosen: tuple[str, int] | None = None
        self._problem: SelectionProblem | None = None
        self._solution: Solution | None = None
        self._bounds: dict[tuple[int, str], float] = {}

    @property
    def n(self) -> int:
        """Prunable weights."""
        return self._prepared.n

    @property
    def seconds_gradients(self) -> float:
        """Wall time of the gradients."""
        return self._prepared.gradients.seconds

    def prune(self, solver: str, n_kept: int, update: str) -> Pruned:
        """Choose the weights which go and update those which stay.

        Consecutive calls which differ only in the update choose once.
        """
        prepared, options = self._prepared, self._options
        if self._chosen != (solver, n_kept) or self._problem is None or self._solution is None:
            choice = cbs_opt.Choice(
                n_kept=n_kept,
                solver=solver,
                objective=options.objective,
                time_limit=options.time_limit,
                allocation=options.allocation,
            )
            self._problem, self._solution = prepared.choose(
                choice, with_refit=options.refit and update != "combinatorial"
            )
            self._chosen = (solver, n_kept)
            if options.bound is not None:
                self._solution = self._certified(self._problem, self._solution)
        problem, solution = self._problem, self._solution
        updated = prepared.update(problem, solution.pruned, update, options.update_scale)
        if math.isnan(solution.refit_objective):
            # Known from the update now; the next update of this mask need not find out again.
            self._solution = solution = replace(solution, refit_objective=updated.refit_objective)
        partition = prepared.blocks.partition
        weights = partition.to_network(updated.weights)
        pruned = partition.to_network(solution.pruned)
        network = copy.deepcopy(self._model)
        prepared.layers.write(network, weights)
        return Pruned(
            model=network,
            n=prepared.n,
            n_kept=int(prepared.n - np.count_nonzero(pruned)),
            train_loss=prepared.loss(weights),
            objective=solution.objective,
            refit_objective=solution.refit_objective,
            bound=solution.bound,
            gap=solution.gap,
            status=solution.status.value,
            seconds_gradients=self.seconds_gradients,
            seconds_solve=solution.seconds,
            seconds_update=updated.seconds,
            repairs=tuple(dict.fromkeys((*prepared.gradients.notes, *solution.repairs, *updated.repairs))),
        )

    def _certified(self, problem: SelectionProblem, solution: Solution) -> Solution:
        """The solution with the better of its own bound and that of `options.bound`, which serves every solver."""
        key = (problem.n_prune, problem.objective.value)
        if key not in self._bounds:
            self._bounds[key] = solvers.bound(problem, method=str(self._options.bound)).value
        bound, gap, status = certify(
            problem, solution.objective, max(solution.bound, self._bounds[key]), solution.solver
        )
        return replace(solution, bound=bound, gap=gap, status=status)


def prune_in_stages(
    model: nn.Module,
    train: ImageSet,
    options: RunOptions,
    seed: int,
    device: torch.device,
    solver: str,
    n_kept: int,
    journal: Path,
    progress: Progress | None = None,
) -> Pruned:
    """Prune with gradients taken anew at ``options.stages`` points on the way.

    Parameters
    ----------
    model, train, options, seed, device
        As for `Pruner`.
    journal
        Folder which gets the state after each stage: a run which was killed goes on from there.
    progress
        Called with stages done and in all.
    """
    # On images as they are, the gradients of a network trained on cropped and flipped ones vanish.
    augment = CropAndFlip.of(train) if options.experiment.recipe.augment else None
    usual = options.experiment.staged.options
    stages = replace(usual, n_stages=options.stages, augment=augment, held_out=min(usual.held_out, len(train) // 5))
    result = cbs_opt.prune(
        model,
        calibration(train, options, seed),
        F.cross_entropy,
        n_kept=n_kept,
        solver=solver,
        objective=options.objective,
        fisher=fisher_of(options),
        include=options.include or ("*",),
        exclude=options.exclude,
        device=device,
        seed=seed,
        allocation=options.allocation,
        stages=stages,
        journal=journal,
        progress=progress,
    )
    report = result.report
    return Pruned(
        model=result.model.to(device).eval(),
        n=report.n,
        n_kept=report.n_kept,
        train_loss=report.loss_pruned,
        objective=report.objective,
        refit_objective=report.refit_objective,
        bound=report.bound,
        gap=report.gap,
        status=report.status,
        seconds_gradients=report.seconds_gradients,
        seconds_solve=report.seconds_solve,
        seconds_update=report.seconds_update,
        repairs=report.repairs,
    )


def layers_of(model: nn.Module, options: RunOptions) -> cbs_opt.PrunableLayers:
    """The layers a run prunes; raises UnknownNameError for a pattern which matches nothing."""
    return cbs_opt.find_layers(model, include=options.include or ("*",), exclude=options.exclude)


def fisher_of(options: RunOptions) -> cbs_opt.FisherOptions:
    """The quadratic model a run asks for; raises OptionError."""
    return cbs_opt.FisherOptions(
        n_rows=options.fisher_samples,
        batch_size=options.fisher_batch,
        damping=options.damping,
        blocks=options.blocks,
        first_order=options.first_order,
    )


def calibration(train: ImageSet, options: RunOptions, seed: int) -> tuple[Tensor, Tensor]:
    """A sample of the training set, drawn with the seed: normalised images and labels."""
    count = max(CALIBRATION_SAMPLES, options.fisher_samples * options.fisher_batch)
    if options.stages > 1:
        # Every stage draws rows of its own.
        count = max(count, STAGE_SAMPLES)
    return train.sample(count, seed).batch(slice(None))


def objective_of(solver: str, options: RunOptions) -> str:
    """The objective asked for, else that which `cbs_opt.prune` takes for this solver."""
    return cbs_opt.Choice(0.5, solver=solver, objective=options.objective).goal(options.stages > 1).value


def check_solvers(layers: cbs_opt.PrunableLayers, options: RunOptions) -> None:
    """Refuse, before gradients are computed, what a solver does not declare to support.

    Raises
    ------
    CapabilityError
        Objective, shared budget, linear term, size or time limit; the message names the remedy.
    """
    if options.allocation is not None:
        return
    spec = cbs_opt.BlockSpec.parse(options.blocks)
    sizes = contiguous_partition(layers, spec).sizes if spec.contiguous else (layers.n,)
    zeros = [torch.zeros(size) for size in sizes]
    # In stages a solver without a linear term chooses without the gradient.
    linear = options.first_order and options.stages == 1
    blocks = [QuadraticBlock(z, z.unsqueeze(0), gradient=z if linear else None) for z in zeros]
    for solver in options.solvers:
        problem = SelectionProblem(blocks, layers.n // 2, objective_of(solver, options))
        check_capabilities(make_solver(solver), problem, options.time_limit, None)
