"""The one call: network, data, loss → pruned network.

Modules → prunable layers → gradients → Fisher blocks → selection problem → solver → verified solution → update →
masks → report, once or in stages; or layer by layer, from what the layers see. Everything that can be refused is
refused before the data are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbs_opt.data.calibration import CalibrationOptions
from cbs_opt.data.forward import LossFunction
from cbs_opt.data.losses import MOST_SAMPLES
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.distill import Distill
from cbs_opt.engine.fine_tune import FineTune
from cbs_opt.engine.layerwise import prune_layerwise
from cbs_opt.engine.run import run
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.engine.update import Update
from cbs_opt.measure.costs import CostBudget
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import Progress
from cbs_opt.measure.layer_inputs import LayerInputOptions
from cbs_opt.report.result import PruneResult
from solvers import Objective, Solver
from solvers.budget import Pattern
from solvers.errors import OptionError


def prune(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction | None = None,
    *,
    sparsity: float | None = None,
    n_kept: int | None = None,
    budget: CostBudget | Pattern | str | None = None,
    solver: str | Solver = "greedy_ls",
    update: Update | str = Update.COMBINATORIAL,
    update_scale: float = 1.0,
    objective: Objective | str | None = None,
    allocation: str | Sequence[str] | None = None,
    time_limit: float | None = None,
    min_kept: int | float | None = None,
    min_kept_per_row: int = 0,
    curvature: str = "fisher",
    fisher: FisherOptions | None = None,
    layer_inputs: LayerInputOptions | None = None,
    calibration: CalibrationOptions | None = None,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    device: torch.device | str = "auto",
    seed: int = 0,
    loss_samples: int = MOST_SAMPLES,
    stages: int | StageOptions = 1,
    batch_norm: str = "keep",
    distill: Distill | None = None,
    finetune: FineTune | float | None = None,
    journal: Path | str | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a network.

    Parameters
    ----------
    model : nn.Module
        With layers of a kind that is known (`cbs_opt.register_layer`). Not changed. Networks with batch norm must be in
        eval mode.
    data
        Training data: an iterable of (x, y) or dict batches, a DataLoader without shuffling, a Dataset, or two tensors;
        see `cbs_opt.data.calibration`.
    loss_fn : callable, optional
        (output, target) → mean loss over the batch; for dict batches (output, batch). Only ``layer_inputs`` does
        without; losses in the report are then nan.
    sparsity, n_kept, budget, solver, update, update_scale, objective, allocation, time_limit
        What is chosen; see `cbs_opt.Choice`. With none of the first three, sparsity 0.9.
    min_kept, min_kept_per_row
        Floors; see there.
    curvature, fisher, layer_inputs, calibration, include, exclude, device, seed, loss_samples
        What is measured, and on what; see `cbs_opt.Setup`.
    stages : int or StageOptions
        How often gradients are recomputed on the way to the sparsity; see `cbs_opt.engine.stages`. With more than one
        stage steps always follow the gradient, and the update is the combinatorial one, its length searched.
    batch_norm : {"keep", "reestimate"}
        With ``reestimate`` the running statistics of batch norms are estimated anew under the new weights, on the same
        data; the report has the calibration loss with and without.
    distill : Distill, optional
        Afterwards the kept weights are moved towards the dense network's outputs, by so many steps on the same data.
    finetune : FineTune or float, optional
        Instead the network is trained, its masks held, on the same data: afterwards, or in stages a part after each. A
        number is one of epochs.
    journal : path, optional
        Folder that gets the state after each stage, and of fine-tuning on the way; a killed run that is started again
        goes on from there.
    progress : callable, optional
        Called with (rows done, rows in all) while gradients are computed, or with (stages done, stages in all), or
        with (layers done, layers in all); then with (steps done, steps in all) of the training.

    Returns
    -------
    PruneResult

    Raises
    ------
    CBSError
        For what does not fit together or into memory, before data are read; for bad data, before gradients are taken.
    """
    setup, choice, staged = arranged(
        {
            "sparsity": sparsity,
            "n_kept": n_kept,
            "budget": budget,
            "solver": solver,
            "update": update,
            "update_scale": update_scale,
            "objective": objective,
            "allocation": allocation,
            "time_limit": time_limit,
            "min_kept": min_kept,
            "min_kept_per_row": min_kept_per_row,
            "curvature": curvature,
            "fisher": fisher,
            "layer_inputs": layer_inputs,
            "calibration": calibration,
            "include": include,
            "exclude": exclude,
            "device": device,
            "seed": seed,
            "loss_samples": loss_samples,
            "stages": stages,
            "batch_norm": batch_norm,
            "distill": distill,
            "finetune": finetune,
        }
    )
    if setup.layerwise:
        if staged is not None or (journal is not None and choice.finetune is None):
            raise OptionError(
                f"curvature={curvature!r} knows no stages, and a journal of fine-tuning only; leave them out"
            )
        return prune_layerwise(model, data, loss_fn, setup, choice, progress, journal=journal)
    if loss_fn is None:
        raise OptionError(f"curvature={curvature!r} takes a loss; pass loss_fn, or curvature='layer_inputs'")
    return run(model, data, loss_fn, setup, choice, staged, journal=journal, progress=progress)


def arranged(settings: Mapping[str, Any]) -> tuple[Setup, Choice, StageOptions | None]:
    """Settings by argument of `prune`, what is left out at its default, as what the engine takes.

    Returns
    -------
    (Setup, Choice, StageOptions or None)
        The last is None for one shot.

    Raises
    ------
    OptionError, UnknownNameError, CapabilityError
    """
    sides = {field.name for field in fields(Setup)}
    stages = settings.get("stages", 1)
    chosen = {name: value for name, value in settings.items() if name not in sides and name != "stages"}
    if all(chosen.get(name) is None for name in ("sparsity", "n_kept", "budget")):
        chosen["sparsity"] = 0.9
    choice = Choice(**chosen)
    setup = Setup(**{name: value for name, value in settings.items() if name in sides})
    single = isinstance(stages, int) and not isinstance(stages, bool) and stages == 1
    return setup, choice, None if single else StageOptions.of(stages).settled(trains=choice.finetune is not None)
