"""What a plan made of a network, put into it: distilled where that is asked for, masked and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.large_batches import large_batches
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.data.training_batches import TrainingBatches
from cbs_opt.data.trees import Tree, map_tree
from cbs_opt.engine.choice import Choice, Extent
from cbs_opt.engine.distill import Distill, distill
from cbs_opt.engine.settings import effective
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.engine.workspace import OpenNetwork
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.batch_norm import reestimate, tracked_norms
from cbs_opt.report.norms import LayerNorms
from cbs_opt.report.records import DistillRecord, FineTuneRecord, StageRecord
from cbs_opt.report.report import PruneReport
from cbs_opt.report.result import PruneResult
from cbs_opt.report.warnings import (
    collapse_warnings,
    distill_warnings,
    fine_tune_warnings,
    nonzero,
    norm_warnings,
    repruning_warnings,
    skipped_warnings,
)
from cbs_opt.structured.coupled import Coupling
from solvers import Solution
from solvers.arrays import Array, Mask
from solvers.errors import ModelError

#: What is said where there is nothing to re-estimate.
_NO_NORMS = "batch_norm='reestimate': the network has no batch norm that keeps running statistics, so nothing was done"


@dataclass(frozen=True)
class ModelFigures:
    """What a report says of the quadratic model; see `PruneReport`."""

    curvature: str
    blocks: str
    n_blocks: int
    n_rows: int = 0
    batch_size: int = 0
    damping: float = math.nan

    @classmethod
    def of(cls, measured: Extent, fisher: FisherOptions, data: CalibrationData, n_blocks: int) -> ModelFigures:
        """Of gradients, as much of them as was measured."""
        name = ("none", "gradient", "fisher")[measured]
        if measured is Extent.WEIGHTS:
            return cls(name, "per_layer", n_blocks)
        rows, size = fisher.rows_for(data), fisher.batch_size
        if measured is Extent.GRADIENT:
            return cls(name, "per_layer", n_blocks, rows, size)
        return cls(name, str(fisher.spec), n_blocks, rows, size, fisher.ridge)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan made of a network.

    Attributes
    ----------
    pruned : bool (n,)
    weights : float64 (n,), optional
        None where they stay as they are.
    records : tuple of StageRecord
    model : ModelFigures
    stages : StageOptions, optional
        Of a plan in which each record has an objective of its own.
    terms : float64 (n,), optional
        What each weight adds to the objective, in one shot with a curvature.
    solution : Solution, optional
        None in stages.
    costs : mapping of str to float
        Under a budget of costs.
    coupling : Coupling, optional
        Where channels go whole, with what is added to them.
    finetune : FineTuneRecord, optional
        In stages that were trained between.
    """

    pruned: Mask
    weights: Array | None
    records: tuple[StageRecord, ...]
    model: ModelFigures
    stages: StageOptions | None = None
    terms: Array | None = None
    solution: Solution | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    coupling: Coupling | None = None
    finetune: FineTuneRecord | None = None


def conclude(
    workspace: OpenNetwork,
    choice: Choice,
    outcome: Outcome,
    *,
    own: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Put an outcome into a network, the workspace's own or a copy, distil if that is asked for, and report."""
    layers, setup, pruned, records = workspace.layers, workspace.setup, outcome.pruned, outcome.records
    norms, before = LayerNorms(layers, workspace.dense_layers(), pruned), nonzero(workspace.dense_layers())
    loss_dense = workspace.dense_loss
    teacher = None if choice.distill is None else workspace.dense_copy()
    model, loss = workspace.network(outcome.weights, pruned, own=own)
    if outcome.coupling is not None:
        outcome.coupling.silence(model, outcome.coupling.gone(pruned, layers))
        loss = workspace.meter.of_network(model)
    _check_finite(loss_dense, loss, choice)
    renewed = _Norms(loss) if choice.batch_norm == "keep" else _reestimated(workspace, model, loss)
    distilled, loss = None, renewed.loss
    if choice.distill is not None and teacher is not None:
        distilled = distilled_in_place(workspace, choice.distill, model, teacher, pruned, progress)
        loss = workspace.meter.of_network(model)
    constant = workspace.meter.is_constant(model)
    rows = norms.reports(layers.parameters(model), outcome.terms)
    masks = workspace.finish(model, pruned)
    solution, staged = outcome.solution, outcome.stages is not None
    if not staged:
        records = (replace(records[0], loss_after=renewed.loss, seconds_batch_norm=renewed.seconds),)
    last = next((record for record in reversed(records) if record.solver), records[-1])
    n_kept = layers.n - int(np.count_nonzero(pruned))
    report = PruneReport(
        layers=rows,
        n=layers.n,
        n_kept=n_kept,
        sparsity=(layers.n - n_kept) / layers.n,
        sparsity_asked=(layers.n - n_kept) / layers.n if choice.sparsity is None else choice.sparsity,
        n_model=layers.n_model,
        sparsity_of_model=(layers.n - n_kept) / layers.n_model,
        skipped=layers.skipped,
        warnings=(
            *skipped_warnings(layers),
            *dict.fromkeys(warning for record in records for warning in record.warnings),
            *collapse_warnings(layers, pruned, constant),
            *repruning_warnings(n_kept, before, nonzero(layers.parameters(model)), layers.n),
            *norm_warnings(renewed.loss_old, renewed.loss),
            *(() if outcome.finetune is None else fine_tune_warnings(outcome.finetune)),
            *(() if distilled is None else distill_warnings(distilled, renewed.loss, loss)),
        ),
        solver=last.solver or choice.solver.spec,
        update=choice.update.value,
        update_scale=math.nan if staged else choice.update_scale,
        objective_kind=choice.goal(staged).value,
        objective=last.objective,
        refit_objective=last.refit_objective,
        bound=last.bound,
        gap=last.gap,
        status=last.status,
        reason=last.reason,
        loss_dense=loss_dense,
        loss_pruned=loss,
        loss_samples=workspace.meter.n_samples,
        **asdict(outcome.model),
        first_order=None if staged else last.first_order,
        gradient_method=", ".join(dict.fromkeys(record.method for record in records if record.method)),
        stages=sum(record.kind != "train" for record in records),
        seed=setup.seed if choice.seed is None else choice.seed,
        device=str(setup.place),
        seconds_gradients=sum(record.seconds_gradients for record in records),
        seconds_solve=sum(record.seconds_solve for record in records),
        seconds_update=sum(record.seconds_update + record.seconds_batch_norm for record in records),
        repairs=(
            *dict.fromkeys(repair for record in records for repair in record.repairs),
            *renewed.notes,
            *(() if distilled is None else distilled.notes),
        ),
        statistics={} if solution is None else dict(solution.statistics),
        budget="" if choice.budget is None else str(choice.budget),
        costs=dict(outcome.costs),
        distill=distilled,
        finetune=outcome.finetune,
        loss_undistilled=math.nan if distilled is None else renewed.loss,
        norms_reestimated=renewed.count,
        loss_old_norms=renewed.loss_old,
    )
    return PruneResult(
        model, masks, report, pruned, layers, solution, records, effective(setup, choice, outcome.stages)
    )


def _check_finite(loss_dense: float, loss: float, choice: Choice) -> None:
    if math.isfinite(loss_dense) and not math.isfinite(loss):
        raise ModelError(
            f"the calibration loss of the pruned network is {loss}, that of the network given {loss_dense:.6g}; use a "
            f"smaller update_scale than {choice.update_scale:g}, a larger damping or a lower sparsity"
        )


@dataclass(frozen=True)
class _Norms:
    """The loss once batch norms are treated as asked, that before where they changed, how many did, and seconds."""

    loss: float
    loss_old: float = math.nan
    count: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def _reestimated(workspace: OpenNetwork, model: nn.Module, loss: float) -> _Norms:
    """Re-estimate running statistics in place."""
    started, norms, place = time.perf_counter(), tracked_norms(model), workspace.setup.place
    if not norms:
        return _Norms(loss, notes=(_NO_NORMS,))
    put: Callable[[Tensor], Tensor] = lambda t: t.to(place, copy=True)  # noqa: E731

    def output(network: nn.Module, inputs: Tree, targets: Tree | None) -> object:
        with typed_failures(inputs, targets):
            return workspace.forward.output(network, inputs, targets)

    batches = (
        (map_tree(put, inputs), None if targets is None else map_tree(put, targets), size)
        for inputs, targets, size in large_batches(workspace.source)
    )
    reestimate(model.to(place), output, batches)
    seconds = time.perf_counter() - started
    return _Norms(workspace.meter.of_network(model), loss, len(norms), seconds)


def distilled_in_place(
    workspace: OpenNetwork,
    options: Distill,
    model: nn.Module,
    dense: nn.Module,
    pruned: Mask,
    progress: Progress | None,
) -> DistillRecord:
    """Distil a network that `OpenNetwork.network` made, in place."""
    setup = workspace.setup
    batches = TrainingBatches(workspace.source, options.batch_size, options.held_out, setup.seed)
    model, dense = model.to(setup.place), dense.to(setup.place)
    return distill(model, dense, workspace.layers, pruned, batches, workspace.forward, options, progress)
