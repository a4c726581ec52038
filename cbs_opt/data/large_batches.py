"""Calibration data in batches large enough for statistics of a batch to say something."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cbs_opt.data.calibration import Batch, CalibrationData, stack
from cbs_opt.data.stream import BatchStream
from cbs_opt.data.trees import leaves

#: Samples of a batch at least, where there are as many of one shape.
LEAST = 64


def large_batches(source: CalibrationData | BatchStream) -> Iterator[Batch]:
    """All samples once, in order, on the CPU; batches of a stream that can be stacked are joined."""
    if isinstance(source, CalibrationData):
        for index in np.array_split(np.arange(source.n), max(source.n // LEAST, 1)):
            yield *source.batch(index, "cpu"), len(index)
        return
    ready: list[Batch] = []
    group: list[Batch] = []
    for batch in source:
        if group and _shape(batch) != _shape(group[0]):
            yield from (_joined(part) for part in _with_rest(ready, group))
            ready, group = [], []
        group.append(batch)
        if sum(size for _, _, size in group) >= LEAST:
            if ready:
                yield _joined(ready)
            ready, group = group, []
    yield from (_joined(part) for part in _with_rest(ready, group))


def _with_rest(ready: list[Batch], rest: list[Batch]) -> list[list[Batch]]:
    """What is too small to stand alone goes with what is ready, if that is of the same shape."""
    if ready and rest and _shape(ready[0]) == _shape(rest[0]):
        return [ready + rest]
    return [part for part in (ready, rest) if part]


def _shape(batch: Batch) -> list[tuple[str, torch.Size, torch.dtype]]:
    trees = [tree for tree in batch[:2] if tree is not None]
    return [(path, tensor.shape[1:], tensor.dtype) for path, tensor in leaves(trees)]


def _joined(group: list[Batch]) -> Batch:
    data = stack(iter(group))
    return data.inputs, data.targets, data.n
