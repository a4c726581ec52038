"""Losses of a network under other weights, on calibration samples that stay in memory.

This is what solvers ask for when they pick among several masks, so it must be quick: the samples are stacked once and
already on the device, weights are written into one private network, and nothing is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.forward import Forward
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.data.stream import BatchStream
from cbs_opt.data.trees import Tree, leaves, map_tree
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.modes import evaluation_mode
from solvers.errors import ModelError

#: Most calibration samples a loss is taken over, as in the published experiments.
MOST_SAMPLES = 5000
#: Samples per batch. Images in channels-last batches that stay in the cache were measured to be a quarter faster.
_BATCH = {"cpu": 256, "images": 64, "cuda": 2048}


class Meter(Protocol):
    """Mean calibration loss of networks.

    Attributes
    ----------
    n_samples : int
        Samples it is taken over.
    calls : int
        How often it was taken.
    """

    n_samples: int
    calls: int

    def of_network(self, model: nn.Module) -> float:
        """The loss of a network as it is; nan where there is no loss."""
        ...

    def is_constant(self, model: nn.Module) -> bool:
        """Whether a network gives the same output for all samples of a batch."""
        ...


class StreamMeter:
    """Mean loss over the first samples of a stream, which never lie in memory together.

    Parameters
    ----------
    stream : BatchStream
    forward : Forward, optional
        None is no loss: nan.
    device : torch.device
    most : int
        Samples at most.
    """

    def __init__(
        self, stream: BatchStream, forward: Forward | None, device: torch.device, most: int = MOST_SAMPLES
    ) -> None:
        self._stream, self._forward, self._device, self._most = stream, forward, device, most
        self.n_samples = self.calls = 0

    def of_network(self, model: nn.Module) -> float:
        """The loss of a network as it is; nan where there is no loss."""
        if self._forward is None:
            return math.nan
        self.calls += 1
        total, seen = 0.0, 0
        with evaluation_mode(model), torch.no_grad():
            for inputs, targets, count in self._stream:
                inputs, targets = map_tree(self._put, inputs), None if targets is None else map_tree(self._put, targets)
                with typed_failures(inputs, targets):
                    loss = self._forward.loss(self._forward.output(model, inputs, targets), inputs, targets)
                total, seen = total + float(loss) * count, seen + count
                if seen >= self._most:
                    break
        self.n_samples = seen
        return total / seen

    def is_constant(self, model: nn.Module) -> bool:
        """Whether a network gives the same output for all samples of a batch; not looked at without a loss."""
        if self._forward is None or self._stream.once:
            return False
        inputs, targets, _ = self._stream.first()
        targets = None if targets is None else map_tree(self._put, targets)
        return same_output(model, self._forward, map_tree(self._put, inputs), targets)

    def _put(self, tensor: Tensor) -> Tensor:
        # A copy: a network may write to what it is given.
        return tensor.to(self._device, copy=True)


class StoredBatches:
    """Batches that stay in memory while a network and a loss are called on them, again and again.

    Some networks normalise their inputs where they are, and some losses smooth their targets likewise. So each batch is
    handed out as a copy first, and always if anything was written to one; else later as it is.

    Parameters
    ----------
    batches : list of (inputs, targets, samples)
    """

    def __init__(self, batches: list[tuple[Tree, Tree | None, int]]) -> None:
        self.batches = batches
        self.n = sum(count for _, _, count in batches)
        self._copies = False
        self._seen: set[int] = set()

    def __iter__(self) -> Iterator[tuple[Tree, Tree | None, int]]:
        for number, (inputs, targets, count) in enumerate(self.batches):
            mine = list(leaves((inputs, targets)))
            if self._copies or number not in self._seen:
                given = map_tree(torch.clone, inputs), None if targets is None else map_tree(torch.clone, targets)
                yield *given, count
                others = leaves(given)
                self._copies |= any(not torch.equal(a, b) for (_, a), (_, b) in zip(mine, others, strict=True))
                self._seen.add(number)
            else:
                versions = [t._version for _, t in mine]
                yield inputs, targets, count
                if versions != [t._version for _, t in mine]:
                    raise ModelError(
                        "network or loss have written to calibration tensors they were given, which they had not when "
                        "first called; let them write to copies"
                    )

    def mean_loss(self, model: nn.Module, forward: Forward) -> float:
        """Mean loss of a network as it is."""
        total = 0.0
        with torch.no_grad():
            for inputs, targets, count in self:
                with typed_failures(inputs, targets):
                    loss = forward.loss(forward.output(model, inputs, targets), inputs, targets)
                total += float(loss) * count
        return total / self.n


class LossMeter:
    """Mean calibration loss as a function of the prunable weights.

    Parameters
    ----------
    model : nn.Module
        On `device`; its prunable weights are overwritten by every call.
    layers : PrunableLayers
    data : CalibrationData
        Training data, never test data.
    forward : Forward
    device : torch.device
    n_samples : int
        At most this many samples, drawn under `seed`.
    seed : int
    """

    def __init__(
        self,
        model: nn.Module,
        layers: PrunableLayers,
        data: CalibrationData,
        forward: Forward,
        *,
        device: torch.device,
        n_samples: int = MOST_SAMPLES,
        seed: int = 0,
    ) -> None:
        self._model, self._layers, self._forward = model, layers, forward
        self.n_samples = min(int(n_samples), data.n)
        index = data.draw(self.n_samples, 1, seed)[:, 0] if self.n_samples < data.n else np.arange(data.n)
        images = any(t.ndim == 4 for _, t in leaves(data.inputs))
        size = _BATCH["cuda"] if device.type == "cuda" else _BATCH["images" if images else "cpu"]
        pieces = [index[i : i + size] for i in range(0, len(index), size)]
        batches = []
        for piece in pieces:
            inputs, targets = data.batch(piece, device)
            batches.append((map_tree(_channels_last, inputs), targets, len(piece)))
        self.batches = StoredBatches(batches)
        self.calls = 0

    def of_weights(self, weights: Tensor | npt.NDArray[np.float64]) -> float:
        """Mean loss with the prunable weights (n,) in the order of the network."""
        self._layers.write(self._model, weights)
        return self.of_network(self._model)

    def of_network(self, model: nn.Module) -> float:
        """Mean loss of a network of the same architecture as it is."""
        self.calls += 1
        with evaluation_mode(model):
            return self.batches.mean_loss(model, self._forward)

    def is_constant(self, model: nn.Module) -> bool:
        """Whether a network gives the same output for all samples of the first batch."""
        inputs, targets, _ = next(iter(self.batches))
        return same_output(model, self._forward, inputs, targets)


def _channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t


def same_output(model: nn.Module, forward: Forward, inputs: Tree, targets: Tree | None) -> bool:
    """Whether a network gives the same numbers for several samples."""
    with evaluation_mode(model), torch.no_grad(), typed_failures(inputs, targets):
        output = forward.output(model, inputs, targets)
    count = len(next(tensor for _, tensor in leaves(inputs)))
    numbers = [t for _, t in leaves(output) if t.is_floating_point() and t.ndim and len(t) == count]
    if count < 2 or not numbers:
        return False
    return all(float((t - t[:1]).abs().max()) <= 1e-6 * float(t.abs().max()) for t in numbers if t.numel())
