"""Fine-tuning: a pruned network is trained on, its masks held, on the data that it was pruned by.

    min over v, v_P = 0:   mean over training samples of  (1 − α) ℓ(f(x; v), y) + α T² KL(softmax(z̄/T) ‖ softmax(z/T))

z = f(x; v) and z̄ the logits of the dense network; α = 0 unless `FineTune.distill` says otherwise. A share of the
training samples is held out; the loss ℓ on them, the network in eval mode, says which state is kept: the best one seen,
which may be that before any step. So early stopping costs nothing but the samples, and a training that diverges ends
with what it had before, and says so.

One shot and layer by layer it comes last (`tuned`). In stages a part of the steps follows each stage (`trained_stage`),
so that a little is pruned and the network then recovers; the schedule of the step
length goes over all parts, and each begins with a new optimiser.

Order, augmentation and dropout of step t depend on (seed, t) alone, so that a training that is taken up again from a
journal (`training_file`) ends in the same bits on a CPU.

Sources: Zhu and Gupta, *To prune, or not to prune*, 2017 (gradual); Renda, Frankle and Carbin, *Comparing rewinding and
fine-tuning in neural network pruning*, 2020; Hinton, Vinyals and Dean, 2015 (distillation).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import Batch, CalibrationData
from cbs_opt.data.divergence import compared, distance
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.data.training_batches import TrainingBatches
from cbs_opt.data.trees import Tree, digest_of, leaves, map_tree
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.fine_tune import FineTune
from cbs_opt.engine.masked_training import MaskedOptimiser, TrainedWeights
from cbs_opt.engine.settings import effective
from cbs_opt.engine.training import Descent, looks
from cbs_opt.engine.training_file import TrainingFile
from cbs_opt.engine.workspace import OpenNetwork
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.modes import in_plain_state
from cbs_opt.report.records import FineTuneRecord
from solvers.arrays import Mask
from solvers.errors import ModelError, OptionError

#: Samples of a step of data in memory, and most of them that are held out.
_BATCH, _MOST_HELD = 128, 5000
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trained:
    """What a part of a fine-tuning did.

    Attributes
    ----------
    steps, taken, kept : int
        Planned, taken, and after how many of them the state was best.
    loss_before, loss_after : float
        On the held-out samples.
    evaluations : int
    seconds : float
    notes : tuple of str
    """

    steps: int
    taken: int
    kept: int
    loss_before: float
    loss_after: float
    evaluations: int
    seconds: float
    notes: tuple[str, ...] = ()


def check_fine_tune(options: FineTune | None, device: torch.device, *, has_loss: bool = True) -> None:
    """Raise OptionError for what cannot be done; no data are needed for that."""
    if options is None:
        return
    if options.mixed_precision == "fp16" and device.type == "cpu":
        raise OptionError(
            "mixed_precision='fp16' is for GPUs, and this runs on a CPU; leave it out (or use 'bf16', which some "
            "processors have)"
        )
    if not has_loss:
        raise OptionError("finetune trains on a loss; pass loss_fn, or use distill=Distill(), which needs none")


class Tuning:
    """The fine-tuning of a network, whole or in parts.

    Parameters
    ----------
    network : OpenNetwork
        Whose data, loss and device are used.
    options : FineTune

    Attributes
    ----------
    batches : TrainingBatches
    steps : int
        In all.
    """

    def __init__(self, network: OpenNetwork, options: FineTune) -> None:
        self.network, self.options, self._device = network, options, network.setup.place
        check_fine_tune(options, self._device)
        self._teacher = network.dense_copy().to(self._device) if options.distill is not None else None
        source, size, share = network.source, options.batch_size, options.held_out
        if isinstance(source, CalibrationData):
            size, share = size or _BATCH, min(share, _MOST_HELD / source.n)
        self.batches = TrainingBatches(source, size, share, network.setup.seed)
        self.steps = options.n_steps(self.batches.per_epoch)
        self._step, self._changes, self._evaluations = -1, torch.Generator(), 0

    def range_of(self, begin: float, end: float) -> range:
        """The steps of a part, from one share of the whole to another."""
        return range(round(begin * self.steps), round(end * self.steps))

    @in_plain_state
    def train(
        self,
        model: nn.Module,
        pruned: Mask,
        part: range | None = None,
        kept: TrainingFile | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        """Take the steps of a part on a network, in place, which is in eval mode and zero where pruned.

        Parameters
        ----------
        model : nn.Module
            Without masks.
        pruned : bool (n,)
        part : range of int, optional
            None is all.
        kept : TrainingFile, optional
            From which it goes on, and to which it writes.
        progress : callable, optional
            Called with (steps done, steps in all).

        Raises
        ------
        ModelError, OptionError, OutputError, CheckpointError
        """
        started, options = time.perf_counter(), self.options
        steps = range(self.steps) if part is None else part
        model.to(self._device)
        weights = TrainedWeights(model, self.network.layers, pruned, options.parameters)
        if not weights.tensors:
            raise ModelError("the network has no floating weights that could be trained")
        self._evaluations = 0
        optimiser = MaskedOptimiser(
            weights,
            options.optimiser(weights.masters),
            lambda done: options.rate(steps.start + done, self.steps),
            options.clip or None,
            scaled=options.mixed_precision == "fp16",
        )
        count = max(round(options.evaluations * len(steps) / self.steps), 1)
        descent = Descent(
            weights,
            optimiser,
            lambda batch, step: self._part(model, batch, steps.start + step),
            lambda: self._judged(model),
            len(steps),
            looks(len(steps), count),
            math.nan,
            options.patience,
        )
        before, earlier, start = self._begun(descent, kept, model)

        def after(now: Descent) -> None:
            due = now.done % options.checkpoint_every == 0 if options.checkpoint_every else now.done in now.looks
            if kept is not None and (due or now.done == now.steps or now.exhausted):
                tensors, numbers = now.state()
                spent = earlier + time.perf_counter() - started
                held = {f"start/{i}": value for i, value in enumerate(start)}
                about = {"before": before, "seconds": spent, "evaluations": self._evaluations}
                kept.save({**tensors, **held}, {**numbers, **about})
            if progress is not None:
                progress(steps.start + now.done, self.steps)

        if math.isfinite(before):
            with self._training(model):
                descent.run(self.batches.after(steps.start + descent.done), after)
        weights.restore(start if descent.values is None else descent.values)
        spent = earlier + time.perf_counter() - started
        found = Trained(len(steps), descent.done, descent.at, before, descent.best, self._evaluations, spent)
        return replace(found, notes=self._notes(descent, before))

    def _begun(
        self, descent: Descent, kept: TrainingFile | None, model: nn.Module
    ) -> tuple[float, float, list[Tensor]]:
        """(held-out loss before the first step, seconds spent before, state before the first step)."""
        found = None if kept is None else kept.load()
        if found is None:
            start, before = descent.weights.kept(), self._judged(model)
            descent.best = before
            return before, 0.0, start
        tensors, numbers = found
        begun = {name: value for name, value in tensors.items() if name.startswith("start/")}
        try:
            descent.restore({name: value for name, value in tensors.items() if name not in begun}, numbers)
            self._evaluations = int(numbers["evaluations"])
            held = [begun[f"start/{i}"] for i in range(len(begun))]
            return float(numbers["before"]), float(numbers["seconds"]), held
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise ModelError(f"the training in the journal is not one of this network ({error})") from error

    def _notes(self, descent: Descent, before: float) -> tuple[str, ...]:
        notes = []
        if not math.isfinite(before):
            notes.append(f"fine-tuning: the held-out loss is {before} before any step, so none was taken")
        if descent.broken:
            kept = f"after {descent.at} steps" if descent.values is not None else "before the first one"
            notes.append(
                f"fine-tuning: step {descent.done + 1} of {descent.steps} led to values that are not finite; the "
                f"network is the best state seen, that {kept}"
            )
        if self.options.mixed_precision == "bf16" and self._device.type == "cpu":
            notes.append("fine-tuning: bf16 on a CPU is fast only where the processor has it")
        return tuple(notes)

    @contextmanager
    def _training(self, model: nn.Module) -> Iterator[None]:
        """Random numbers of its own, and eval mode again afterwards."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            try:
                yield
            finally:
                model.eval()

    def _part(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, float]:
        """Sum over a piece of a batch of what is lowered, and its samples."""
        options, forward = self.options, self.network.forward
        if step != self._step:
            self._step = step
            seed = int(np.random.default_rng([self.network.setup.seed, step, 7]).integers(1 << 31))
            torch.manual_seed(seed)
            self._changes.manual_seed(seed)
        if model.training != options.train_mode:
            model.train(options.train_mode)
        inputs, targets, count = batch
        if options.augment is not None:
            inputs = self._augmented(inputs)
        inputs, targets = self._placed(inputs), None if targets is None else self._placed(targets)
        with typed_failures(inputs, targets), self._autocast():
            if self._teacher is None:
                return forward.loss(forward.output(model, inputs, targets), inputs, targets) * count, float(count)
            with torch.no_grad():
                dense = compared(forward.output(self._teacher, map_tree(torch.clone, inputs), targets)).detach()
            output = forward.output(model, inputs, targets)
            total, positions = distance(
                "kl", compared(output) / options.temperature, dense / options.temperature, batch[0]
            )
            share, warmth = float(options.distill or 0.0), options.temperature**2  # type: ignore[arg-type]
            mean = share * warmth * total / max(positions, 1.0)
            if share < 1.0:
                mean = mean + (1.0 - share) * forward.loss(output, inputs, targets)
            return mean * count, float(count)

    def _augmented(self, inputs: Tree) -> Tree:
        assert self.options.augment is not None
        try:
            changed = self.options.augment(map_tree(torch.clone, inputs), self._changes)
            shapes = [[tuple(t.shape) for _, t in leaves(tree)] for tree in (inputs, changed)]
        except Exception as error:
            raise OptionError(f"augment fails: {type(error).__name__}: {error}") from error
        if shapes[0] != shapes[1]:
            raise OptionError(f"augment must return inputs of the shapes {shapes[0]}, not {shapes[1]}")
        return changed

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        precision = self.options.mixed_precision
        return nullcontext() if precision is None else torch.autocast(self._device.type, _DTYPES[precision])

    @torch.no_grad()
    def _judged(self, model: nn.Module) -> float:
        """The mean loss on the held-out samples, in eval mode."""
        self._evaluations += 1
        model.eval()
        total, seen, forward = 0.0, 0, self.network.forward
        for raw, aims, count in self.batches.held_out:
            inputs, targets = self._placed(raw), None if aims is None else self._placed(aims)
            with typed_failures(inputs, targets):
                total += float(forward.loss(forward.output(model, inputs, targets), inputs, targets)) * count
            seen += count
        return total / seen

    def _placed(self, tree: Tree) -> Tree:
        """A copy on the device, as a network may write to what it is given; images with their channels last."""

        def place(tensor: Tensor) -> Tensor:
            layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            return tensor.to(self._device, copy=True, memory_format=layout)

        placed: Tree = map_tree(place, tree)
        return placed

    def fingerprint(self, choice: Choice) -> dict[str, str]:
        """What makes a run of one shot, or layer by layer, the run it is."""
        network = self.network
        settings = effective(network.setup, choice, None)
        found = {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}
        state = (*network.model.named_parameters(), *network.model.named_buffers())
        held = [pair for inputs, targets, _ in self.batches.held_out[:1] for pair in leaves((inputs, targets))]
        return {
            **found,
            "finetune": self.options.describe(),
            "network": digest_of(state),
            "data": f"{self.batches.n_train} {digest_of(held)}",
        }

    def record(self, parts: list[Trained]) -> FineTuneRecord:
        """Of all parts."""
        options = self.options
        return FineTuneRecord(
            optimizer=options.optimizer_name,
            lr=math.nan if options.lr is None else options.lr,
            steps=sum(part.steps for part in parts),
            steps_taken=sum(part.taken for part in parts),
            steps_kept=sum(part.kept for part in parts),
            epochs=sum(part.taken for part in parts) / self.batches.per_epoch,
            parts=len(parts),
            loss_before=parts[0].loss_before,
            loss_after=parts[-1].loss_after,
            n_samples=self.batches.n_train,
            n_held_out=self.batches.n_held_out,
            evaluations=sum(part.evaluations for part in parts),
            seconds=sum(part.seconds for part in parts),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        )
