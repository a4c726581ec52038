"""Budgets of coupled channels: what the report says is what torch counts of the smaller network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.formats.record import Example
from cbs_opt.structured.coupled import Coupling
from solvers.errors import OptionError

pytest.importorskip("torch_pruning")


class Mixed(nn.Module):
    """Batch norms, a residual addition, a depthwise convolution, a concatenation, linear layers."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        self.stem, self.bn_stem = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn_a = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b, self.bn_b = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.c, self.d = nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(9 * 16 if flat else 9, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_stem(self.stem(x)))
        x = F.relu(x + self.bn_b(self.b(F.relu(self.deep(F.relu(self.bn_a(self.a(x))))))))
        x = torch.cat([torch.sigmoid(self.c(x)), self.d(x)], 1)
        x = x.flatten(1) if self.flat else x.mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(x)))


def network(seed: int, flat: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = Mixed(flat).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_()
            assert module.running_mean is not None
            module.running_mean.normal_()
    return model


def data(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(3)
    ]


OPTIONS = {
    "magnitude": {"update": "none", "curvature": "none"},
    "obd": {"fisher": cbs_opt.FisherOptions(n_rows=40, damping=1e-3)},
    "best_swap": {"fisher": cbs_opt.FisherOptions(n_rows=40, damping=1e-3), "update": "none"},
}


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(OPTIONS)), st.floats(0.25, 0.9), st.integers(0, 5), st.booleans())
def test_what_is_kept_is_what_torch_counts_of_the_smaller_network(
    solver: str, share: float, seed: int, flat: bool
) -> None:
    """Also where torch-pruning misreads the network (a flattened concatenation): those channels stay."""
    model, batches = network(seed, flat), data(seed)
    budget = cbs_opt.Flops(share, groups="coupled")
    result = cbs_opt.prune(model, batches, F.cross_entropy, budget=budget, solver=solver, **OPTIONS[solver])  # type: ignore[arg-type]
    small, report = cbs_opt.shrink(result.model, batches[0][0])
    kept = result.report.costs["flops_kept"]
    assert kept == pytest.approx(report.flops_after / report.flops_before, abs=1e-12)
    assert kept <= share * (1 + 1e-9)
    # Nothing else is zero: what stays of the masks is what the smaller network has.
    weights = sum(p.numel() for p in small.parameters() if p.ndim > 1)
    assert result.report.n_kept == weights


def test_little_of_the_limit_is_left_over() -> None:
    result = cbs_opt.prune(
        network(0),
        data(0),
        F.cross_entropy,
        budget="flops:0.5:coupled",
        solver="obd",
        **OPTIONS["obd"],  # type: ignore[arg-type]
    )
    # One channel of the residual stream is a sixth of nearly all layers.
    assert 0.5 - 1 / 6 < result.report.costs["flops_kept"] <= 0.5


def test_bytes_are_those_of_the_weights_of_the_smaller_network() -> None:
    result = cbs_opt.prune(
        network(1),
        data(1),
        F.cross_entropy,
        budget="bytes:0.4:coupled",
        solver="obd",
        **OPTIONS["obd"],  # type: ignore[arg-type]
    )
    small, _ = cbs_opt.shrink(result.model, data(1)[0][0])
    stored = 4 * sum(p.numel() for p in small.parameters() if p.ndim > 1)
    assert result.report.costs["bytes_kept"] * result.report.costs["bytes_dense"] == pytest.approx(stored)


def test_channels_that_are_gone_stay_gone_when_norms_are_estimated_anew() -> None:
    options = {**OPTIONS["obd"], "batch_norm": "reestimate"}
    result = cbs_opt.prune(network(2), data(2), F.cross_entropy, budget="flops:0.4:coupled", solver="obd", **options)  # type: ignore[arg-type]
    _, report = cbs_opt.shrink(result.model, data(2)[0][0])
    assert report.flops_after / report.flops_before == pytest.approx(result.report.costs["flops_kept"], abs=1e-12)
    gone = {norm: ~result.masks[name].flatten(1).any(1) for name, norm in (("a", "bn_a"), ("stem", "bn_stem"))}
    assert any(rows.any() for rows in gone.values())
    for norm, rows in gone.items():
        assert not result.model.get_submodule(norm).bias[rows].any()


def test_the_network_given_is_left_as_it_was() -> None:
    model = network(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cbs_opt.prune(model, data(3), F.cross_entropy, budget="flops:0.4:coupled", solver="obd", **OPTIONS["obd"])  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("flops:0.01:coupled", "of the flops stay when all that can go is gone"),
        ("flops:0.5:filters", "coupled"),
    ],
)
def test_what_cannot_be_is_refused(budget: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cbs_opt.prune(network(0), data(0), F.cross_entropy, budget=budget, solver="obd", **OPTIONS["obd"])  # type: ignore[arg-type]


def test_a_network_of_which_no_channel_can_go_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    with pytest.raises(OptionError, match="no channel"):
        cbs_opt.prune(model, data(0), F.cross_entropy, budget="flops:0.5:coupled", solver="obd", **OPTIONS["obd"])  # type: ignore[arg-type]


def test_layer_by_layer_channels_are_not_weighed_against_one_another() -> None:
    with pytest.raises(OptionError, match="coupled"):
        cbs_opt.prune(
            network(0), data(0), F.cross_entropy, budget="flops:0.5:coupled", solver="obd", curvature="layer_inputs"
        )


def test_the_numbers_of_columns_follow_the_channels_through_flattening() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 4)).eval()
    coupling = Coupling.of(model, cbs_opt.find_layers(model), Example.of(data(0)[0][0]))
    assert coupling.n == 4
    assert sorted(coupling.rows[0].tolist()) == [-1, 0, 1, 2, 3]
    assert np.array_equal(coupling.columns[1], np.repeat(coupling.rows[0], 36))
    assert (coupling.columns[0] == -1).all()
    assert (coupling.rows[1] == -1).all()


def test_channels_that_a_batch_norm_silences_for_now_can_go_as_others_can() -> None:
    model = network(4)
    layers, example = cbs_opt.find_layers(model), Example.of(data(4)[0][0])
    before = Coupling.of(model, layers, example)
    for norm in (model.bn_a, model.bn_b, model.bn_stem):
        norm.running_mean[::2] = 1e6
    after = Coupling.of(model, layers, example)
    assert after.n == before.n
    assert all(np.array_equal(a, b) for a, b in zip(after.columns, before.columns, strict=True))
