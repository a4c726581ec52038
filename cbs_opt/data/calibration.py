"""Calibration data: the training samples from which gradients and calibration losses are computed.

Samples are read once, stacked in memory and numbered, so that everything later is a matter of indices. A batch is

* a pair ``(x, y)``: the network is called as ``model(x)``, or ``model(**x)`` where x is a dict, and the loss as
  ``loss_fn(output, y)``;
* a dict: the network is called as ``model(**inputs)`` with the entries that its ``forward`` names (all of them if it
  takes ``**kwargs``), and the loss as ``loss_fn(output, batch)`` with the whole dict. A named tuple of three and more,
  or with an entry ``input_ids`` or ``attention_mask``, is one too, without what of it is None.

Each tensor of a batch has the samples along its first dimension. ``loss_fn`` must return the mean over the batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from cbs_opt.data.trees import Tree, leaves, map_tree, rebuilt
from solvers.arguments import flag, integer, odd_kind, seed_of
from solvers.errors import DataError, OptionError

Index = npt.NDArray[np.int64]

#: Samples per batch where a data set comes without batches.
_DEFAULT_BATCH = 256
#: Entries that are no targets.
_INPUT_NAMES = frozenset({"input_ids", "inputs_embeds", "attention_mask", "pixel_values"})
#: Samples, and bytes to be kept, after which data that do not say how long they are count as endless.
_MOST_UNSIZED, _MOST_BYTES = 200_000, 8 << 30


@dataclass(frozen=True)
class CalibrationOptions:
    """How calibration data are read.

    Attributes
    ----------
    n_samples : int, optional
        Keep this many samples; None keeps all.
    order : {"random", "first"}
        Which ones: drawn without replacement under `seed`, or the first.
    seed : int
        Of the draw.
    check_passes : bool
        Read the data twice and compare. A result cannot be repeated with data that differ from pass to pass.
    """

    n_samples: int | None = None
    order: str = "random"
    seed: int = 0
    check_passes: bool = True

    def __post_init__(self) -> None:
        if self.n_samples is not None:
            object.__setattr__(self, "n_samples", integer("n_samples, if not None,", self.n_samples))
        object.__setattr__(self, "seed", seed_of(self.seed))
        flag("check_passes", self.check_passes)
        if self.order not in ("random", "first"):
            raise OptionError(f"order must be 'random' or 'first', not {self.order!r}")


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Samples stacked in memory.

    Attributes
    ----------
    inputs : tensor or dict of tensors
        What the network is given; for dict batches the whole batch.
    targets : tree of tensors, or None for dict batches
    n : int
        Number of samples N; the first dimension of every tensor.
    """

    inputs: Tree
    targets: Tree | None
    n: int

    @classmethod
    def read(cls, data: object, options: CalibrationOptions | None = None) -> CalibrationData:
        """Read calibration data; see the module's docstring for what a batch is.

        Parameters
        ----------
        data : CalibrationData, DataLoader, Dataset, (x, y) tensors, or iterable of batches
            Without shuffling or random augmentation.
        options : CalibrationOptions, optional

        Raises
        ------
        DataError
            If the data are empty, have NaN or infinite values, no tensors, shapes that do not fit, are a one-shot
            iterator, differ between passes, or hold fewer samples than asked for.
        """
        options = options or CalibrationOptions()
        if isinstance(data, CalibrationData):
            return data._limited(options)
        if isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, (Tensor, np.ndarray)) for x in data):
            # Tensors in memory cannot differ between passes.
            return stack(iter([as_batch(data)]))._limited(options)
        data, options = chosen_part(data, options)
        return _read_batches(repeatable(data, options), options)

    @staticmethod
    def count(data: object, options: CalibrationOptions) -> int | None:
        """How many samples would be read, where that is known without reading any."""
        if options.n_samples is not None:
            return options.n_samples
        if isinstance(data, CalibrationData):
            return data.n
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (Tensor, np.ndarray)):
            return len(data[0])
        whole = data.dataset if isinstance(data, DataLoader) else data
        return len(whole) if isinstance(whole, Dataset) and _sized(whole) else None  # type: ignore[arg-type]

    def batch(self, index: Index | Tensor | slice, device: torch.device | str) -> tuple[Tree, Tree | None]:
        """(inputs, targets) of some samples on a device."""
        where = torch.from_numpy(index) if isinstance(index, np.ndarray) else index
        pick: Callable[[Tensor], Tensor] = lambda t: t[where].to(device)  # noqa: E731
        return map_tree(pick, self.inputs), None if self.targets is None else map_tree(pick, self.targets)

    def draw(self, n_rows: int, batch_size: int, seed: int) -> Index:
        """Sample numbers of `n_rows` mini-batches, int64 (n_rows, batch_size).

        Batches are consecutive pieces of random permutations of all samples, one permutation after the other, so a
        sample recurs only after every other one has been used (a batch across two permutations may hold it twice).
        """
        generator = np.random.default_rng(seed)
        needed = n_rows * batch_size
        passes = [generator.permutation(self.n) for _ in range(-(-needed // self.n))]
        return np.concatenate(passes)[:needed].reshape(n_rows, batch_size).astype(np.int64)

    def cast(self, dtype: torch.dtype) -> CalibrationData:
        """The same data with floating inputs in the dtype of the network."""
        convert: Callable[[Tensor], Tensor] = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
        return CalibrationData(map_tree(convert, self.inputs), self.targets, self.n)

    def _limited(self, options: CalibrationOptions) -> CalibrationData:
        if options.n_samples is None or options.n_samples == self.n:
            return self
        index = sample_choice(self.n, options)
        inputs, targets = self.batch(index, "cpu")
        return CalibrationData(inputs, targets, len(index))


Batch = tuple[Tree, Tree | None, int]


def as_batch(batch: Any, number: int = 0, *, alone: bool = False) -> Batch:
    """(inputs, targets or None, samples) of one raw batch, checked; `alone` also takes inputs without targets."""
    batch = _by_name(batch)
    if alone and isinstance(batch, (tuple, list)) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Mapping):
        inputs, targets = _to_tensors(dict(batch), f"batch {number}"), None
    elif alone and isinstance(batch, (Tensor, np.ndarray)):
        inputs, targets = _to_tensors(batch, f"batch {number}"), None
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs = _to_tensors(batch[0], f"batch {number}: inputs")
        targets = _to_tensors(batch[1], f"batch {number}: targets")
    else:
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise DataError(f"batch {number} is a {what}; expected a pair (x, y) or a dict of tensors")
    size = None
    for path, tensor in leaves((inputs,) if targets is None else (inputs, targets)):
        where = f"batch {number}{path}"
        if tensor.ndim == 0:
            raise DataError(f"{where} is a scalar; every tensor needs the samples along its first dimension")
        if size is None:
            size = int(tensor.shape[0])
        elif size != tensor.shape[0]:
            raise DataError(f"{where} has {tensor.shape[0]} samples, the rest of the batch {size}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = [int(i) for i in (~torch.isfinite(tensor)).nonzero()[0]]
            raise DataError(f"{where}{bad} is {float(tensor[tuple(bad)])}; remove samples that are not finite")
    if size is None:
        raise DataError(f"batch {number} holds no tensor")
    return inputs, targets, size


def _by_name(batch: Any) -> Any:
    """Named tuples of more than a pair, or with one of the names that transformers use, as dicts."""
    names = getattr(batch, "_fields", ()) if isinstance(batch, tuple) else ()
    if len(names) <= 2 and not _INPUT_NAMES.intersection(names):
        return batch
    return {name: value for name, value in zip(names, batch, strict=True) if value is not None}


def _to_tensors(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        if odd_kind(value):
            raise DataError(f"{where} is {odd_kind(value)}; expected dense tensors")
        # A copy of an inference tensor is a plain one.
        return (value.clone() if value.is_inference() else value).detach().cpu()
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            raise DataError(f"{where} is a masked array, whose mask would be ignored; fill it")
        try:
            array = np.ascontiguousarray(value)
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        except TypeError as error:
            raise DataError(f"{where} is an array of {value.dtype}s; expected numbers") from error
    if isinstance(value, Mapping):
        return {str(key): _to_tensors(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return rebuilt(value, [_to_tensors(entry, f"{where}[{i}]") for i, entry in enumerate(value)])
    raise DataError(f"{where} is a {type(value).__name__}; expected tensors or numpy arrays")


def stack(batches: Iterator[Batch]) -> CalibrationData:
    """Concatenate batches; raises DataError for those that do not fit together."""
    parts = [batch for batch in batches if batch[2]]
    if not parts:
        raise DataError("the calibration data are empty; pass at least one batch of training samples")
    first = parts[0]
    if any((part[1] is None) != (first[1] is None) for part in parts):
        raise DataError("some batches are dicts and some are (x, y) pairs; use one form")
    try:
        inputs = _concatenate([part[0] for part in parts])
        targets = None if first[1] is None else _concatenate([part[1] for part in parts])
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"batches of the calibration data do not fit together ({error}); pad them to one shape"
        ) from error
    return CalibrationData(inputs, targets, sum(part[2] for part in parts))


def _concatenate(trees: list[Any]) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(trees) if len(trees) > 1 else first
    if isinstance(first, dict):
        return {key: _concatenate([tree[key] for tree in trees]) for key in first}
    return rebuilt(first, [_concatenate(list(entries)) for entries in zip(*trees, strict=True)])


def repeatable(data: object, options: CalibrationOptions) -> Iterable[Any]:
    """Data as an iterable of batches that can be read more than once, or once if that is what was asked for."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(_Numbered(data, range(length_of(data))), batch_size=_DEFAULT_BATCH)
    if not isinstance(data, Iterable):
        raise DataError(
            f"calibration data must be an iterable of batches, a DataLoader or a Dataset, not {type(data).__name__}"
        )
    if isinstance(data, Iterator) and options.check_passes:
        raise DataError(
            f"the calibration data are a one-shot {type(data).__name__} and cannot be read twice; pass a list, a "
            "DataLoader or CalibrationData, or switch the check off with check_passes=False"
        )
    return data


def chosen_part(data: object, options: CalibrationOptions) -> tuple[object, CalibrationOptions]:
    """An indexable data set cut to the samples of a random choice, so that the rest is not read; else as they are."""
    collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate
    whole = data
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, SequentialSampler) or data.batch_size is None:
            return data, options
        whole, collate = data.dataset, data.collate_fn
    if not isinstance(whole, Dataset) or isinstance(whole, IterableDataset):
        return data, options
    if options.n_samples is None or 2 * options.n_samples > length_of(whole) or options.order != "random":
        return data, options
    part = _Numbered(whole, sample_choice(length_of(whole), options).tolist())
    return DataLoader(part, _DEFAULT_BATCH, collate_fn=collate), replace(options, n_samples=None)


class _Numbered(Dataset[Any]):
    """Samples of a data set, by number; what it throws names the sample."""

    def __init__(self, whole: Any, numbers: Sequence[int]) -> None:
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: int) -> Any:
        number = self._numbers[position]
        try:
            sample = self._whole[number]
        except Exception as error:
            raise DataError(f"sample {number} of the data set fails: {type(error).__name__}: {error}") from error
        if sample is None:
            raise DataError(f"sample {number} of the data set is None; leave it out")
        return sample


def length_of(data: Any) -> int:
    """Samples in a data set of numbered samples; raises DataError where it does not say."""
    try:
        return len(data)
    except Exception as error:
        raise DataError(
            f"{type(data).__name__} does not say how many samples it has ({type(error).__name__}: {error}); give it a "
            "__len__, or pass a list of batches"
        ) from error


def _raw(data: Iterable[Any]) -> Iterator[Any]:
    """Batches as the data give them; what they throw names the batch, and data without an end are refused."""
    try:
        iterator = iter(data)
    except Exception as error:
        raise DataError(f"the calibration data cannot be read: {type(error).__name__}: {error}") from error
    for number in itertools.count():
        try:
            raw = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the calibration data fail at batch {number}: {type(error).__name__}: {error}") from error
        yield raw


def _sized(data: Any) -> bool:
    """Whether data say how long they are."""
    try:
        return len(data) >= 0
    except Exception:
        return False


def _read_batches(data: Iterable[Any], options: CalibrationOptions) -> CalibrationData:
    """One pass that keeps what is wanted and, unless switched off, a second one that compares."""
    limit = options.n_samples
    first_only = limit if options.order == "first" else None
    sized = _sized(data)

    def batches() -> Iterator[Batch]:
        left, seen, size = first_only, 0, 0
        for number, raw in enumerate(_raw(data)):
            batch = as_batch(raw, number)
            seen += batch[2]
            size += 0 if limit is not None else sum(t.nbytes for _, t in leaves(batch[:2]))
            if left is None and not sized and (seen > _MOST_UNSIZED or size > _MOST_BYTES):
                raise DataError(
                    f"the data do not say how long they are and go on after {seen} samples; if they have no end, ask "
                    "for the first ones (CalibrationOptions(n_samples=N, order='first')), else give them a __len__"
                )
            if left is not None and batch[2] > left:
                batch = cut(batch, np.arange(left))
            if left is not None:
                left -= batch[2]
            yield batch
            if left == 0:
                return

    if limit is None or first_only is not None or not options.check_passes:
        kept = list(batches())
        if options.check_passes:
            _compare(_digests(iter(kept)), _digests(batches()))
        return stack(iter(kept))._limited(options)
    # Only the sample numbers are known after the first pass; the second one picks the samples.
    sizes: list[int] = []
    before: list[bytes] = []
    for batch in batches():
        sizes.append(batch[2])
        before.append(digest(batch))
    wanted = sample_choice(sum(sizes), options)
    ordered = np.sort(wanted)
    after: list[bytes] = []
    picked: list[Batch] = []
    start = 0
    for batch in batches():
        after.append(digest(batch))
        inside = ordered[(ordered >= start) & (ordered < start + batch[2])] - start
        picked.append(cut(batch, inside))
        start += batch[2]
    _compare(before, after)
    stacked = stack(iter(picked))
    inputs, targets = stacked.batch(np.searchsorted(ordered, wanted).astype(np.int64), "cpu")
    return CalibrationData(inputs, targets, len(wanted))


def sample_choice(total: int, options: CalibrationOptions) -> Index:
    """Numbers of the samples to keep."""
    limit = options.n_samples
    assert limit is not None
    if limit > total:
        raise DataError(
            f"{limit} calibration samples are asked for, the data hold {total}; ask for fewer or pass more data"
        )
    if options.order == "first":
        return np.arange(limit, dtype=np.int64)
    return np.random.default_rng(options.seed).permutation(total)[:limit].astype(np.int64)


def cut(batch: Batch, index: Index) -> Batch:
    """Some samples of a batch."""
    where = torch.from_numpy(index)
    pick: Callable[[Tensor], Tensor] = lambda t: t[where]  # noqa: E731
    inputs, targets, _ = batch
    return map_tree(pick, inputs), None if targets is None else map_tree(pick, targets), len(index)


def digest(batch: Batch) -> bytes:
    """A hash of the contents of a batch."""
    found = hashlib.blake2b(digest_size=16)
    for path, tensor in leaves((batch[0], batch[1])):
        found.update(f"{path}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.digest()


def _digests(batches: Iterator[Batch]) -> list[bytes]:
    return [digest(batch) for batch in batches]


def _compare(first: list[bytes], second: list[bytes]) -> None:
    """Raise DataError unless two passes gave the same batches."""
    remedy = (
        "switch shuffling (DataLoader(shuffle=False)) and random augmentation off, pass CalibrationData, or accept "
        "results that cannot be repeated with check_passes=False"
    )
    if len(first) != len(second):
        raise DataError(
            f"the calibration data gave {len(first)} batches on one pass and {len(second)} on the next; {remedy}"
        )
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other:
            raise DataError(f"batch {number} of the calibration data differs between two passes; {remedy}")
