"""Calibration data as training takes them: batches without an end, and a part held out that no step sees.

Data in memory are drawn in random permutations. A stream is read in its own order, again and again; every eighth of its
batches (for a share of 1/8) is held out, which lies in memory then, and of a single batch its last samples. A step's
batch is a list of pieces, as batches of several lengths cannot be stacked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from cbs_opt.data.calibration import Batch, CalibrationData, Index, cut
from cbs_opt.data.stream import BatchStream
from solvers.errors import DataError

#: Samples of a step where the data lie in memory and none are asked for, and of a piece that is held out.
_BATCH, _PIECE = 32, 256


class TrainingBatches:
    """Batches for steps, and those held out.

    Parameters
    ----------
    source : CalibrationData or BatchStream
    batch_size : int, optional
        Samples of a step; of a stream at least as many, in pieces of at most as many. None takes batches as a stream
        of batches has them.
    share : float in (0, 1)
        Of the samples, or of the batches of a stream, that is held out; at least one.
    seed : int
        Of the permutations.

    Attributes
    ----------
    held_out : list of (inputs, targets or None, samples)
    n_train : int
        Samples that are left for steps.
    held_index : int64, optional
        Numbers of the samples that are held out, of data in memory.

    Raises
    ------
    DataError
        For a single sample, which leaves nothing to hold out, and as the source.
    """

    def __init__(self, source: CalibrationData | BatchStream, batch_size: int | None, share: float, seed: int) -> None:
        self._source, self._size, self._seed = source, batch_size, seed
        self.held_index: Index | None = None
        if batch_size is None and isinstance(source, BatchStream) and source.cut_here:
            self._size = _BATCH
        if isinstance(source, CalibrationData):
            self._stored(source, share)
        else:
            self._streamed(source, share)

    @property
    def n_held_out(self) -> int:
        """Samples that are held out."""
        return sum(count for _, _, count in self.held_out)

    @property
    def per_epoch(self) -> float:
        """Steps of one pass over the samples that are not held out, not rounded."""
        if isinstance(self._source, CalibrationData):
            return self.n_train / self._step
        return self._n_batches if self._size is None else self.n_train / self._size

    def __iter__(self) -> Iterator[list[Batch]]:
        """The pieces of one step after the other, without an end."""
        return self.after(0)

    def after(self, steps: int) -> Iterator[list[Batch]]:
        """The same, once so many steps are done."""
        if isinstance(self._source, CalibrationData):
            return self._draws(steps)
        return itertools.islice(self._groups(), steps, None)

    def _stored(self, data: CalibrationData, share: float) -> None:
        order = np.random.default_rng(self._seed).permutation(data.n).astype(np.int64)
        held = order[: _held(data.n, share)]
        self._train = order[len(held) :]
        self.held_index = held
        pieces = [np.sort(held)[i : i + _PIECE] for i in range(0, len(held), _PIECE)]
        self.held_out: list[Batch] = [(*data.batch(piece, "cpu"), len(piece)) for piece in pieces]
        self.n_train = len(self._train)

    @property
    def _step(self) -> int:
        """Samples of a step, of data in memory."""
        return min(self._size or _BATCH, self.n_train)

    def _draws(self, skip: int) -> Iterator[list[Batch]]:
        data, generator = self._source, np.random.default_rng([self._seed, 1])
        assert isinstance(data, CalibrationData)
        size, left = self._step, self._train[:0]
        for number in itertools.count():
            while len(left) < size:
                left = np.concatenate([left, generator.permutation(self._train)])
            if number >= skip:
                yield [(*data.batch(left[:size], "cpu"), size)]
            left = left[size:]

    def _streamed(self, stream: BatchStream, share: float) -> None:
        sizes = [count for _, _, count in stream]
        every = max(round(1.0 / share), 2)
        numbers = range(every - 1, len(sizes), every) or range(len(sizes) - 1, len(sizes))
        # Of a single batch the last samples are held out, and the first ones are left.
        self._first = sizes[0] - _held(sizes[0], share) if len(sizes) == 1 else None
        self._numbers = frozenset(numbers)
        self.held_out = []
        for number, batch in enumerate(stream):
            if number in self._numbers:
                self.held_out.append(batch if self._first is None else cut(batch, np.arange(self._first, batch[2])))
        self.n_train = sum(sizes) - self.n_held_out
        self._n_batches = len(sizes) - len(self._numbers) if self._first is None else 1

    def _groups(self) -> Iterator[list[Batch]]:
        group: list[Batch] = []
        while True:
            for piece in self._pieces():
                group.append(piece)
                if self._size is None or sum(count for _, _, count in group) >= self._size:
                    yield group
                    group = []

    def _pieces(self) -> Iterator[Batch]:
        """The batches of a pass that are not held out, cut where they are larger than a step."""
        for number, batch in enumerate(self._source):  # type: ignore[arg-type]
            if number in self._numbers:
                if self._first is None:
                    continue
                batch = cut(batch, np.arange(self._first))
            size = self._size or batch[2]
            for start in range(0, batch[2], size):
                yield cut(batch, np.arange(start, min(start + size, batch[2]))) if size < batch[2] else batch


def _held(n: int, share: float) -> int:
    """How many of n samples are held out: the share, at least one, never all."""
    if n < 2:
        raise DataError(
            "the calibration data are a single sample, of which none can be held out to judge training by; pass more"
        )
    return min(max(int(n * share), 1), n - 1)
