"""From a solution and updated weights to the pruned network and its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cbs_opt.engine.stage_options import StageRecord
from cbs_opt.engine.update import Update, Updated
from cbs_opt.report.report import PruneReport, contributions, layer_reports
from solvers import SelectionProblem, Solution
from solvers.refit import refit

if TYPE_CHECKING:
    from cbs_opt.prepared import Prepared

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned network.

    Attributes
    ----------
    model : nn.Module
        A copy of the network given, with new weights under masks (see `cbs_opt.network.masks`).
    masks : dict of str to bool tensor
        By layer name, in the shape of the weight; True = kept.
    report : PruneReport
    solution : Solution or None
        What the solver did, in the order of the blocks; None where it was called in several stages.
    weights : float64 (n,)
        The new prunable weights in the order of the network, zero where pruned.
    pruned : bool (n,)
        True = removed, in the order of the network.
    stages : tuple of StageRecord
        What each stage did; empty for a single one.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: PruneReport
    solution: Solution | None
    weights: Array
    pruned: Mask
    stages: tuple[StageRecord, ...] = ()


def assemble(
    prepared: Prepared,
    problem: SelectionProblem,
    solution: Solution,
    updated: Updated,
    *,
    update: Update,
    scale: float,
    seed: int | None = None,
) -> PruneResult:
    """Put new weights and masks into a copy of the network, and report."""
    partition = prepared.blocks.partition
    refit_objective, repairs = updated.refit_objective, updated.repairs
    refitted = solution.refit_weights
    if np.isnan(refit_objective):
        refit_objective = solution.refit_objective
    if np.isnan(refit_objective):
        # Every mask is judged by the joint objective too, whatever the update.
        judged = refit(problem, solution.pruned)
        refit_objective, refitted = judged.value, judged.weights
        repairs = (*repairs, *judged.repairs)
    terms = partition.to_network(contributions(problem, solution.pruned, refitted))
    weights = partition.to_network(updated.weights)
    pruned = partition.to_network(solution.pruned)
    model, masks = prepared.workspace.network(weights, pruned)
    stored = prepared.layers.read(model).numpy()
    report = PruneReport(
        layers=layer_reports(prepared.layers, prepared.weights, stored, pruned, terms),
        n=prepared.n,
        n_kept=int(prepared.n - pruned.sum()),
        sparsity=float(pruned.mean()),
        sparsity_asked=problem.n_prune / problem.n,
        solver=solution.solver,
        update=update.value,
        update_scale=float(scale),
        objective_kind=problem.objective.value,
        objective=solution.objective,
        refit_objective=refit_objective,
        bound=solution.bound,
        gap=solution.gap,
        status=solution.status.value,
        reason=solution.reason.value,
        loss_dense=prepared.workspace.dense_loss,
        loss_pruned=prepared.loss(weights),
        loss_samples=prepared.workspace.meter.n_samples,
        n_rows=prepared.gradients.n_rows,
        batch_size=prepared.gradients.batch_size,
        damping=float(prepared.fisher.damping),
        blocks=str(prepared.fisher.spec),
        n_blocks=len(prepared.blocks.blocks),
        first_order=prepared.fisher.first_order,
        gradient_method=prepared.gradients.method,
        stages=1,
        seed=prepared.workspace.seed if seed is None else seed,
        device=str(prepared.workspace.device),
        seconds_gradients=prepared.gradients.seconds,
        seconds_solve=solution.seconds,
        seconds_update=updated.seconds,
        repairs=tuple(dict.fromkeys((*prepared.gradients.notes, *solution.repairs, *repairs))),
        statistics=dict(solution.statistics),
    )
    return PruneResult(model, masks, report, solution, weights, pruned)
