"""A network with what was measured of it, ready to be pruned any number of times.

Gradients cost most of the time and do not depend on solver, sparsity or update:

    prepared = cbs_opt.prepare(model, data, loss_fn, fisher=FisherOptions(n_rows=1000, damping=1e-3))
    for sparsity in (0.8, 0.9):
        result = prepared.prune(sparsity=sparsity, solver="greedy_ls", update="combinatorial")

They can be kept on disk (`Prepared.save`, `load_prepared`), masks can be chosen here and saved (`cbs_opt.save_masks`),
and masks of any origin can be updated (`Prepared.update_masks`), each on another machine:

    prepared.save("gradients/")
    prepared = cbs_opt.load_prepared("gradients/", model, data, loss_fn)
    for scale in (0.0, 0.5, 1.0):
        result = prepared.update_masks(cbs_opt.load_masks("masks.safetensors"), update="combinatorial", scale=scale)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData, CalibrationOptions
from cbs_opt.data.forward import LossFunction
from cbs_opt.data.losses import MOST_SAMPLES
from cbs_opt.engine import gradient_files
from cbs_opt.engine.choice import Choice, Extent
from cbs_opt.engine.distill import Distill
from cbs_opt.engine.estimate import announce, estimate_memory
from cbs_opt.engine.fine_tune import FineTune
from cbs_opt.engine.measured import Measured, take_gradients
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.update import Update
from cbs_opt.engine.workspace import open_workspace
from cbs_opt.measure.costs import CostBudget
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.modes import in_plain_state
from cbs_opt.report.result import PruneResult
from solvers import Objective, Reason, Solution, Solver, Status
from solvers.arrays import Array, Mask
from solvers.budget import Pattern
from solvers.errors import OptionError


class Prepared(Measured):
    """Made by `prepare` or `load_prepared`; see `cbs_opt.engine.measured` for what it has and its single steps."""

    def prune(
        self,
        choice: Choice | None = None,
        *,
        sparsity: float | None = None,
        n_kept: int | None = None,
        budget: CostBudget | Pattern | str | None = None,
        solver: str | Solver = "greedy_ls",
        update: Update | str = Update.COMBINATORIAL,
        update_scale: float = 1.0,
        objective: Objective | str | None = None,
        time_limit: float | None = None,
        allocation: str | None = None,
        start: Mask | None = None,
        seed: int | None = None,
        min_kept: int | float | None = None,
        min_kept_per_row: int = 0,
        batch_norm: str = "keep",
        distill: Distill | None = None,
        finetune: FineTune | float | None = None,
    ) -> PruneResult:
        """Choose, update, and put into a copy of the network, as a `Choice` or its fields say; raises CBSError."""
        made = choice or Choice(
            sparsity=sparsity,
            n_kept=n_kept,
            budget=budget,
            solver=solver,
            objective=objective,
            update=update,
            update_scale=update_scale,
            allocation=allocation,
            time_limit=time_limit,
            start=start,
            seed=seed,
            min_kept=min_kept,
            min_kept_per_row=min_kept_per_row,
            batch_norm=batch_norm,
            distill=distill,
            finetune=finetune,
        )
        return self.one_shot(made)

    @in_plain_state
    def update_masks(
        self,
        masks: Mapping[str, Tensor],
        *,
        update: Update | str = Update.COMBINATORIAL,
        scale: float = 1.0,
        objective: Objective | str = Objective.SELECTION,
        judge: bool = True,
        batch_norm: str = "keep",
        distill: Distill | None = None,
        finetune: FineTune | float | None = None,
    ) -> PruneResult:
        """Update the kept weights of masks of any origin; a sweep of the scale solves once.

        Parameters
        ----------
        masks : mapping of str to bool tensor
            By layer name, True = kept, as `cbs_opt.load_masks` and `PruneResult.masks` have them; a layer without one
            is kept whole.
        update : Update or str
        scale : float
            Multiplies the step of the kept weights.
        objective : {"selection", "joint"}
            By which the masks are judged in the report.
        judge : bool
            As in `one_shot`.
        batch_norm, distill, finetune
            As for `prune`.

        Raises
        ------
        ModelError
            If masks and layers do not fit.
        CapabilityError
            If the update needs what was not measured.
        """
        pruned = self.layers.pruned_by(masks)
        n_kept = self.n - int(pruned.sum())
        choice = Choice(
            n_kept=n_kept,
            update=update,
            update_scale=scale,
            objective=objective,
            batch_norm=batch_norm,
            distill=distill,
            finetune=finetune,
        )
        problem = self.problem(n_kept=choice.n_kept, objective=objective)
        mask = self.blocks.partition.to_groups(pruned)
        value = problem.value(mask) if self.has is Extent.CURVATURE else math.nan
        given = Solution(
            pruned=mask,
            objective=value,
            bound=-math.inf,
            gap=math.inf,
            status=Status.FEASIBLE,
            reason=Reason.COMPLETED,
            refit_objective=math.nan,
            refit_weights=None,
            seconds=0.0,
            solver="masks given",
        )
        return self.one_shot(choice, (problem, given), judge=judge)

    @in_plain_state
    def with_fisher(self, fisher: FisherOptions) -> Prepared:
        """The same gradients under another damping, block structure or first-order term.

        Raises
        ------
        OptionError
            If the options ask for other gradients.
        """
        changed = [name for name in gradient_files.MEASURED if getattr(fisher, name) != getattr(self.fisher, name)]
        if changed:
            raise OptionError(
                f"{', '.join(changed)} would need other gradients; call cbs_opt.prepare again, or relinearised"
            )
        return Prepared(self.workspace, fisher, self._gradients, self._weights)

    @in_plain_state
    def relinearised(
        self,
        weights: Array,
        *,
        fisher: FisherOptions | None = None,
        seed: int | None = None,
        reuse_memory: bool = False,
        progress: Progress | None = None,
    ) -> Prepared:
        """The quadratic model at other prunable weights (n,), in the order of the network.

        Parameters
        ----------
        fisher : FisherOptions, optional
            None keeps the options.
        seed : int, optional
            Of the rows; None keeps it.
        reuse_memory : bool
            Overwrite the factor of this object, which must not be used any more.
        """
        options = fisher or self.fisher
        if seed is not None:
            options = replace(options, seed=seed)
        _ = self.workspace.weights
        memory = self.gradients.factor if reuse_memory else None
        gradients = self.workspace.gradients(weights, options, progress=progress, out=memory)
        # As the network holds them: the quadratic model is built at the rounded weights.
        return Prepared(self.workspace, options, gradients, self.layers.read(self.workspace.model).numpy())

    @in_plain_state
    def save(self, folder: Path | str) -> None:
        """Keep the gradients in a folder, for `load_prepared`; raises OutputError, or OptionError if there are none."""
        gradient_files.save(folder, self.workspace, self.fisher, self.gradients, self.weights)


def prepare(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    *,
    curvature: str = "fisher",
    fisher: FisherOptions | None = None,
    calibration: CalibrationOptions | None = None,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    device: torch.device | str = "auto",
    seed: int = 0,
    loss_samples: int = MOST_SAMPLES,
    progress: Progress | None = None,
) -> Prepared:
    """Read the data, compute the gradients and build the quadratic model.

    Parameters
    ----------
    model : nn.Module
        Not changed. Networks with batch norm must be in eval mode. Earlier pruning masks become zeros.
    data
        Calibration (training) data; see `cbs_opt.data.calibration`.
    loss_fn : callable
        (output, target) → mean loss over the batch; for dict batches (output, batch).
    curvature, fisher, calibration, include, exclude, device, seed, loss_samples
        See `cbs_opt.Setup`.
    progress : callable, optional
        Called with (rows done, rows in all).

    Raises
    ------
    ModelError, DataError, OptionError, UnknownNameError
        For bad input, before gradients are computed.
    """
    setup = Setup(fisher, curvature, calibration, include, exclude, device, seed, loss_samples)
    return prepare_setup(model, data, loss_fn, setup, progress=progress)


@in_plain_state
def prepare_setup(
    model: nn.Module, data: object, loss_fn: LossFunction, setup: Setup, *, progress: Progress | None = None
) -> Prepared:
    """`prepare` for a `Setup`."""
    need = Extent.WEIGHTS if setup.curvature == "none" else Extent.CURVATURE
    n_samples = CalibrationData.count(data, setup.samples)

    def check(network: nn.Module, layers: PrunableLayers) -> None:
        estimate_memory(network, layers, setup, need, n_samples=n_samples or setup.options.batch_size)

    workspace = open_workspace(model, data, loss_fn, setup, check)
    if need is Extent.CURVATURE:
        estimate_memory(workspace.model, workspace.layers, setup, need, n_samples=workspace.data.n)
        announce(workspace)
    return Prepared(workspace, setup.options, take_gradients(workspace, need, progress))


@in_plain_state
def load_prepared(
    folder: Path | str, model: nn.Module, data: object, loss_fn: LossFunction, setup: Setup | None = None
) -> Prepared:
    """A network with the gradients that `Prepared.save` has kept of it, mapped into memory.

    Parameters
    ----------
    folder : path
    model, data, loss_fn
        Those the gradients were taken of.
    setup : Setup, optional
        Whatever would need other gradients must be as it was; damping, blocks, first-order term, device and loss
        samples are free. None takes the setup as it was kept.

    Raises
    ------
    CheckpointError
        If the folder holds no gradients, or damaged ones.
    OptionError
        If they are of another network, other data or another setup; the message names what differs.
    """
    kept = gradient_files.Kept(folder)
    workspace = open_workspace(model, data, loss_fn, setup or kept.setup())
    gradients, weights = kept.load(workspace)
    return Prepared(workspace, workspace.setup.options, gradients, weights)
