"""`prune` in several stages: the workspace goes through `stages`, and its last state becomes the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cbs_opt.engine.stage_options import StageOptions, StageRecord
from cbs_opt.engine.stages import run_stages
from cbs_opt.engine.update import Update
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.blocks import contiguous_partition
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.batch_norm import restore_statistics
from cbs_opt.report.report import PruneReport, layer_reports
from cbs_opt.report.result import PruneResult
from solvers import Objective, Reason, Solver, Status


def prune_in_stages(
    workspace: Workspace,
    *,
    n_kept: int,
    sparsity: float,
    solver: Solver,
    objective: Objective,
    fisher: FisherOptions,
    options: StageOptions,
    allocation: str | None,
    journal: Path | str | None,
    progress: Progress | None,
) -> PruneResult:
    """Prune the network of a workspace in stages; see `cbs_opt.prune` for the arguments and errors.

    The network of the workspace has other weights and batch-norm statistics afterwards.
    """
    layers, total = workspace.layers, options.n_stages + options.n_polish
    loss_dense = workspace.dense_loss
    done: list[StageRecord] = []

    def report_progress(record: StageRecord, _: object) -> None:
        done.append(record)
        if progress is not None:
            progress(record.stage, max(total, record.stage))

    run = run_stages(
        workspace.model,
        layers,
        workspace.data,
        workspace.forward,
        n_kept=n_kept,
        solver=solver,
        options=options,
        fisher=fisher,
        objective=objective,
        allocation=allocation,
        device=workspace.device,
        seed=workspace.seed,
        journal=journal,
        progress=report_progress,
    )
    pruned = run.state.pruned
    weights = np.where(pruned, 0.0, run.state.weights.cpu().numpy())
    model, masks = workspace.network(weights, pruned)
    restore_statistics(model, run.state.statistics)
    records = run.records
    chosen = [record.objective for record in records if math.isfinite(record.objective)]
    repairs = [repair for record in records for repair in record.repairs]
    if run.n_resumed:
        repairs.insert(0, f"{run.n_resumed} stages were read from the journal and not run again")
    spec = fisher.spec
    report = PruneReport(
        layers=layer_reports(layers, workspace.weights, layers.read(model).numpy(), pruned, np.zeros(layers.n)),
        n=layers.n,
        n_kept=int(layers.n - pruned.sum()),
        sparsity=float(pruned.mean()),
        sparsity_asked=sparsity,
        solver=solver.spec if allocation is None else f"{solver.spec}@{allocation}",
        update=Update.COMBINATORIAL.value,
        update_scale=records[-1].step if records else 1.0,
        objective_kind=objective.value,
        objective=chosen[-1] if chosen else math.nan,
        refit_objective=math.nan,
        bound=-math.inf,
        gap=math.inf,
        status=Status.FEASIBLE.value,
        reason=Reason.COMPLETED.value,
        loss_dense=loss_dense,
        loss_pruned=workspace.meter.of_weights(weights),
        loss_samples=workspace.meter.n_samples,
        n_rows=fisher.rows_for(workspace.data),
        batch_size=fisher.batch_size,
        damping=run.state.damping,
        blocks=str(spec),
        n_blocks=len(contiguous_partition(layers, spec).sizes),
        first_order=True,
        gradient_method=fisher.method,
        stages=len(records),
        seed=workspace.seed,
        device=str(workspace.device),
        seconds_gradients=_total(records, "seconds_gradients"),
        seconds_solve=_total(records, "seconds_solve"),
        seconds_update=_total(records, "seconds_update") + _total(records, "seconds_batch_norm"),
        repairs=tuple(dict.fromkeys(repairs)),
        statistics={
            "losses": float(sum(record.evaluations for record in records)),
            "samples": float(sum(record.n_images for record in records)),
            "regrown": float(sum(record.n_regrown for record in records)),
        },
    )
    return PruneResult(model, masks, report, None, weights, pruned, records)


def _total(records: Sequence[StageRecord], name: str) -> float:
    return float(sum(getattr(record, name) for record in records))
