"""Calibration data batch by batch, for what needs no sample twice at once: they never lie in memory together.

Every pass gives the same batches, which is checked. What is read once only, or has no end, must say how many samples
are to be used (`CalibrationOptions.n_samples`); the first ones are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from cbs_opt.data.calibration import (
    Batch,
    CalibrationData,
    CalibrationOptions,
    Index,
    as_batch,
    chosen_part,
    cut,
    digest,
    repeatable,
    sample_choice,
)
from cbs_opt.data.trees import leaves, map_tree
from solvers.errors import DataError

#: Samples per batch of data that lie in memory, and bytes of one where it is cut for a processor: activations that fit
#: into memory which is used again and again are several times as fast as those that are too large for it.
_BATCH, _BYTES = 32, 5 << 19
_EMPTY = "the calibration data are empty; pass at least one batch of training samples"


class BatchStream:
    """Batches (inputs, targets or None, samples), the same on every pass, on the CPU.

    Parameters
    ----------
    data
        As for `CalibrationData.read`; also batches that are one tensor, batches of several lengths, and iterators.
    options : CalibrationOptions, optional
    dtype : torch.dtype, optional
        Floating inputs are turned into it.
    small : bool
        Cut data that lie in memory into batches small enough for a processor.

    Attributes
    ----------
    n : int
        Samples of a pass; 0 before the first one has ended.
    cut_here : bool
        Whether the size of the batches is no one's wish.

    Raises
    ------
    DataError
        For data that are no batches or whose number of samples nobody knows; while they are read, for values that are
        not finite, too few samples, batches that differ between passes, and a second pass over an iterator.
    """

    def __init__(
        self,
        data: object,
        options: CalibrationOptions | None = None,
        dtype: torch.dtype | None = None,
        *,
        small: bool = False,
    ) -> None:
        self.options, self._dtype, self.n = options or CalibrationOptions(), dtype, 0
        self._before: list[bytes] | None = None
        self._wanted: Index | None = None
        self._limit: int | None = None
        self._used = self.once = self.cut_here = False
        pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, (Tensor, np.ndarray)) for x in data)
        if isinstance(data, (Tensor, np.ndarray)):
            inputs, targets, n = as_batch(data, alone=True)
            data = CalibrationData(inputs, targets, n)
        if pair or isinstance(data, CalibrationData):
            stored = CalibrationData.read(data, self.options)
            self._data: CalibrationData | Iterable[object] = stored
            self.cut_here = True
            bytes_each = sum(t.nbytes for _, t in leaves(stored.inputs)) // max(stored.n, 1)
            self._size = max(min(_BATCH, _BYTES // max(bytes_each, 1)), 1) if small else _BATCH
            return
        data, options = chosen_part(data, self.options)
        self.once = isinstance(data, Iterator)
        self._data = data if isinstance(data, Iterator) else repeatable(data, options)
        if (options.n_samples is None and self.once) or not _ends(self._data):
            if options.n_samples is None:
                raise DataError(
                    f"the calibration data are a {type(data).__name__} of unknown length, which may never end; say how "
                    "many samples to use with CalibrationOptions(n_samples=...)"
                )
            self._limit = options.n_samples
        elif options.n_samples is not None and options.order == "first":
            self._limit = options.n_samples
        elif options.n_samples is not None:
            sizes = [as_batch(raw, number, alone=True)[2] for number, raw in enumerate(self._data)]
            self._wanted = np.sort(sample_choice(sum(sizes), options))

    def cast(self, dtype: torch.dtype) -> BatchStream:
        """The same with floating inputs in the dtype of the network."""
        self._dtype = dtype
        return self

    def first(self) -> Batch:
        """The first batch; an iterator does not lose it. Raises DataError if there is none."""
        batch: Batch | None
        if isinstance(self._data, Iterator):
            raw = next(self._data, None)
            batch = None if raw is None else as_batch(raw, alone=True)
            self._data = chain(() if raw is None else (raw,), self._data)
        else:
            batch = next(self._raw(), None)
        if batch is None:
            raise DataError(_EMPTY)
        return self._typed(batch)

    def _typed(self, batch: Batch) -> Batch:
        if self._dtype is None:
            return batch
        return map_tree(lambda t: t.to(self._dtype) if t.is_floating_point() else t, batch[0]), *batch[1:]

    def __iter__(self) -> Iterator[Batch]:
        if self.once and self._used:
            raise DataError(
                f"the calibration data are a one-shot {type(self._data).__name__} and are needed more than once; "
                "pass a list, a Dataset or a DataLoader"
            )
        self._used = True
        digests: list[bytes] = []
        n = 0
        for batch in self._raw():
            if self.options.check_passes and not self.once and not isinstance(self._data, CalibrationData):
                digests.append(digest(batch))
                number = len(digests) - 1
                if self._before is not None and digests[-1:] != self._before[number : number + 1]:
                    raise self._differs(number)
            n += batch[2]
            yield self._typed(batch)
        if n == 0:
            raise DataError(_EMPTY)
        if self._limit is not None and n < self._limit:
            raise DataError(
                f"{self._limit} calibration samples are asked for, the data hold {n}; ask for fewer or pass more data"
            )
        if digests and self._before is not None and len(digests) != len(self._before):
            raise self._differs(len(digests))
        self._before, self.n = digests or None, n

    def _differs(self, number: int) -> DataError:
        return DataError(
            f"batch {number} of the calibration data differs between two passes; switch shuffling and random "
            "augmentation off, or accept results that cannot be repeated with check_passes=False"
        )

    def _raw(self) -> Iterator[Batch]:
        if isinstance(self._data, CalibrationData):
            for start in range(0, self._data.n, self._size):
                stop = min(start + self._size, self._data.n)
                yield *self._data.batch(slice(start, stop), "cpu"), stop - start
            return
        start = 0
        for number, raw in enumerate(self._data):
            batch = as_batch(raw, number, alone=True)
            stop = start + batch[2]
            if self._wanted is not None:
                first, last = np.searchsorted(self._wanted, (start, stop))
                batch = cut(batch, self._wanted[first:last] - start)
            elif self._limit is not None and stop > self._limit:
                batch = cut(batch, np.arange(self._limit - start))
            if batch[2]:
                yield batch
            start = stop
            if self._limit is not None and start >= self._limit:
                return


class StreamPart(BatchStream):
    """Some of the samples of a stream.

    Parameters
    ----------
    whole : BatchStream
    numbers : int64, sorted
        Of the samples, from 0.
    stored : bool
        Keep the batches in memory instead of reading the whole stream in each pass.
    """

    def __init__(self, whole: BatchStream, numbers: Index, *, stored: bool = False) -> None:
        self.whole, self.numbers, self.n, self.once = whole, numbers, len(numbers), whole.once
        self.cut_here = whole.cut_here
        self._stored: list[Batch] | None = None
        if stored:
            self._stored = list(self._parts())

    def first(self) -> Batch:
        """The first batch."""
        return next(iter(self))

    def __iter__(self) -> Iterator[Batch]:
        return self._parts() if self._stored is None else iter(self._stored)

    def _parts(self) -> Iterator[Batch]:
        start = 0
        for batch in self.whole:
            first, last = np.searchsorted(self.numbers, (start, start + batch[2]))
            if last > first:
                yield cut(batch, self.numbers[first:last] - start)
            start += batch[2]


def _ends(data: Iterable[object]) -> bool:
    """Whether data say how many batches they have."""
    try:
        return len(data) >= 0  # type: ignore[arg-type]
    except TypeError:
        return False
