"""Distillation after pruning: kept weights are moved towards the outputs of the dense network, masks held.

    min over v, v_P = 0:   mean over calibration samples x of  D(f(x; w), f(x; v)),    D = KL or relative squared error

Pruning minimises a quadratic model of the loss, or the errors of layers; the divergence of the outputs is the true
thing, and its gradient is zero at the dense network for every sample. Some AdamW steps (`masked_training`) are taken on
the calibration data. A share of them is held out, and by the divergence on that share it is decided whether to keep the
steps, where to stop, and whether to try shorter ones: the network is never worse by it than before.

The network stays in eval mode (no dropout, batch-norm statistics at rest). The dense outputs are computed along the
way, from a copy of the dense network, those of the held-out share once where they are small: in memory there are one
more network, and of the trained weights their gradients, AdamW's two averages, and two copies to return to. It comes
after the last stage of a plan and is not kept in its journal: a run that is taken up again distils anew.

Source: Hinton, Vinyals and Dean, *Distilling the knowledge in a neural network*, 2015.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import Batch
from cbs_opt.data.divergence import DIVERGENCES, compared, distance
from cbs_opt.data.forward import Forward
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.data.training_batches import TrainingBatches
from cbs_opt.data.trees import map_tree
from cbs_opt.engine.masked_training import PARAMETERS, TrainedWeights, linear_adamw
from cbs_opt.engine.training import Descent, looks
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.modes import in_plain_state
from cbs_opt.report.records import DistillRecord
from solvers.arguments import integer, number, one_of
from solvers.arrays import Mask
from solvers.errors import ModelError, OptionError

#: Bytes of dense outputs of the held-out share that are kept.
_MOST_BYTES = 256 << 20
#: By how much steps get shorter where those before have gained nothing.
_SHORTER = 4.0
#: Beyond it the arithmetic of single precision ends.
_LARGEST_LR = 1e6


@dataclass(frozen=True)
class Distill:
    """How kept weights are re-optimised towards the dense network's outputs; see `cbs_opt.engine.distill`.

    Attributes
    ----------
    steps : int
        Of AdamW.
    lr : float
        Length of the first step of AdamW, from which it falls linearly to zero.
    loss : {"kl", "mse", "given"}
        ``kl``: divergence of the softmax over the last dimension of the output (class logits, or logits of every
        token), for outputs that are no logits ``mse``: relative squared error; `cbs_opt.data.divergence` says how
        padding is left out, and what of an output is meant. ``given``: the loss that was passed, without the dense
        network.
    parameters : {"layers", "all"}
        What is moved: kept weights of the prunable layers, or with them all that is not frozen (biases, norms, ...).
    batch_size : int, optional
        Samples of a step. None is 32, and layer by layer what a batch of the data holds.
    held_out : float in (0, 1)
        Share of the calibration samples (layer by layer: of the batches) that no step sees; at least one.
    evaluations : int
        How often the held-out divergence is taken along the way; the best weights seen are kept.
    tries : int
        Step lengths at most, each a quarter of the one before, until one lowers the held-out divergence.

    Raises
    ------
    OptionError, UnknownNameError
    """

    steps: int = 32
    lr: float = 2e-4
    loss: str = "kl"
    parameters: str = "layers"
    batch_size: int | None = None
    held_out: float = 0.125
    evaluations: int = 4
    tries: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "evaluations", "tries"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        object.__setattr__(
            self, "lr", number("lr", self.lr, positive=True, most=_LARGEST_LR, remedy=f"at most {_LARGEST_LR:g}")
        )
        one_of("loss of a distillation", self.loss, (*DIVERGENCES, "given"))
        one_of("kind of parameters", self.parameters, PARAMETERS)
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", integer("batch_size, if not None,", self.batch_size))
        object.__setattr__(self, "held_out", number("held_out", self.held_out))
        if not 0.0 < self.held_out <= 0.5:
            raise OptionError(f"held_out must lie in (0, 0.5], the share that no step sees, not {self.held_out!r}")


@in_plain_state
def distill(
    model: nn.Module,
    dense: nn.Module,
    layers: PrunableLayers,
    pruned: Mask,
    batches: TrainingBatches,
    forward: Forward,
    options: Distill,
    progress: Callable[[int, int], None] | None = None,
) -> DistillRecord:
    """Move the kept weights of a network, in place.

    Parameters
    ----------
    model : nn.Module
        In eval mode, without masks, zero where pruned; on the device where it is to be trained.
    dense : nn.Module
        The network before, in eval mode, on the same device.
    layers : PrunableLayers
    pruned : bool (n,)
    batches : TrainingBatches
    forward : Forward
    options : Distill
    progress : callable, optional
        Called with (steps done, steps in all).

    Raises
    ------
    ModelError
        For outputs that cannot be compared, and where network or loss fail.
    """
    started = time.perf_counter()
    weights = TrainedWeights(model, layers, pruned, options.parameters)
    if not weights.tensors:
        raise ModelError("the network has no floating weights that could be distilled")
    run = _Distilling(model, dense, weights, batches, forward, options, progress)
    before = run.held_out()
    start = weights.kept()
    notes: list[str] = []
    best, lr, taken = before, math.nan, 0
    for number_of_try in range(options.tries if math.isfinite(before) else 0):
        length = options.lr / _SHORTER**number_of_try
        found = run.descend(length, best)
        if found.values is not None:
            best, lr, taken = found.best, length, found.at
        weights.restore(start if found.values is None else found.values)
        if found.broken:
            notes.append(f"distillation: steps of {length:.3g} led to values that are not finite and were undone")
        if found.values is not None:
            break
    if not math.isfinite(before):
        notes.append(f"distillation: the held-out divergence is {before}, so no step was taken")
    return DistillRecord(
        loss=options.loss,
        parameters=options.parameters,
        steps=options.steps,
        steps_kept=taken,
        lr=lr,
        loss_before=before,
        loss_after=best,
        n_samples=batches.n_train,
        n_held_out=batches.n_held_out,
        evaluations=run.evaluations,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


@dataclass(eq=False)
class _Distilling:
    """The parts of a distillation; see the module's docstring."""

    model: nn.Module
    dense: nn.Module
    weights: TrainedWeights
    batches: TrainingBatches
    forward: Forward
    options: Distill
    progress: Callable[[int, int], None] | None

    def __post_init__(self) -> None:
        self.evaluations, self._device = 0, self.weights.tensors[0].device
        self._kept: list[Tensor] | None = None

    def descend(self, lr: float, bar: float) -> Descent:
        """Steps from the weights as they are; what of them is below the bar."""
        steps, optimiser = self.options.steps, linear_adamw(self.weights, lr, self.options.steps)
        found = Descent(
            self.weights,
            optimiser,
            lambda batch, _: self._divergence(batch),
            self.held_out,
            steps,
            looks(steps, self.options.evaluations),
            bar,
        )
        tell = self.progress
        found.run(iter(self.batches), lambda now: None if tell is None else tell(now.done, steps))
        return found

    @torch.no_grad()
    def held_out(self) -> float:
        """The divergence on the held-out share."""
        self.evaluations += 1
        total, weight = 0.0, 0.0
        for batch, dense in zip(self.batches.held_out, self._dense_outputs(), strict=True):
            part, share = self._divergence(batch, dense)
            total, weight = total + float(part), weight + share
        return total / weight if weight else math.nan

    def _divergence(self, batch: Batch, dense: Tensor | None = None) -> tuple[Tensor, float]:
        """Sum and weight of a batch, whose dense output may be known."""
        inputs, targets, count = self._placed(batch)
        if self.options.loss == "given":
            with typed_failures(inputs, targets):
                loss = self.forward.loss(self.forward.output(self.model, inputs, targets), inputs, targets)
            return loss * count, float(count)
        known = self._dense_output(batch) if dense is None else dense.to(self._device)
        with typed_failures(inputs, targets):
            output = self.forward.output(self.model, inputs, targets)
        return distance(self.options.loss, compared(output), known, batch[0])

    def _dense_output(self, batch: Batch) -> Tensor:
        inputs, targets, _ = self._placed(batch)
        with torch.no_grad(), typed_failures(inputs, targets):
            return compared(self.forward.output(self.dense, inputs, targets)).detach()

    def _dense_outputs(self) -> Iterator[Tensor | None]:
        """Those of the held-out share: kept where they are small, None where they are to be computed anew."""
        if self._kept is None and self.options.loss != "given":
            self._kept = []
            for batch in self.batches.held_out:
                self._kept.append(self._dense_output(batch).cpu())
                if sum(output.nbytes for output in self._kept) > _MOST_BYTES:
                    self._kept = []
                    break
        unknown: list[Tensor | None] = [None] * len(self.batches.held_out)
        return iter(self._kept or unknown)

    def _placed(self, batch: Batch) -> Batch:
        """A copy on the device: a network may write to what it is given."""
        inputs, targets, count = batch
        place: Callable[[Tensor], Tensor] = lambda t: t.to(self._device, copy=True)  # noqa: E731
        return map_tree(place, inputs), None if targets is None else map_tree(place, targets), count
