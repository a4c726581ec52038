"""Data and networks that cannot be used are refused before work, and say why; what user code writes to is its own."""

from __future__ import annotations

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import cbs_opt
from cbs_opt.data.calibration import CalibrationData, CalibrationOptions
from solvers.errors import CBSError, DataError, ModelError
from tests.trust.test_losses import labels, net


class Samples(Dataset):
    """Numbered samples with one that is odd."""

    def __init__(self, odd: object = None, length: object = 48) -> None:
        self.x, self.y = labels()
        self.odd, self.length = odd, length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length

    def __getitem__(self, i: int) -> object:
        if i == 5 and isinstance(self.odd, Exception):
            raise self.odd
        return self.odd if i == 5 and self.odd != "fine" else (self.x[i], self.y[i])


class NoLength(Dataset):
    def __getitem__(self, i: int) -> object:
        return labels()[0][i], labels()[1][i]


@pytest.mark.parametrize("order", ["first", "random"])
@pytest.mark.parametrize(
    "odd", [None, KeyError("photo"), IndexError(5), OSError("gone"), ZeroDivisionError(), "text", (1,)]
)
def test_samples_that_fail_are_named(odd: object, order: str) -> None:
    named = odd is None or isinstance(odd, Exception)
    for n_samples in (None, 40, 6):
        if n_samples == 6 and order == "random":
            continue
        with pytest.raises(DataError, match=r"sample 5" if named else r"batch 0") as caught:
            CalibrationData.read(Samples(odd), CalibrationOptions(n_samples=n_samples, order=order))
        assert not isinstance(odd, Exception) or odd in (
            caught.value.__cause__,
            caught.value.__cause__.__cause__ or odd,
        )


@pytest.mark.parametrize(
    "data",
    [
        NoLength(),
        Samples("fine", RuntimeError("no length")),
        Samples("fine", -1),
        Samples("fine", 0),
        None,
        5,
        "text",
        [],
        [None],
        [1, 2],
        [(torch.zeros(3, 6),)],
        [(torch.zeros(3, 6), None)],
        [(torch.zeros(3, 6), torch.zeros(4))],
        [(torch.zeros(3, 6, device="meta"), torch.zeros(3))],
        [(torch.eye(6).to_sparse(), torch.zeros(6))],
        [(np.array([["a"] * 6] * 3), np.zeros(3))],
        [(np.zeros((3, 6), "datetime64[s]"), np.zeros(3))],
        [(np.ma.masked_array(np.zeros((3, 6)), np.eye(3, 6)), np.zeros(3))],
        [(torch.full((3, 6), float("nan")), torch.zeros(3))],
        [{"x": torch.zeros(3, 6)}, (torch.zeros(3, 6), torch.zeros(3))],
        [{}],
        DataLoader(Samples(KeyError("photo"))),
        iter([labels()]),
        labels,
    ],
)
def test_data_that_are_none_are_refused(data: object) -> None:
    early = isinstance(data, DataLoader) or (isinstance(data, list) and len(data) == 2 and isinstance(data[0], dict))
    few = [CalibrationOptions(n_samples=2), CalibrationOptions(n_samples=2, order="first")]
    for options in (None,) if early else (None, *few):
        with pytest.raises(DataError):
            CalibrationData.read(data, options)


def test_iterables_that_raise_are_refused_with_the_batch() -> None:
    class Failing(IterableDataset):
        def __iter__(self):
            yield labels()
            raise KeyError("photo")

    with pytest.raises(DataError, match=r"batch 1: KeyError") as caught:
        CalibrationData.read(Failing())
    assert isinstance(caught.value.__cause__, KeyError)


def test_named_tuples_and_inference_tensors_are_taken() -> None:
    pair = namedtuple("pair", "x y")
    with torch.inference_mode():
        x, y = (t.clone() for t in labels())
    result = cbs_opt.prune(net(), [pair(x, y)], F.cross_entropy, sparsity=0.5)
    expected = cbs_opt.prune(net(), labels(), F.cross_entropy, sparsity=0.5)
    assert np.array_equal(result.pruned, expected.pruned)


class Shy(nn.Linear):
    def __deepcopy__(self, memo: object) -> Shy:
        raise KeyError("not to be copied")


LAZY = [
    nn.LazyLinear(3),
    nn.Sequential(nn.Linear(6, 3), nn.LazyBatchNorm1d()),
    nn.Sequential(nn.Linear(6, 3), nn.LazyInstanceNorm1d(affine=True, track_running_stats=True)),
    nn.Sequential(nn.Linear(6, 3), nn.LazyConvTranspose1d(3, 1)),
    nn.Sequential(nn.Linear(6, 3), nn.LazyConv2d(3, 1)),
]


@pytest.mark.parametrize(
    "model",
    [
        *LAZY,
        Shy(6, 3),
        nn.Linear(6, 3, device="meta"),
        nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, device="meta")),
        nn.Linear(6, 3, dtype=torch.complex64),
        nn.ReLU(),
        nn.Linear(6, 0),
        F.relu,
        None,
        nn.Linear,
        {"fc": nn.Linear(6, 3)},
    ],
)
def test_networks_that_cannot_be_pruned_are_refused(model: object) -> None:
    if isinstance(model, nn.Module):
        model.eval()
    with pytest.raises(ModelError):
        cbs_opt.prune(model, labels(), F.cross_entropy, sparsity=0.5)


@pytest.mark.parametrize("loss", [None, 3, "cross_entropy", lambda: 0, lambda z: z.mean(), lambda z, y: "text"])
def test_losses_that_cannot_be_taken_are_refused(loss: object) -> None:
    with pytest.raises(CBSError):
        cbs_opt.prune(net(), labels(), loss, sparsity=0.5)


class InPlace(nn.Module):
    """Normalises its inputs where they are; `how` it writes to them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.how = nn.Linear(6, 8), nn.Linear(8, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "operator":
            x -= 0.3
            x *= 3.0
        elif self.how == "method":
            x.sub_(0.3).mul_(3.0)
        elif self.how == "data":
            x.data.sub_(0.3).mul_(3.0)
        else:
            x = (x - 0.3) * 3.0
        return self.fc2(torch.tanh(self.fc1(x)))


def smooth(z: Tensor, y: Tensor) -> Tensor:
    """Changes its targets."""
    y.mul_(0.5).add_(0.5 / 3)
    return F.cross_entropy(z, y)


@pytest.mark.parametrize("how", ["operator", "method", "data"])
@pytest.mark.parametrize("stages", [1, 2])
def test_forwards_that_write_to_their_inputs_change_nothing_of_ours(how: str, stages: int) -> None:
    arguments = {"sparsity": 0.5, "stages": stages, "solver": "rmp" if stages == 1 else "obs"}
    x, y = labels()
    before = x.clone()
    expected = cbs_opt.prune(InPlace("copy").eval(), (x, y), F.cross_entropy, **arguments)
    found = cbs_opt.prune(InPlace(how).eval(), (x, y), F.cross_entropy, **arguments)
    assert torch.equal(x, before)
    assert np.array_equal(found.pruned, expected.pruned)
    assert found.report.loss_dense == pytest.approx(expected.report.loss_dense, rel=1e-6)
    assert found.report.loss_pruned == pytest.approx(expected.report.loss_pruned, rel=1e-5)
    with torch.no_grad():
        true = float(F.cross_entropy(found.model(x.clone()), y))
    assert stages > 1 or found.report.loss_pruned == pytest.approx(true, rel=1e-5)


def test_losses_that_write_to_their_targets_change_nothing_of_ours() -> None:
    x, y = labels()
    soft = F.one_hot(y, 3).float()
    before = soft.clone()
    expected = cbs_opt.prune(net(), (x, soft), lambda z, t: smooth(z, t.clone()), sparsity=0.5, solver="rmp")
    found = cbs_opt.prune(net(), (x, soft), smooth, sparsity=0.5, solver="rmp")
    assert torch.equal(soft, before)
    assert np.array_equal(found.pruned, expected.pruned)
    assert found.report.loss_dense == pytest.approx(expected.report.loss_dense, rel=1e-6)
    assert found.report.loss_pruned == pytest.approx(expected.report.loss_pruned, rel=1e-6)


def test_networks_are_not_changed() -> None:
    model = InPlace("operator").eval()
    before = copy.deepcopy(model.state_dict())
    cbs_opt.prune(model, labels(), F.cross_entropy, sparsity=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
