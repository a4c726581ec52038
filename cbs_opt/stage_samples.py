"""The training samples of a staged pruning: fresh ones for the gradients of a stage, kept ones that judge its step.

Whatever is random is drawn from (seed, number of the stage, use), so that a stage can be run again by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.batch_norm import batch_statistics, tracked_norms
from cbs_opt.calibration import CalibrationData, Forward, Index, Tree
from cbs_opt.distillation import DistilledForward
from cbs_opt.fisher import FisherOptions
from cbs_opt.gradients import sample_gradients
from cbs_opt.layers import PrunableLayers
from cbs_opt.network_checks import evaluation_mode
from cbs_opt.stage_options import LEAST_BATCH, StageOptions
from solvers.errors import DataError

#: Samples whose gradients are taken together; bounds the memory that augmented copies take.
_SAMPLES_AT_ONCE = 4096
_EVALUATION_BATCH = {"cpu": 500, "cuda": 2000}
#: Uses of random numbers within a stage.
ROWS, AUGMENT, NORMS, HELD_OUT, SOLVER = range(5)


def generator(seed: int, stage: int, use: int) -> np.random.Generator:
    """Random numbers for one use in one stage."""
    return np.random.default_rng([seed, stage, use])


def number(seed: int, stage: int, use: int) -> int:
    """A seed for one use in one stage."""
    return int(generator(seed, stage, use).integers(1 << 31))


class StageSamples:
    """Gradients and losses of a network over its training samples.

    Parameters
    ----------
    model : nn.Module
        Whose weights change from stage to stage.
    layers : PrunableLayers
    data : CalibrationData
    forward : Forward
    options : StageOptions
    fisher : FisherOptions
    teacher : nn.Module
        The dense network, for distillation.
    device : torch.device
    seed : int

    Raises
    ------
    DataError
        For fewer than five samples, or data that distillation cannot use.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: PrunableLayers,
        data: CalibrationData,
        forward: Forward,
        options: StageOptions,
        fisher: FisherOptions,
        teacher: nn.Module | None,
        device: torch.device,
        seed: int,
    ) -> None:
        self._model, self._layers, self._data, self._device = model, layers, data, device
        self._options, self._fisher, self._seed = options, fisher, seed
        self.forward = forward
        if options.distillation is not None:
            assert teacher is not None
            self.forward = DistilledForward(forward, teacher, options.distillation)
        self.follows_norms = options.batch_norm and bool(tracked_norms(model))
        order = generator(seed, 0, HELD_OUT).permutation(data.n)
        n_held = min(options.held_out, data.n // 5)
        if n_held < 1:
            raise DataError(f"stages keep a fifth of the training samples for their searches; {data.n} are too few")
        self._held_index, self._fit_index = np.sort(order[:n_held]), np.sort(order[n_held:])
        self.held_out = self._held_out_batches()
        self._factor: Tensor | None = None
        #: Losses taken since this was set to zero.
        self.evaluations = 0

    @property
    def norms_by_batch(self) -> bool:
        """Whether gradients are taken under batch statistics."""
        return self.follows_norms and self._fisher.batch_size >= LEAST_BATCH

    def loss(self, weights: np.ndarray | Tensor) -> float:
        """Mean loss on the held-out samples; the weights stay in the network. inf where it is not finite."""
        self.evaluations += 1
        self._layers.write(self._model, weights)
        total = 0.0
        mode = batch_statistics(self._model) if self.follows_norms else evaluation_mode(self._model)
        with mode, torch.no_grad():
            for inputs, targets, count in self.held_out:
                loss = self.forward.loss(self.forward.output(self._model, inputs, targets), inputs, targets)
                total += float(loss) * count
        return total / len(self._held_index) if math.isfinite(total) else math.inf

    def gradients(self, stage: int) -> tuple[Tensor, Tensor, float]:
        """(A (r, n), g / b float64 (n,), mean loss) over fresh samples; the next call writes over A."""
        fisher, options = self._fisher, self._options
        rows, size = fisher.rows_for(self._data), fisher.batch_size
        index = _draw(self._fit_index, rows, size, generator(self._seed, stage, ROWS))
        if self._factor is None:
            self._factor = torch.empty(rows, self._layers.n, dtype=fisher.torch_dtype, device=self._device)
        factor = self._factor
        mean = torch.zeros(self._layers.n, dtype=torch.float64, device=self._device)
        changes = torch.Generator().manual_seed(number(self._seed, stage, AUGMENT))
        loss = 0.0
        as_they_are = options.augment is None and options.distillation is None
        together = rows if as_they_are else max(1, _SAMPLES_AT_ONCE // size)
        for start in range(0, rows, together):
            part = index[start : start + together]
            data = self._data
            if not as_they_are:
                inputs, targets = self._batch(part.reshape(-1), changes)
                data = CalibrationData(inputs, targets, part.size)
                part = np.arange(part.size, dtype=np.int64).reshape(part.shape)
            target = factor[start : start + together]
            sample = sample_gradients(
                self._model,
                self._layers,
                data,
                self.forward,
                part,
                device=self._device,
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
        if options.centred and rows > 1:
            factor -= (mean / math.sqrt(rows)).to(factor.dtype)
        return factor, mean / size, loss

    def norm_batches(self, stage: int) -> Iterator[tuple[Tree, Tree | None]]:
        """Batches to re-estimate batch-norm statistics with."""
        torch_generator = torch.Generator().manual_seed(number(self._seed, stage, NORMS))
        index = generator(self._seed, stage, NORMS).permutation(self._fit_index)[: self._options.batch_norm_samples]
        size = _EVALUATION_BATCH.get(self._device.type, 500) // 2
        pieces = [index[i : i + size] for i in range(0, len(index), size)]
        if len(pieces) > 1 and len(pieces[-1]) < size // 2:
            # The batches count alike, so a small one would weigh too much.
            pieces.pop()
        for piece in pieces:
            yield self._plain_batch(piece, torch_generator)

    def _plain_batch(self, index: Index, changes: torch.Generator | None) -> tuple[Tree, Tree | None]:
        """(inputs, targets) as the data have them, augmented if there is an augmentation, on the device."""
        inputs, targets = self._data.batch(index, "cpu")
        if self._options.augment is not None and changes is not None:
            inputs = self._options.augment(inputs, changes)
        return CalibrationData(inputs, targets, len(index)).batch(slice(None), self._device)

    def _batch(self, index: Index, changes: torch.Generator | None) -> tuple[Tree, Tree | None]:
        """As `_plain_batch`, with the targets of the loss."""
        inputs, targets = self._plain_batch(index, changes)
        if not isinstance(self.forward, DistilledForward):
            return inputs, targets
        batch, size = CalibrationData(inputs, targets, len(index)), _EVALUATION_BATCH.get(self._device.type, 500)
        logits = []
        for start in range(0, len(index), size):
            part = batch.batch(slice(start, start + size), self._device)
            logits.append(self.forward.teacher_logits(*part))
        assert targets is not None
        return inputs, (targets, torch.cat(logits))

    def _held_out_batches(self) -> list[tuple[Tree, Tree | None, int]]:
        changes = torch.Generator().manual_seed(number(self._seed, 0, AUGMENT))
        size = _EVALUATION_BATCH.get(self._device.type, 500)
        pieces = [self._held_index[i : i + size] for i in range(0, len(self._held_index), size)]
        return [(*self._batch(piece, changes), len(piece)) for piece in pieces]


def _draw(index: Index, rows: int, size: int, random: np.random.Generator) -> Index:
    """Sample numbers (rows, size): consecutive pieces of random permutations of `index`."""
    passes = [random.permutation(index) for _ in range(-(-rows * size // len(index)))]
    return np.concatenate(passes)[: rows * size].reshape(rows, size)
