"""The training that follows a stage: from one state of a staged pruning to the next, and its record."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from cbs_opt.engine.journal import StageState
from cbs_opt.engine.plan import Train
from cbs_opt.engine.training_file import TrainingFile
from cbs_opt.engine.tuning import Trained, Tuning
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.report.records import FineTuneRecord, StageRecord


def rest_of(layers: PrunableLayers, model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers beside the prunable weights, by name, on the CPU."""
    held = {id(weight) for weight in layers.parameters(model)}
    others = ((name, p) for name, p in model.named_parameters() if id(p) not in held)
    return {name: t.detach().to("cpu", copy=True) for name, t in (*others, *model.named_buffers())}


def train_stage(
    tuning: Tuning, state: StageState, step: Train, kept: TrainingFile | None, progress: Progress | None
) -> tuple[StageState, StageRecord]:
    """Train a state, which the network holds; the state after it and what was done."""
    model, layers, batches = tuning.network.model, tuning.network.layers, tuning.batches
    layers.zero(model, state.pruned)
    done = tuning.train(model, state.pruned, tuning.range_of(step.begin, step.end), kept, progress)
    number = state.number + 1
    new = StageState(number, layers.read(model), state.pruned, state.damping, rest_of(layers, model))
    record = StageRecord(
        stage=number,
        kind="train",
        n_kept=state.n_kept,
        sparsity=1.0 - state.n_kept / layers.n,
        loss_gradients=math.nan,
        loss_before=done.loss_before,
        loss_masked=math.nan,
        loss_after=done.loss_after,
        damping=math.nan,
        step=math.nan,
        evaluations=done.evaluations,
        n_regrown=0,
        n_images=round(done.taken * batches.n_train / batches.per_epoch),
        seconds_gradients=0.0,
        seconds_solve=0.0,
        seconds_update=0.0,
        seconds_batch_norm=0.0,
        seconds_train=done.seconds,
        steps=done.steps,
        steps_taken=done.taken,
        steps_kept=done.kept,
        repairs=done.notes,
        **StageRecord.of(None),
    )
    return new, record


def record_of(tuning: Tuning, records: Sequence[StageRecord]) -> FineTuneRecord:
    """Of all training between stages."""
    return tuning.record([_part(record) for record in records if record.kind == "train"])


def _part(record: StageRecord) -> Trained:
    return Trained(
        steps=record.steps,
        taken=record.steps_taken,
        kept=record.steps_kept,
        loss_before=record.loss_before,
        loss_after=record.loss_after,
        evaluations=record.evaluations,
        seconds=record.seconds_train,
        notes=record.repairs,
    )
