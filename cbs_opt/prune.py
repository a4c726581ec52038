"""The one call: network, data, loss → pruned network.

Modules → prunable layers → gradients → Fisher blocks → selection problem → solver → verified solution → update →
masks → report. Everything that can be refused is refused before gradients are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from cbs_opt.data.calibration import CalibrationOptions
from cbs_opt.data.forward import LossFunction
from cbs_opt.data.losses import MOST_SAMPLES
from cbs_opt.engine.stage_options import LEAST_BATCH, StageOptions
from cbs_opt.engine.update import Update, check_scale
from cbs_opt.engine.workspace import open_workspace
from cbs_opt.measure.blocks import contiguous_partition
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.layers import PrunableLayers, check_sparsity
from cbs_opt.prepared import pick_objective, prepare
from cbs_opt.report.result import PruneResult
from solvers import Capability, Objective, QuadraticBlock, SelectionProblem, Solver, make_solver
from solvers.allocation import ALLOCATIONS
from solvers.errors import OptionError, UnknownNameError
from solvers.running import check_capabilities


def prune(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    *,
    sparsity: float = 0.9,
    solver: str | Solver = "greedy_ls",
    update: Update | str = Update.COMBINATORIAL,
    update_scale: float = 1.0,
    objective: Objective | str | None = None,
    fisher: FisherOptions | None = None,
    calibration: CalibrationOptions | None = None,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    device: torch.device | str = "auto",
    seed: int = 0,
    time_limit: float | None = None,
    allocation: str | None = None,
    loss_samples: int = MOST_SAMPLES,
    stages: int | StageOptions = 1,
    journal: Path | str | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a network.

    Parameters
    ----------
    model : nn.Module
        With Linear, Conv1d or Conv2d layers. Not changed. Networks with batch norm must be in eval mode.
    data
        Training data: an iterable of (x, y) or dict batches, a DataLoader without shuffling, a Dataset, or two tensors;
        see `cbs_opt.data.calibration`.
    loss_fn : callable
        (output, target) → mean loss over the batch; for dict batches (output, batch).
    sparsity : float in [0, 1)
        Fraction of the prunable weights to remove; int(n·(1 − sparsity)) weights stay.
    solver : str or Solver
        See `solvers.available_solvers`; options in brackets, ``"greedy_ls[window=20]"``.
    update : {"combinatorial", "searched", "single", "none"}
        How the kept weights are re-optimised; see `cbs_opt.engine.update`.
    update_scale : float
        Multiplies the step of the kept weights.
    objective : {"selection", "joint"}, optional
        What the solver minimises; None takes the selection objective where the solver supports it.
    fisher : FisherOptions, optional
        Rows, batch size, damping and blocks of the quadratic model; None takes rows of one sample, in stages of 16.
    calibration : CalibrationOptions, optional
        Which samples of `data` are used.
    include, exclude : patterns
        Which layers; see `cbs_opt.find_layers`.
    device : {"auto", "cpu", "cuda"} or torch.device
    seed : int
    time_limit : float, optional
        Seconds, for solvers that keep one.
    allocation : str, optional
        How to split the budget over blocks for solvers that cannot share one.
    loss_samples : int
        Calibration losses, by which solvers pick among masks, are taken over at most this many samples.
    stages : int or StageOptions
        How often gradients are recomputed on the way to the sparsity; see `cbs_opt.engine`. With more than one stage
        steps always follow the gradient, and the update is the combinatorial one, its length searched.
    journal : path, optional
        Folder that gets the state after each stage; a killed run that is started again goes on from there.
    progress : callable, optional
        Called with (rows done, rows in all) while gradients are computed, or with (stages done, stages in all).

    Returns
    -------
    PruneResult

    Raises
    ------
    CBSError
        One of its subclasses, for bad input, before gradients are computed.
    """
    check_sparsity(sparsity)
    chosen = make_solver(solver)
    how = Update.parse(update)
    check_scale(update_scale)
    goal = pick_objective(chosen, objective)
    staged = None if isinstance(stages, int) and stages == 1 else StageOptions.of(stages)
    if staged is None and journal is not None:
        raise OptionError("a journal is kept of several stages; pass stages=N with N > 1, or leave it out")
    fisher = fisher or (FisherOptions() if staged is None else FisherOptions(batch_size=LEAST_BATCH))
    if staged is not None:
        if objective is None and Capability.JOINT in chosen.capabilities:
            goal = Objective.JOINT
        _refuse_in_stages(how, update_scale, time_limit, fisher)
    if allocation is not None and allocation not in ALLOCATIONS:
        raise UnknownNameError.of("allocation", str(allocation), ALLOCATIONS)

    def check(layers: PrunableLayers) -> None:
        if allocation is None:
            check_capabilities(chosen, _outline(layers, fisher, sparsity, goal), time_limit, None)

    if staged is not None:
        from cbs_opt.engine.staged_pruning import prune_in_stages

        workspace = open_workspace(
            model,
            data,
            loss_fn,
            fisher=fisher,
            calibration=calibration,
            include=include,
            exclude=exclude,
            device=device,
            seed=seed,
            loss_samples=loss_samples,
            check=check,
        )
        return prune_in_stages(
            workspace,
            n_kept=workspace.layers.n_kept(sparsity),
            sparsity=float(sparsity),
            solver=chosen,
            objective=goal,
            fisher=fisher,
            options=staged,
            allocation=allocation,
            journal=journal,
            progress=progress,
        )
    prepared = prepare(
        model,
        data,
        loss_fn,
        fisher=fisher,
        calibration=calibration,
        include=include,
        exclude=exclude,
        device=device,
        seed=seed,
        loss_samples=loss_samples,
        check=check,
        progress=progress,
    )
    return prepared.prune(
        sparsity=sparsity,
        solver=chosen,
        update=how,
        update_scale=update_scale,
        objective=goal,
        time_limit=time_limit,
        allocation=allocation,
    )


def _refuse_in_stages(update: Update, scale: float, time_limit: float | None, fisher: FisherOptions) -> None:
    """Raise OptionError for what stages decide themselves or do not support."""
    if update is not Update.COMBINATORIAL:
        raise OptionError(f"stages refit the kept weights: update must be 'combinatorial', not {update.value!r}")
    if scale != 1.0:
        raise OptionError(f"stages search the length of the update themselves: leave update_scale={scale!r} out")
    if time_limit is not None:
        raise OptionError("stages keep no time limit; leave time_limit out")
    if fisher.damping <= 0.0:
        raise OptionError("stages need a positive damping to start from, e.g. FisherOptions(damping=1e-4)")
    if not fisher.spec.contiguous:
        raise OptionError(f"stages rebuild the blocks as weights go; {str(fisher.spec)!r} is not supported, 'one' is")


def _outline(layers: PrunableLayers, fisher: FisherOptions, sparsity: float, objective: Objective) -> SelectionProblem:
    """A problem of the shape of the one to come, without its values: enough to check a solver's capabilities."""
    spec = fisher.spec
    sizes = contiguous_partition(layers, spec).sizes if spec.contiguous else (layers.n,)
    blocks = []
    for size in sizes:
        zeros = torch.zeros(size)
        blocks.append(QuadraticBlock(zeros, zeros.unsqueeze(0), gradient=zeros if fisher.first_order else None))
    return SelectionProblem(blocks, layers.n_prune(sparsity), objective)
