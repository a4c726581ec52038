"""Carrying out a plan: the one way from a network and its data to a pruned network and its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.forward import LossFunction
from cbs_opt.engine.checks import check_plan
from cbs_opt.engine.choice import Choice, Extent
from cbs_opt.engine.estimate import Estimate, announce, probe_seconds
from cbs_opt.engine.journal import StageState
from cbs_opt.engine.measured import Measured, take_gradients
from cbs_opt.engine.outcome import ModelFigures, Outcome, conclude
from cbs_opt.engine.plan import Plan
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import LEAST_BATCH, StageOptions
from cbs_opt.engine.stages import run_stages
from cbs_opt.engine.tuned import fine_tuned
from cbs_opt.engine.workspace import Workspace, open_workspace
from cbs_opt.measure.blocks import contiguous_partition
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.modes import in_plain_state
from cbs_opt.report.records import StageRecord
from cbs_opt.report.result import PruneResult
from solvers.errors import OptionError


@in_plain_state
def run(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    setup: Setup,
    choice: Choice,
    stages: StageOptions | None = None,
    *,
    journal: Path | str | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a network; see `cbs_opt.prune` for what the arguments are made of, and the errors.

    Parameters
    ----------
    model, data, loss_fn
    setup : Setup
    choice : Choice
    stages : StageOptions, optional
        None is one shot.
    journal : path, optional
    progress : callable, optional
    """
    if stages is None and journal is not None and choice.finetune is None:
        raise OptionError(
            "a journal is kept of several stages, and of fine-tuning; pass stages=N with N > 1 or "
            "finetune=FineTune(...), or leave it out"
        )
    workspace, plan, _ = _open(model, data, loss_fn, setup, choice, stages)
    return carry_out(workspace, choice, plan, journal=journal, progress=progress)


def estimate(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    setup: Setup,
    choice: Choice,
    stages: StageOptions | None = None,
) -> Estimate:
    """What `run` with the same arguments takes, found from gradients of a few rows; the errors are the same."""
    workspace, plan, found = _open(model, data, loss_fn, setup, choice, stages)
    if choice.needs is Extent.WEIGHTS and plan.stages is None:
        return found
    return replace(found, seconds=probe_seconds(workspace, plan.n_stages))


def _open(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    setup: Setup,
    choice: Choice,
    stages: StageOptions | None,
) -> tuple[Workspace, Plan, Estimate]:
    """Check everything, then read the data, of whose number memory may depend."""
    if stages is not None and setup.fisher is None:
        setup = setup.with_fisher(FisherOptions(batch_size=LEAST_BATCH))
    plans: list[Plan] = []

    def check(network: nn.Module, layers: PrunableLayers) -> None:
        n_kept = choice.kept(layers.n)
        plans.append(Plan.one_shot(n_kept) if stages is None else _staged(stages, choice, layers.n))
        # Of data whose number is not known before they are read, the least there can be.
        n_samples = CalibrationData.count(data, setup.samples) or setup.options.batch_size
        check_plan(network, layers, setup, choice, plans[0], n_samples)

    workspace = open_workspace(model, data, loss_fn, setup, check)
    found = check_plan(workspace.model, workspace.layers, setup, choice, plans[0], workspace.data.n)
    return workspace, plans[0], found


def carry_out(
    workspace: Workspace,
    choice: Choice,
    plan: Plan,
    *,
    journal: Path | str | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Carry out a plan that was checked, on the network of a workspace, which is given away as the result."""
    if plan.stages is None:
        return fine_tuned(workspace, choice, lambda plain: _at_once(workspace, plain, progress), journal, progress)
    # Before the first stage changes them.
    _ = workspace.weights, workspace.dense_loss
    total = len(plan.steps)
    announce(workspace, plan.n_stages)

    def tick(record: StageRecord, _: StageState) -> None:
        if progress is not None:
            progress(record.stage, max(total, record.stage))

    found = run_stages(workspace, choice, plan, journal=journal, progress=tick, training=progress)
    fisher, records, state = workspace.setup.options, found.records, found.state
    if found.n_resumed:
        note = f"{found.n_resumed} stages were read from the journal and not run again"
        records = (replace(records[0], repairs=(note, *records[0].repairs)), *records[1:])
    weights = np.where(state.pruned, 0.0, state.weights.cpu().numpy())
    n_blocks = len(contiguous_partition(workspace.layers, fisher.spec).sizes)
    model = ModelFigures.of(Extent.CURVATURE, fisher, workspace.data, n_blocks)
    outcome = Outcome(
        state.pruned, weights, records, model, stages=plan.stages, costs=found.costs, finetune=found.finetune
    )
    return conclude(workspace, choice, outcome, own=True, progress=progress)


def _staged(stages: StageOptions, choice: Choice, n: int) -> Plan:
    return Plan.staged(stages, n=n, n_kept=choice.kept(n), finetune=choice.finetune)


def _at_once(workspace: Workspace, choice: Choice, progress: Progress | None) -> PruneResult:
    """One shot, which gives the network away."""
    need = choice.needs
    if need is not Extent.WEIGHTS:
        announce(workspace)
    measured = Measured(workspace, workspace.setup.options, take_gradients(workspace, need, progress))
    return measured.one_shot(choice, own=True, progress=progress)
