"""Shares of the budget that the network itself was asked for."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import LayerInputOptions, Sensitivity, Setup
from cbs_opt.data.divergence import divergence
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine import sensitivity as engine
from cbs_opt.engine.sensitivity import Parts, chosen_layers, cost_curves, interpolated
from cbs_opt.report.report import PruneReport
from cbs_opt.report.sensitivity import LayerCurve
from solvers.errors import DataError, OptionError, UnknownNameError
from solvers.errors import ModelError as ModelError
from tests.cbs_opt.test_layer_inputs import Cnn, images


class Idle(nn.Module):
    """The layer `idle` adds next to nothing to the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.idle, self.head = nn.Linear(20, 30), nn.Linear(30, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.head(y + 1e-4 * torch.relu(self.idle(y)))


def data(n: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 20, generator=generator)
    with torch.no_grad():
        return x, Idle()(x).argmax(1)


def pruned(sparsity: float = 0.6, **arguments: Any) -> cbs_opt.PruneResult:
    settings = {"curvature": "layer_inputs", "solver": "sweep", "update": "own", "allocation": "measured"}
    return cbs_opt.prune(Idle().eval(), data(), sparsity=sparsity, **{**settings, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [F.cross_entropy, None])
@pytest.mark.parametrize("allocation", ["measured", "best", ["uniform", "measured"]])
@pytest.mark.parametrize("solver", ["sweep", "admm", "obd"])
def test_a_layer_that_does_not_matter_loses_more(loss: Any, allocation: Any, solver: str) -> None:
    result = pruned(loss_fn=loss, allocation=allocation, solver=solver, update="combinatorial")
    rows = {row.name: row.sparsity for row in result.report.layers}
    assert rows["idle"] > 0.9 > 0.6 > max(rows["a"], rows["head"])
    assert result.report.n_kept == int(result.layers.n * 0.4)
    assert result.report.sensitivity is not None


@pytest.mark.parametrize("sparsity", [0.0, 0.003, 0.37, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("allocation", ["measured", "best"])
def test_sums_are_exact_and_the_same_every_time(sparsity: float, allocation: str) -> None:
    first, second = (pruned(sparsity, allocation=allocation, loss_fn=F.cross_entropy) for _ in range(2))
    assert first.report.n_kept == int(first.layers.n * (1 - sparsity))
    np.testing.assert_array_equal(first.pruned, second.pruned)
    np.testing.assert_array_equal(first.weights, second.weights)


def test_the_choice_is_the_candidate_of_least_loss_and_reports_keep_it(tmp_path: Any) -> None:
    report = pruned(allocation="best", loss_fn=F.cross_entropy).report
    values = {tried.name: tried.value for tried in report.candidates}
    assert {"uniform", "magnitude", "surgeon", "measured"} < set(values) and len(values) <= 6
    assert values[report.shares] == min(values.values())
    assert report.solver == f"sweep@{report.shares}" and "taken" in str(report)
    report.save(tmp_path / "report.json")
    again = PruneReport.load(tmp_path / "report.json")
    assert again.candidates == report.candidates and again.sensitivity == report.sensitivity


def test_curves_are_those_of_networks_with_one_layer_pruned() -> None:
    """By hand: moments of what is not held out, the layer's own pruning, KL from the dense outputs on what is."""
    model, (x, y) = Idle().eval(), data()
    found = cbs_opt.sensitivity(model, (x, y), F.cross_entropy, levels=(0.3, 0.7), solver="obd", update="none")
    assert (found.measure, found.dense, found.levels, found.samples) == ("divergence", 0.0, (0.3, 0.7, 1.0), 32)
    probes = np.arange(32) * 200 // 32
    fit = np.setdiff1d(np.arange(200), probes)
    for curve in found.layers:
        for level, value in zip(found.levels[:2], curve.values, strict=False):
            one = cbs_opt.prune(
                model,
                x[fit],
                n_kept=curve.n - round(level * curve.n),
                include=[curve.name],
                curvature="layer_inputs",
                solver="obd",
                update="none",
            ).model
            with torch.no_grad():
                before, after = (F.log_softmax(net(x[probes]), -1) for net in (model, one))
            expected = float(F.kl_div(after, before, log_target=True, reduction="batchmean"))
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert [curve.n for curve in found.layers] == [600, 900, 150]


@pytest.mark.parametrize("measure", ["loss", "divergence"])
def test_segments_and_one_pass_agree(measure: str) -> None:
    """Kept outputs and only the rest of the network, or all of it each time."""
    torch.manual_seed(0)
    model, x, y = Cnn().eval(), images(60), torch.randint(0, 3, (60,))
    by_segment, whole = (
        cbs_opt.sensitivity(
            model,
            [(x[:25], y[:25]), (x[25:], y[25:])],
            F.cross_entropy,
            measure=measure,
            setup=Setup(curvature="layer_inputs", layer_inputs=LayerInputOptions(segments=segments)),
        )
        for segments in (True, False)
    )
    assert by_segment.dense == pytest.approx(whole.dense, abs=1e-6)
    for one, other in zip(by_segment.layers, whole.layers, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3, atol=1e-6)


def test_the_network_given_is_not_touched_and_tables_show_every_layer() -> None:
    model = Idle().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = cbs_opt.sensitivity(model, data(), F.cross_entropy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(name in str(found) for name in ("a", "idle", "head", "divergence"))
    assert Sensitivity.from_dict(asdict(found)) == found


def test_without_a_loss_outputs_that_are_no_logits_are_compared_by_their_error() -> None:
    x, _ = data()
    found = cbs_opt.sensitivity(Idle().eval(), x, levels=(0.5,))
    assert found.measure == "divergence"
    model = Idle().eval()
    nn.init.zeros_(model.head.weight)
    probes = x[np.arange(32) * 200 // 32]
    with torch.no_grad():
        dense, without = Idle().eval()(probes), model(probes)
    expected = float((without - dense).square().sum() / dense.square().sum())
    assert found.layers[-1].values[-1] == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_what_are_no_logits_is_measured_itself() -> None:
    x, _ = data()
    y = torch.randn(200, 5)
    found = cbs_opt.sensitivity(Idle().eval(), (x, y), F.mse_loss)
    assert found.measure == "loss" and found.dense > 0


def test_divergence_counts_real_positions_of_logits() -> None:
    torch.manual_seed(0)
    one, other = ({"logits": torch.randn(2, 3, 7)} for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found, count = divergence(one, other, {"attention_mask": mask}, None)
    rows = [
        float(F.kl_div(one["logits"][i, j].log_softmax(0), other["logits"][i, j].log_softmax(0),
                       log_target=True, reduction="sum"))
        for i, j in ((0, 0), (0, 1), (1, 0))
    ]  # fmt: skip
    assert (found, count) == (pytest.approx(sum(rows), rel=1e-5), 3.0)
    assert divergence(one, one, {}, None) == (0.0, 6.0)


def test_parts_have_no_sample_in_common() -> None:
    for n in (4, 5, 37, 500):
        parts = Parts.of(BatchStream(torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1)), judged=True)
        found = [
            [int(v) for inputs, *_ in part for v in inputs.flatten()] for part in (parts.fit, parts.probes, parts.held)
        ]
        assert sorted(chain(*found)) == list(range(n))
        assert all(found) and [len(part) for part in found[1:]] == [parts.probes.n, parts.held.n]
        assert {int(v) for inputs, *_ in parts.rough for v in inputs.flatten()} <= set(found[0])


def test_of_many_layers_some_are_measured_and_the_others_lie_between(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = cbs_opt.find_layers(nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)), nn.Linear(4, 2)))
    assert chosen_layers(layers, most=5) == {"0", "2", "4", "6", "8", "9"}
    rows = {name: [float(name), 1.0] for name in chosen_layers(layers, most=5)}
    curves = interpolated(layers, rows)
    assert [curve.values[0] for curve in curves] == list(range(10))
    assert [curve.measured for curve in curves] == [True, False] * 4 + [True, True]
    monkeypatch.setattr(engine, "MOST_LAYERS", 1)
    report = pruned(loss_fn=F.cross_entropy).report
    assert report.n_kept == int(report.n * 0.4)


def test_cost_curves_go_through_what_was_measured_and_are_powers_between() -> None:
    levels = (0.25, 0.5, 1.0)
    rows = (LayerCurve("a", 1000, tuple(7.0 + s**3 for s in levels)), LayerCurve("b", 10, (math.nan, 6.0, math.inf)))
    first, second = cost_curves(Sensitivity("loss", 7.0, levels, rows, "sweep", 8, 0.0))
    np.testing.assert_allclose(first.costs, (first.removed / 1000) ** 3, rtol=1e-9)
    assert first.removed[-1] == 1000 and second.removed[-1] == 10
    assert np.isfinite(second.costs).all() and (np.diff(second.costs) >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"allocation": "clever"}, UnknownNameError, "clever"),
        ({"allocation": ["uniform"]}, OptionError, "two or more"),
        ({"allocation": ["uniform", "uniform"]}, OptionError, "two or more"),
        ({"allocation": ["uniform", "best"]}, UnknownNameError, "best"),
        ({"allocation": 3}, OptionError, "name or several"),
        ({"curvature": "fisher", "solver": "obd", "update": "none", "loss_fn": F.cross_entropy}, OptionError, "layer"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        pruned(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"levels": ()}, OptionError, "levels"),
        ({"levels": (0.5, 0.5)}, OptionError, "rise"),
        ({"levels": (0.0, 0.5)}, OptionError, "level"),
        ({"levels": (0.5, 1.5)}, OptionError, "level"),
        ({"measure": "accuracy"}, UnknownNameError, "accuracy"),
        ({"measure": "loss"}, OptionError, "takes a loss"),
        ({"setup": Setup()}, OptionError, "layer by layer"),
    ],
)
def test_nonsense_of_curves_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        cbs_opt.sensitivity(Idle().eval(), data(), **arguments)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(DataError, match="at least 4"):
        cbs_opt.sensitivity(Idle().eval(), data(3), F.cross_entropy)


@pytest.mark.parametrize("rule", ["surgeon", "saliency"])
def test_scores_of_several_layers_are_scaled_by_the_loss_where_there_is_one(rule: str) -> None:
    with_loss = pruned(loss_fn=F.cross_entropy, allocation=rule)
    scaled = pruned(loss_fn=F.cross_entropy, allocation=rule, curvature="kfac")
    plain = pruned(allocation=rule)

    def shares(result: cbs_opt.PruneResult) -> list[int]:
        return [row.n - row.n_kept for row in result.report.layers]

    assert shares(with_loss) == shares(scaled) != shares(plain)
