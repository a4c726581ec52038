"""Reading calibration data, and refusing data that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from cbs_opt import CalibrationData, CalibrationOptions, DataError, Forward, OptionError

X = torch.arange(40, dtype=torch.float32).reshape(20, 2)
Y = torch.arange(20) % 3


def batches(size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, 20, size)]


class Noisy(Dataset):
    """Random augmentation: never the same sample twice."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + torch.rand(2), Y[i]


class Counting(Dataset):
    """Counts how often it is read."""

    def __init__(self, n: int) -> None:
        self.n, self.reads = n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.tensor([float(i)]), i % 2


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        batches(),
        [[x.numpy(), y] for x, y in batches()],
        DataLoader(TensorDataset(X, Y), batch_size=7),
        TensorDataset(X, Y),
        DataLoader(Stream(), batch_size=3),
    ],
    ids=["tensors", "arrays", "list", "mixed", "loader", "dataset", "stream"],
)
def test_every_form_of_data_gives_the_same_samples(data: object) -> None:
    read = CalibrationData.read(data)
    assert read.n == 20
    assert torch.equal(read.inputs, X) and torch.equal(read.targets, Y)


def test_dict_batches() -> None:
    read = CalibrationData.read([{"x": x, "label": y} for x, y in batches()])
    assert read.targets is None and read.n == 20
    assert torch.equal(read.inputs["label"], Y)
    inputs, targets = read.batch(np.array([3, 1]), "cpu")
    assert targets is None and torch.equal(inputs["x"], X[[3, 1]])


def test_nested_inputs() -> None:
    read = CalibrationData.read([((x, {"again": x}), y) for x, y in batches()])
    assert isinstance(read.inputs, tuple) and torch.equal(read.inputs[1]["again"], X)


@pytest.mark.parametrize("form", ["tensors", "list", "loader", "stream"])
def test_a_random_choice_is_the_same_for_a_seed_and_without_repeats(form: str) -> None:
    def data() -> object:
        loader = DataLoader(TensorDataset(X, Y), batch_size=4)
        return {"tensors": (X, Y), "list": batches(), "loader": loader, "stream": DataLoader(Stream(), 4)}[form]

    one = CalibrationData.read(data(), CalibrationOptions(n_samples=8, seed=3))
    two = CalibrationData.read(data(), CalibrationOptions(n_samples=8, seed=3))
    other = CalibrationData.read(data(), CalibrationOptions(n_samples=8, seed=4))
    expected = CalibrationData.read((X, Y), CalibrationOptions(n_samples=8, seed=3))
    assert one.n == 8 and torch.equal(one.inputs, two.inputs) and torch.equal(one.inputs, expected.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    numbers = (one.inputs[:, 0] / 2).long()
    assert len(set(numbers.tolist())) == 8
    assert torch.equal(one.targets, Y[numbers])


def test_the_first_samples() -> None:
    options = CalibrationOptions(n_samples=8, order="first")
    for data in ((X, Y), batches(), DataLoader(TensorDataset(X, Y), batch_size=3)):
        read = CalibrationData.read(data, options)
        assert torch.equal(read.inputs, X[:8]) and torch.equal(read.targets, Y[:8])


def test_only_what_is_needed_of_a_large_data_set_is_read() -> None:
    data = Counting(10_000)
    read = CalibrationData.read(DataLoader(data, batch_size=32), CalibrationOptions(n_samples=10))
    assert read.n == 10 and data.reads == 20
    first = Counting(10_000)
    CalibrationData.read(DataLoader(first, batch_size=32), CalibrationOptions(n_samples=10, order="first"))
    assert first.reads <= 200


@pytest.mark.parametrize("n_samples", [None, 5, 15])
def test_data_that_differ_between_passes_are_refused(n_samples: int | None) -> None:
    options = CalibrationOptions(n_samples=n_samples)
    with pytest.raises(DataError, match=r"differs? between two passes.*shuffle"):
        CalibrationData.read(DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True), options)
    with pytest.raises(DataError, match="differ"):
        CalibrationData.read(DataLoader(Noisy(), batch_size=5), options)
    unchecked = CalibrationOptions(n_samples=n_samples, check_passes=False)
    assert CalibrationData.read(DataLoader(Noisy(), batch_size=5), unchecked).n == (n_samples or 20)


def test_a_pass_that_is_shorter_than_the_first_is_refused() -> None:
    class Shrinking:
        passes = 0

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.passes += 1
            return iter(batches()[: 5 - self.passes])

    with pytest.raises(DataError, match="4 batches on one pass and 3"):
        CalibrationData.read(Shrinking())


def test_a_one_shot_generator_is_refused_or_read_once_on_demand() -> None:
    with pytest.raises(DataError, match=r"one-shot generator.*check_passes=False"):
        CalibrationData.read(b for b in batches())
    once = CalibrationData.read((b for b in batches()), CalibrationOptions(check_passes=False, n_samples=4))
    assert once.n == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ([(X[:0], Y[:0])], "empty"),
        (5, "iterable"),
        ([X], "pair"),
        ([(X, Y, Y)], "pair"),
        ([(X, "labels")], "targets is a str"),
        ([("text", Y)], "inputs is a str"),
        ([{"x": X, "name": ["a"] * 20}], "'name'"),
        ([(np.array(["a"] * 20, dtype=object), Y)], "objects"),
        ([(X, Y[:5])], r"5 samples.*20"),
        ([(X, torch.tensor(3))], "scalar"),
        ([(X, Y), (X[:, :1], Y)], "do not fit"),
        ([(X, Y), {"x": X}], "one form"),
        ([((), ())], "no tensor"),
        ([(torch.where(X == 7, torch.nan, X), Y)], r"\[3, 1\] is nan"),
        ([(X, torch.where(Y == 2, torch.inf, Y.float()))], r"targets|\[1\]\[2\] is inf"),
    ],
)
def test_bad_data_are_refused_with_the_place(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CalibrationData.read(data)


def test_more_samples_than_there_are_is_refused() -> None:
    for data in ((X, Y), batches(), DataLoader(TensorDataset(X, Y))):
        with pytest.raises(DataError, match=r"21 .*hold 20"):
            CalibrationData.read(data, CalibrationOptions(n_samples=21))


@pytest.mark.parametrize("bad", [{"n_samples": 0}, {"n_samples": 2.5}, {"n_samples": True}, {"order": "last"}])
def test_bad_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        CalibrationOptions(**bad)


def test_rows_use_every_sample_before_any_recurs() -> None:
    data = CalibrationData.read((X, Y))
    assert sorted(data.draw(20, 1, 0)[:, 0]) == list(range(20))
    index = data.draw(6, 5, 1)
    assert index.shape == (6, 5) and index.dtype == np.int64
    assert sorted(index.reshape(-1)[:20]) == list(range(20))
    assert np.array_equal(index, data.draw(6, 5, 1)) and not np.array_equal(index, data.draw(6, 5, 2))


def test_inputs_are_cast_to_the_dtype_of_the_network_and_targets_are_not() -> None:
    data = CalibrationData.read((X, Y.float())).cast(torch.float64)
    assert data.inputs.dtype == torch.float64 and data.targets.dtype == torch.float32


class Keywords(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Everything(nn.Module):
    def forward(self, **entries: Tensor) -> Tensor:
        return sum(entries.values())


def test_how_the_network_is_called() -> None:
    loss = lambda output, target: output.sum() + (target["label"] if isinstance(target, dict) else target).sum()  # noqa: E731
    batch = {"a": X[:2], "b": X[:2], "label": Y[:2]}
    model = Keywords()
    forward = Forward(model, loss)
    output = forward.output(model, batch, None)
    assert torch.equal(output, 2 * X[:2])
    assert float(forward.loss(output, batch, None)) == float(output.sum() + Y[:2].sum())
    assert torch.equal(forward.output(model, {"a": X, "b": X}, Y), 2 * X)
    everything = Everything()
    assert torch.equal(Forward(everything, loss).output(everything, {"a": X, "b": X}, None), 2 * X)
    with pytest.raises(DataError, match="no entry of the dict batch"):
        forward.output(model, {"x": X}, None)
