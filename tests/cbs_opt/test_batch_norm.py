"""Batch norms under new weights: statistics against their definition, before distillation, never silently."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import CalibrationData, DataError, Distill, FisherOptions, ModelError, OptionError, PruneReport
from cbs_opt.data.large_batches import LEAST, large_batches
from cbs_opt.data.stream import BatchStream
from cbs_opt.network.batch_norm import reestimate
from solvers.errors import UnknownNameError

WAYS: dict[str, dict[str, Any]] = {
    "none": {"curvature": "none", "solver": "magnitude", "update": "none"},
    "fisher": {"fisher": FisherOptions(n_rows=40)},
    "layer_inputs": {"curvature": "layer_inputs", "solver": "sweep"},
    "kfac": {"curvature": "kfac", "solver": "obd"},
}


class Net(nn.Module):
    """Two convolutions with batch norm, and a batch norm that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.two, self.norm2 = nn.Conv2d(6, 5, 2, bias=False), nn.BatchNorm2d(5, momentum=0.3)
        self.unused, self.head = nn.BatchNorm1d(3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.one(x)))
        return self.head(F.relu(self.norm2(self.two(x))).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.unused.running_mean.fill_(7.0)
        for _ in range(4):
            model.train()(torch.randn(64, 2, 6, 6))
    return model.eval()


def samples(n: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 6, 6, generator=generator) * torch.rand(n, 1, 1, 1, generator=generator) + 0.3
    return x, network()(x).argmax(1)


def expected(model: Net, batches: list[Tensor]) -> list[Tensor]:
    """Mean and variance of both batch norms by their definition, in double precision."""
    one, two = model.one.weight.detach().double(), model.two.weight.detach().double()
    sums = [torch.zeros(6).double(), torch.zeros(6).double(), torch.zeros(5).double(), torch.zeros(5).double()]
    total = sum(len(x) for x in batches)
    for x in batches:
        hidden = x.double()
        for at, (weight, norm) in enumerate(((one, model.norm1), (two, model.norm2))):
            z = F.conv2d(hidden, weight)
            flat = z.transpose(0, 1).flatten(1)
            sums[2 * at] += len(x) / total * flat.mean(1)
            sums[2 * at + 1] += len(x) / total * flat.var(1, correction=1)
            unit = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
            scaled = norm.weight.detach().double()[:, None] * unit + norm.bias.detach().double()[:, None]
            hidden = F.relu(scaled.reshape(z.transpose(0, 1).shape).transpose(0, 1))
    return sums


def statistics(model: nn.Module) -> list[Tensor]:
    return [t for norm in (model.norm1, model.norm2) for t in (norm.running_mean, norm.running_var)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_statistics_are_those_of_the_batches_by_their_sizes() -> None:
    model, (x, _) = network(), samples()
    batches = list(x.split(40))
    model.norm1.running_var.fill_(float("nan"))
    reestimate(model, lambda net, given, _: net(given), [(b, None, len(b)) for b in batches])
    assert len(batches[-1]) == 30
    assert_same(statistics(model), expected(model, batches))
    assert bool((model.unused.running_mean == 7.0).all()) and int(model.unused.num_batches_tracked) == 0
    assert model.norm2.momentum == 0.3 and not any(module.training for module in model.modules())


@pytest.mark.parametrize("way", WAYS)
def test_every_curvature_is_followed_by_statistics_of_the_new_weights(way: str) -> None:
    model, data = network(), samples()
    before = copy.deepcopy(model.state_dict())
    plain = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.6, device="cpu", **WAYS[way])
    result = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.6, device="cpu", batch_norm="reestimate", **WAYS[way]
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(result.pruned, plain.pruned) and np.array_equal(result.weights, plain.weights)
    assert_same(statistics(plain.model), [t.double() for t in statistics(model)])
    if way in ("none", "fisher"):
        parts = np.array_split(np.arange(150), 2)
        assert_same(statistics(result.model), expected(result.model, [data[0][part] for part in parts]))
    else:
        # The stream has batches of 32, which are joined.
        assert_same(statistics(result.model), expected(result.model, [data[0][:64], data[0][64:]]))
    report = result.report
    assert (report.norms_reestimated, plain.report.norms_reestimated) == (3, 0)
    assert report.loss_old_norms == pytest.approx(plain.report.loss_pruned, rel=1e-6)
    loss = float(F.cross_entropy(result.model(data[0]).detach(), data[1]))
    assert report.loss_pruned == pytest.approx(loss, rel=1e-5) and loss != report.loss_old_norms
    assert "3 batch norms re-estimated" in str(report) and np.isnan(plain.report.loss_old_norms)
    assert result.stages[0].seconds_batch_norm > 0.0 == plain.stages[0].seconds_batch_norm


def test_magnitude_gains_by_it() -> None:
    model, data = network(), samples()
    result = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.6, device="cpu", batch_norm="reestimate", **WAYS["none"]
    )
    assert result.report.loss_pruned < result.report.loss_old_norms


def test_it_comes_before_distillation(tmp_path: Any) -> None:
    model, data = network(), samples()
    asked = {"sparsity": 0.7, "device": "cpu", "batch_norm": "reestimate", **WAYS["layer_inputs"]}
    plain = cbs_opt.prune(model, data, F.cross_entropy, **asked)
    result = cbs_opt.prune(model, data, F.cross_entropy, distill=Distill(20, 1e-2), **asked)
    report = result.report
    assert report.distill is not None and report.distill.steps_kept > 0
    assert report.loss_undistilled == pytest.approx(plain.report.loss_pruned, rel=1e-6)
    assert report.loss_old_norms == pytest.approx(plain.report.loss_old_norms, rel=1e-6)
    assert_same(statistics(result.model), [t.double() for t in statistics(plain.model)])
    report.save(tmp_path / "report.json")
    assert PruneReport.load(tmp_path / "report.json").as_dict() == report.as_dict()


def test_masks_given_are_followed_too() -> None:
    model, data = network(), samples()
    prepared = cbs_opt.prepare(model, data, F.cross_entropy, fisher=FisherOptions(n_rows=40), device="cpu")
    plain = prepared.prune(sparsity=0.6, solver="obd")
    result = prepared.prune(sparsity=0.6, solver="obd", batch_norm="reestimate")
    again = prepared.update_masks(plain.masks, batch_norm="reestimate")
    assert_same(statistics(again.model), [t.double() for t in statistics(result.model)])
    assert_same(statistics(prepared.prune(sparsity=0.6, solver="obd").model), [t.double() for t in statistics(model)])


def test_without_batch_norm_nothing_is_done_and_that_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    x = torch.randn(40, 6)
    data = x, model(x).argmax(1)
    plain = cbs_opt.prune(model, data, F.cross_entropy, device="cpu", **WAYS["none"])
    result = cbs_opt.prune(model, data, F.cross_entropy, device="cpu", batch_norm="reestimate", **WAYS["none"])
    assert result.report.norms_reestimated == 0 and result.report.loss_pruned == plain.report.loss_pruned
    assert any("no batch norm" in repair for repair in result.report.repairs)
    assert len(result.report.repairs) == len(plain.report.repairs) + 1


def test_a_loss_that_rises_by_it_is_said() -> None:
    model, (x, y) = network(), samples()
    with torch.no_grad():
        y = F.one_hot(y, 4) * 30.0
    data = x[:70] * 3.0 + 1.0, model(x[:70] * 3.0 + 1.0).detach()
    result = cbs_opt.prune(model, data, F.mse_loss, n_kept=240, device="cpu", batch_norm="reestimate", **WAYS["none"])
    assert result.report.loss_pruned > result.report.loss_old_norms
    assert any("raised the calibration loss" in warning for warning in result.report.warnings)


def test_batches_are_joined_where_they_fit() -> None:
    x = torch.arange(300.0).reshape(150, 2)
    y = torch.arange(150)
    listed = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 150, 20)]
    found = list(large_batches(BatchStream(listed)))
    assert [size for *_, size in found] == [80, 70]
    assert torch.equal(torch.cat([a for a, *_ in found]), x) and torch.equal(torch.cat([b for _, b, _ in found]), y)
    other = [(torch.ones(70, 5), y[:70]), (torch.ones(9, 5), y[:9])]
    sizes = [size for *_, size in large_batches(BatchStream([*listed[:2], *other, *listed[:1]]))]
    assert sizes == [40, 79, 20]
    stored = list(large_batches(CalibrationData(x, None, 150)))
    assert [size for *_, size in stored] == [75, 75] and torch.equal(torch.cat([a for a, *_ in stored]), x)
    assert all(size >= LEAST for *_, size in stored)
    dicts = [{"x": x[:50], "mask": y[:50]}, {"x": x[50:], "mask": y[50:]}]
    ((inputs, targets, size),) = large_batches(BatchStream(dicts))
    assert targets is None and size == 150 and torch.equal(inputs["mask"], y)


def test_what_cannot_be_is_refused() -> None:
    model, data = network(), samples()
    with pytest.raises(UnknownNameError, match="reestimate"):
        cbs_opt.prune(model, data, F.cross_entropy, batch_norm="renew")
    with pytest.raises(OptionError, match=r"StageOptions\.batch_norm"):
        cbs_opt.prune(model, data, F.cross_entropy, batch_norm="reestimate", stages=2)

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield data

    options = cbs_opt.CalibrationOptions(n_samples=100, check_passes=False)
    with pytest.raises(DataError, match="re-estimation reads them again"):
        cbs_opt.prune(
            model, once(), F.cross_entropy, calibration=options, batch_norm="reestimate", **WAYS["layer_inputs"]
        )


def test_a_single_value_per_channel_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    data = torch.randn(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ModelError, match="more than 1 value per channel"):
        cbs_opt.prune(model, data, F.cross_entropy, device="cpu", batch_norm="reestimate", **WAYS["none"])
