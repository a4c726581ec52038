"""The training samples of a staged pruning: fresh ones for the gradients of a stage, kept ones that judge its step.

Whatever is random is drawn from (seed, number of the stage, use), so that a stage can be run again by itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import Batch, CalibrationData, Index
from cbs_opt.data.distillation import DistilledForward
from cbs_opt.data.losses import StoredBatches
from cbs_opt.data.trees import Tree
from cbs_opt.engine.stage_options import LEAST_BATCH, StageOptions
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.gradients import GradientSample, sample_gradients
from cbs_opt.network.batch_norm import batch_statistics, tracked_norms
from cbs_opt.network.modes import evaluation_mode
from solvers.errors import DataError

#: Samples whose gradients are taken together; bounds the memory that augmented copies take.
_SAMPLES_AT_ONCE = 4096
#: Samples per batch of a loss by device type.
_EVALUATION_BATCH = {"cpu": 500, "cuda": 2000}
#: Uses of random numbers within a stage.
ROWS, AUGMENT, NORMS, HELD_OUT, SOLVER = range(5)


def generator(seed: int, stage: int, use: int) -> np.random.Generator:
    """Random numbers for one use in one stage."""
    return np.random.default_rng([seed, stage, use])


def derived_seed(seed: int, stage: int, use: int) -> int:
    """A seed for one use in one stage."""
    return int(generator(seed, stage, use).integers(1 << 31))


class StageSamples:
    """Gradients and losses of a network over its training samples.

    Parameters
    ----------
    workspace : Workspace
        Its network's weights change from stage to stage; its setup has the rows.
    options : StageOptions
    teacher : nn.Module, optional
        The dense network, for distillation; None takes a copy of the network as it is given.
    held : int64, optional
        Samples that are held out for something else as well; as many of these are the kept ones, and none is fresh.

    Raises
    ------
    DataError
        For fewer than five samples, or data that distillation cannot use.
    """

    def __init__(
        self, workspace: Workspace, options: StageOptions, teacher: nn.Module | None, held: Index | None = None
    ) -> None:
        self.model, self.layers, self.data = workspace.model, workspace.layers, workspace.data
        self.options, self.fisher, self.device = options, workspace.setup.options, workspace.setup.place
        self.seed = self.fisher.seed if self.fisher.seed is not None else workspace.setup.seed
        self._at_once = _EVALUATION_BATCH.get(self.device.type, _EVALUATION_BATCH["cpu"])
        self.forward = workspace.forward
        if options.distillation is not None:
            dense = copy.deepcopy(self.model) if teacher is None else teacher
            self.forward = DistilledForward(self.forward, dense, options.distillation)
        self.follows_norms = options.batch_norm and bool(tracked_norms(self.model))
        n = self.data.n
        order = generator(self.seed, 0, HELD_OUT).permutation(n)
        n_held = min(options.held_out, n // 5)
        first_fit = n_held
        if held is not None:
            n_held, first_fit = min(n_held, len(held)), len(held)
            order = np.concatenate([held, np.setdiff1d(np.arange(n), held)])
        if n_held < 1:
            raise DataError(f"stages keep a fifth of the training samples for their searches; {n} are too few")
        self._held_index, self._fit_index = (
            np.sort(order[:n_held]),
            np.sort(order[first_fit:]),
        )
        self.held_out = self._held_out_batches()
        self._factor: Tensor | None = None
        #: Losses taken since this was set to zero.
        self.evaluations = 0

    @property
    def norms_by_batch(self) -> bool:
        """Whether gradients are taken under batch statistics."""
        return self.follows_norms and self.fisher.batch_size >= LEAST_BATCH

    def loss(self, weights: np.ndarray | Tensor) -> float:
        """Mean loss on the held-out samples; the weights stay in the network. inf where it is not finite."""
        self.evaluations += 1
        self.layers.write(self.model, weights)
        with batch_statistics(self.model) if self.follows_norms else evaluation_mode(self.model):
            loss = self.held_out.mean_loss(self.model, self.forward)
        return loss if math.isfinite(loss) else math.inf

    def gradients(self, stage: int) -> GradientSample:
        """Over fresh samples, the rows centred where that is asked for; the next call writes over the factor."""
        fisher, options = self.fisher, self.options
        rows, size = fisher.rows_for(self.data), fisher.batch_size
        index = _draw(self._fit_index, rows, size, generator(self.seed, stage, ROWS))
        if self._factor is None:
            self._factor = torch.empty(rows, self.layers.n, dtype=fisher.torch_dtype, device=self.device)
        factor = self._factor
        mean = torch.zeros(self.layers.n, dtype=torch.float64, device=self.device)
        changes = torch.Generator().manual_seed(derived_seed(self.seed, stage, AUGMENT))
        loss, seconds, methods, notes = 0.0, 0.0, dict[str, None](), dict[str, None]()
        as_they_are = options.augment is None and options.distillation is None
        together = rows if as_they_are else max(1, _SAMPLES_AT_ONCE // size)
        for start in range(0, rows, together):
            part = index[start : start + together]
            data = self.data
            if not as_they_are:
                inputs, targets = self._batch(part.reshape(-1), changes)
                data = CalibrationData(inputs, targets, part.size)
                part = np.arange(part.size, dtype=np.int64).reshape(part.shape)
            target = factor[start : start + together]
            sample = sample_gradients(
                self.model,
                self.layers,
                data,
                self.forward,
                part,
                device=self.device,
                dtype=fisher.torch_dtype,
                method=fisher.gradient_method,
                memory_budget=fisher.memory_budget,
                batch_norm="batch" if self.norms_by_batch else "running",
                out=target,
            )
            share = len(part) / rows
            if share < 1.0:
                target.mul_(math.sqrt(share))
            mean += share * sample.mean
            loss += share * sample.loss
            seconds += sample.seconds
            methods[sample.method] = None
            notes.update(dict.fromkeys(sample.notes))
        if options.centred and rows > 1:
            factor -= (mean / math.sqrt(rows)).to(factor.dtype)
        return GradientSample(factor, mean, loss, rows, size, ", ".join(methods), seconds, notes=tuple(notes))

    def norm_batches(self, stage: int) -> Iterator[Batch]:
        """Batches to re-estimate batch-norm statistics with."""
        torch_generator = torch.Generator().manual_seed(derived_seed(self.seed, stage, NORMS))
        index = generator(self.seed, stage, NORMS).permutation(self._fit_index)[: self.options.batch_norm_samples]
        size = self._at_once // 2
        pieces = [index[i : i + size] for i in range(0, len(index), size)]
        if len(pieces) > 1 and len(pieces[-1]) < size // 2:
            # The batches count alike, so a small one would weigh too much.
            pieces.pop()
        for piece in pieces:
            yield *self._plain_batch(piece, torch_generator), len(piece)

    def _plain_batch(self, index: Index, changes: torch.Generator | None) -> tuple[Tree, Tree | None]:
        """(inputs, targets) as the data have them, augmented if there is an augmentation, on the device."""
        inputs, targets = self.data.batch(index, "cpu")
        if self.options.augment is not None and changes is not None:
            inputs = self.options.augment(inputs, changes)
        return CalibrationData(inputs, targets, len(index)).batch(slice(None), self.device)

    def _batch(self, index: Index, changes: torch.Generator | None) -> tuple[Tree, Tree | None]:
        """As `_plain_batch`, with the targets of the loss."""
        inputs, targets = self._plain_batch(index, changes)
        if not isinstance(self.forward, DistilledForward):
            return inputs, targets
        batch, size = CalibrationData(inputs, targets, len(index)), self._at_once
        logits = []
        for start in range(0, len(index), size):
            part = batch.batch(slice(start, start + size), self.device)
            logits.append(self.forward.teacher_logits(*part))
        assert targets is not None
        return inputs, (targets, torch.cat(logits))

    def _held_out_batches(self) -> StoredBatches:
        changes = torch.Generator().manual_seed(derived_seed(self.seed, 0, AUGMENT))
        size = self._at_once
        pieces = [self._held_index[i : i + size] for i in range(0, len(self._held_index), size)]
        return StoredBatches([(*self._batch(piece, changes), len(piece)) for piece in pieces])


def _draw(index: Index, rows: int, size: int, random: np.random.Generator) -> Index:
    """Sample numbers (rows, size): consecutive pieces of random permutations of `index`."""
    passes = [random.permutation(index) for _ in range(-(-rows * size // len(index)))]
    return np.concatenate(passes)[: rows * size].reshape(rows, size)
