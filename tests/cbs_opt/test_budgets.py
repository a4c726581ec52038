"""Budgets of networks: FLOPs against torch's own counter, bytes, patterns; one shot and layer by layer; bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import cbs_opt
from cbs_opt import Bytes, Flops
from cbs_opt.data.forward import Forward
from cbs_opt.data.stream import BatchStream
from cbs_opt.measure.costs import Costs, budget_of
from cbs_opt.measure.latency import LayerTimes
from cbs_opt.measure.layer_inputs import Streamed
from solvers import NM, Tiles
from solvers.errors import CapabilityError, DataError, ModelError, OptionError, ProblemError


def costs_of(model: nn.Module, x: torch.Tensor, budget: cbs_opt.CostBudget, **which: Any) -> Costs:
    model = model.eval()
    layers = cbs_opt.find_layers(model, **which)
    data = BatchStream((x, torch.zeros(len(x))))
    streamed = Streamed(model, layers, data, Forward(model, F.cross_entropy), torch.device("cpu"))
    return Costs.of(budget, streamed, (x, None, len(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x, x, x)[0]
        return out


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.one(self.one(x))
        return out


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)), (4, 7)),
    "positions": (lambda: nn.Linear(7, 5), (3, 11, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), (2, 4, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 5, padding="same", groups=4), (2, 4, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 4, stride=3, padding=2), (2, 3, 17)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2)), (2, 2, 4, 5, 6)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 6)),
    "attention": (Attention, (2, 5, 12)),
    "called twice": (Shared, (3, 6)),
}
#: What multiplies weights; attention scores are products of activations.
_WITH_WEIGHTS = ("mm", "addmm", "convolution")


@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.backends.mha.set_fastpath_enabled(False)
        model(x)
    torch.backends.mha.set_fastpath_enabled(True)
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if op.__name__ in _WITH_WEIGHTS)  # type: ignore[union-attr]
    assert counted > 0
    assert costs_of(model, x, Flops(0.5)).total * shape[0] == counted


def test_bytes_are_those_of_the_dtype_and_embeddings_cost_no_flops() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3)).double()
    tokens = torch.randint(0, 10, (2, 5))
    assert costs_of(model, tokens, Bytes(0.5)).each.tolist() == [8.0] * 12
    both = costs_of(model, tokens, Flops(0.5), include=("*", "0"))
    assert both.each.tolist() == [0.0] * 40 + [10.0] * 12


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 12)).eval()


def data(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, x.mean((2, 3)).argmax(1)


def cost_of(masks: Any, budget: cbs_opt.CostBudget) -> tuple[float, float]:
    """(what stays costs, the limit), from figures worked out by hand."""
    each = {"0": 64.0, "2": 16.0, "5": 1.0} if isinstance(budget, Flops) else dict.fromkeys("025", 1.0)
    return (
        sum(each[name] * float(mask.sum()) for name, mask in masks.items()),
        budget.share * sum(each[name] * mask.numel() for name, mask in masks.items()),
    )


ONE_SHOT = {"fisher": cbs_opt.FisherOptions(n_rows=40, damping=1e-3)}
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude", "update": "none", "curvature": "none"},
    "obs": {"solver": "obs", **ONE_SHOT},
    "greedy_ls": {"solver": "greedy_ls", **ONE_SHOT},
    "admm, layer by layer": {"solver": "admm", "curvature": "layer_inputs"},
    "sweep": {"solver": "sweep", "update": "own", "curvature": "layer_inputs", "allocation": "magnitude"},
    "kfac": {"solver": "obd", "curvature": "kfac"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["flops:0.3", "bytes:0.4"])
def test_what_stays_costs_what_is_asked_for_in_every_way_of_pruning(way: str, text: str) -> None:
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget=text, **WAYS[way])
    spent, limit = cost_of(result.masks, budget_of(text))
    assert 0.99 * limit <= spent <= limit * (1 + 1e-9)
    report, name = result.report, text.partition(":")[0]
    assert report.budget == text
    assert report.costs[f"{name}_kept"] == pytest.approx(spent / limit * report.costs[f"{name}_limit"])
    assert f"budget {text}:" in str(report) and "zeros alone make nothing faster" in " ".join(str(report).split())


def test_flops_leave_other_weights_than_a_count_and_ones_that_cost_more_go_first() -> None:
    ways = {"solver": "magnitude", "update": "none", "curvature": "none"}
    cheap = cbs_opt.prune(net(), data(), F.cross_entropy, budget=Flops(0.3), **ways)
    plain = cbs_opt.prune(net(), data(), F.cross_entropy, n_kept=cheap.report.n_kept, **ways)
    assert cheap.masks["0"].sum() < plain.masks["0"].sum()
    assert cost_of(cheap.masks, Flops(0.3))[0] < cost_of(plain.masks, Flops(0.3))[0]
    same = cbs_opt.prune(net(), data(), F.cross_entropy, budget=Bytes(0.3), **ways)
    count = cbs_opt.prune(net(), data(), F.cross_entropy, n_kept=same.report.n_kept, **ways)
    assert all(torch.equal(mask, count.masks[name]) for name, mask in same.masks.items())


@pytest.mark.parametrize("way", WAYS)
def test_two_of_every_four_stay_in_every_way_of_pruning(way: str) -> None:
    arguments = {name: value for name, value in WAYS[way].items() if name != "allocation"}
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget="2:4", **arguments)
    for mask in result.masks.values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    assert result.report.budget == "2:4" and result.report.sparsity == 0.5


@pytest.mark.parametrize("way", ["magnitude", "greedy_ls", "kfac"])
def test_channels_go_whole_in_all_layers_together_or_in_each(way: str) -> None:
    result = cbs_opt.prune(
        net(), data(), F.cross_entropy, budget="channels:0.5", objective="selection", exclude="5", **WAYS[way]
    )
    gone = []
    for mask in result.masks.values():
        rows = mask.reshape(mask.shape[0], -1)
        assert (rows.all(1) | ~rows.any(1)).all()
        gone.append(int((~rows.any(1)).sum()))
    assert sum(gone) == 8 and (way != "kfac" or gone == [4, 4])


@pytest.mark.parametrize("solver", ["magnitude", "obd", "greedy_ls", "best_swap"])
@pytest.mark.parametrize("text", ["flops:0.5:channels", "bytes:0.4:channels"])
def test_channels_go_whole_until_what_stays_costs_little_enough(solver: str, text: str) -> None:
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget=text, solver=solver, exclude="5", **ONE_SHOT)
    for mask in result.masks.values():
        rows = mask.reshape(mask.shape[0], -1)
        assert (rows.all(1) | ~rows.any(1)).all()
    name, each = text.partition(":")[0], {"0": 64.0, "2": 16.0} if "flops" in text else dict.fromkeys("02", 1.0)
    spent = sum(each[layer] * float(mask.sum()) for layer, mask in result.masks.items())
    whole = sum(each[layer] * mask.numel() for layer, mask in result.masks.items())
    share = budget_of(text).kept
    assert share - 0.2 < spent / whole <= share + 1e-9
    assert result.report.costs[f"{name}_kept"] == pytest.approx(spent / whole) and result.report.budget == text


def test_text_forms_come_back_and_a_sparsity_is_a_sparsity() -> None:
    for text in (
        "flops:0.5",
        "bytes:0.25",
        "2:4",
        "4:8",
        "channels:0.5",
        "columns:0.25",
        "4x4:0.5",
        "flops:0.5:channels",
    ):
        assert str(budget_of(text)) == text
    assert budget_of("2:4") == NM(2, 4) and budget_of("channels:0.5") == Tiles(0.5)
    choice = cbs_opt.Choice(budget="sparsity:0.75")
    assert choice.sparsity == 0.75 and choice.budget is None


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.a(x)
        return out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": "flops:1.5"}, OptionError, r"flops that may remain lies in \(0, 1\), not 1.5"),
        ({"budget": "flops:nan"}, OptionError, "share of flops"),
        ({"budget": "bytes:half"}, OptionError, "'half' is no share; write e.g. 'bytes:0.5'"),
        ({"budget": "watts:0.5"}, OptionError, "known forms.*'flops:0.5', 'bytes:0.5'"),
        ({"budget": "flops:0.5:layers"}, OptionError, "are 'channels', 'coupled', 'heads', or left out, not 'layers'"),
        ({"budget": "flops:0.5:channels", "min_kept": 2}, OptionError, "floors are of single weights"),
        ({"budget": "flops:0.5:channels", "curvature": "kfac"}, OptionError, "takes curvature='fisher'"),
        ({"budget": "flops:0.5:channels", "solver": "iht"}, CapabilityError, "these do: .*obd"),
        ({"budget": 0.5}, OptionError, "must be a text such as 'flops:0.5' or '2:4'"),
        ({"budget": "5:4"}, OptionError, "n of n:m"),
        ({"budget": "2:4", "sparsity": 0.5}, OptionError, "give one of sparsity, n_kept and budget"),
        ({"budget": "2:4", "min_kept": 2}, OptionError, "says what stays of each row"),
        ({"budget": "2:5"}, OptionError, "does not fit 3 of 3 layers: '0', of 8 x 36 weights.*exclude="),
        ({"budget": "2:16"}, OptionError, r"does not fit 2 of 3 layers.*exclude=\['0', '2'\]"),
        ({"budget": "3x3:0.5", "include": "5"}, OptionError, "does not fit 1 of 1 layers"),
        ({"budget": "flops:0.5:coupled", "stages": 3}, OptionError, "by what a smaller network lacks"),
        (
            {"budget": "2:4", "curvature": "kfac", "allocation": "uniform"},
            OptionError,
            "leave allocation='uniform' out",
        ),
        (
            {"budget": "2:4", "fisher": cbs_opt.FisherOptions(n_rows=8, blocks="clusters:50")},
            OptionError,
            "consecutive",
        ),
        ({"budget": "flops:0.5", "solver": "brute_force"}, CapabilityError, "at most|do not keep|does not keep"),
        ({"budget": "channels:0.5", "solver": "iht", "objective": "joint"}, CapabilityError, "these do: .*obd"),
        ({"budget": "flops:0.01", "min_kept": 0.5}, ProblemError, "what has to stay costs"),
        (
            {"budget": "flops:0.01", "min_kept": 0.5, "curvature": "layer_inputs"},
            OptionError,
            "floors of 3 layers cost",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_the_message_says_what_can(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"fisher": cbs_opt.FisherOptions(n_rows=8, damping=1e-3), "solver": "obd", **arguments}
    if arguments.get("curvature"):
        arguments.pop("fisher")
    with pytest.raises(error, match=message):
        cbs_opt.prune(net(), data(), F.cross_entropy, **arguments)


def test_a_layer_that_is_not_called_has_no_cost() -> None:
    x = torch.randn(8, 3)
    with pytest.raises(ModelError, match="does not call layer 'b'"):
        cbs_opt.prune(Unused(), (x, x[:, 0].long().abs() % 2), F.cross_entropy, budget="flops:0.5", solver="obd")


def test_costs_are_measured_once_for_many_budgets() -> None:
    prepared = cbs_opt.prepare(net(), data(), F.cross_entropy, **ONE_SHOT)
    kept = [prepared.prune(budget=Flops(share), solver="obd").report.costs["flops_kept"] for share in (0.2, 0.5, 0.8)]
    assert np.allclose(kept, (0.2, 0.5, 0.8), atol=2e-3)


@pytest.mark.parametrize("allocation", ["uniform", "rows", "magnitude", "surgeon", "measured", "best"])
def test_layer_by_layer_every_rule_shares_out_costs(allocation: str) -> None:
    result = cbs_opt.prune(
        net(), data(), F.cross_entropy, budget="flops:0.4", solver="sweep", curvature="kfac", allocation=allocation
    )
    spent, limit = cost_of(result.masks, Flops(0.4))
    assert 0.985 * limit <= spent <= limit * (1 + 1e-9)
    costs = result.report.costs
    if allocation in ("magnitude", "surgeon", "measured"):
        assert costs["split_bound"] <= costs["split"] <= 1.01 * costs["split_bound"]
        assert "Lagrangian bound" in str(result.report)


def test_the_bound_of_a_knapsack_is_that_of_its_best_multiplier() -> None:
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget="flops:0.3", solver="obd", update="none", **ONE_SHOT)
    prepared = cbs_opt.prepare(net(), data(), F.cross_entropy, **ONE_SHOT)
    problem = prepared.problem(sparsity=0.5)
    scores = 0.5 * problem.diagonal * problem.weights**2
    each = np.repeat([128.0, 32.0, 2.0], [288, 576, 1536])
    demand = 0.7 * each.sum()
    prices = np.unique(scores / each)
    best = max(price * demand + np.minimum(0.0, scores - price * each).sum() for price in prices)
    costs = result.report.costs
    assert costs["split_bound"] == pytest.approx(best, rel=1e-9)
    assert costs["split_bound"] <= costs["split"] <= 1.01 * costs["split_bound"]


def test_milliseconds_are_measured_once_and_buy_channels(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = cbs_opt.latency_table(net(), data(), exclude="5", repeats=3, path=path)
    assert [(row.name, row.rows) for row in table.layers] == [("0", (2, 4, 6, 8)), ("2", (2, 4, 6, 8))]
    assert all(ms > 0.0 for row in table.layers for ms in row.milliseconds) and table.error >= 0.0
    assert cbs_opt.latency_table(net(), data(), exclude="5", path=path) == table == cbs_opt.LatencyTable.load(path)
    # A table that is known, so that the test does not hang on the machine's mood.
    times = (LayerTimes("0", (4, 8), (3.0, 5.0), (0.1, 0.1)), LayerTimes("2", (4, 8), (1.0, 2.0), (0.1, 0.1)))
    table = replace(table, layers=times)
    assert [row.line for row in times] == [(1.0, 0.5), (0.0, 0.25)] and table.error == pytest.approx(0.2 / 7.0)
    budget = cbs_opt.Latency(0.6, table=table)
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget=budget, solver="obd", exclude="5", **ONE_SHOT)
    kept = [int(mask.flatten(1).any(1).sum()) for mask in result.masks.values()]
    spent = 1.0 + 0.5 * kept[0] + 0.25 * kept[1]
    assert 0.6 * 7.0 - 0.5 < spent <= 0.6 * 7.0
    assert result.report.costs["milliseconds_kept"] == pytest.approx(spent / 7.0)
    assert "of 7 milliseconds kept" in " ".join(str(result.report).split())


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table = cbs_opt.latency_table(net(), data(), repeats=1, path=path)
    path.write_text(path.read_text().replace(table.machine, "another"))
    with pytest.raises(DataError, match="of another machine"):
        cbs_opt.latency_table(net(), data(), path=path)
    with pytest.raises(DataError, match="of another machine"):
        cbs_opt.Latency(0.5, table=replace(table, machine="another"))
    path.write_text("{}")
    with pytest.raises(DataError, match="is no latency table"):
        cbs_opt.LatencyTable.load(path)
    with pytest.raises(OptionError, match="zeros make nothing faster"):
        cbs_opt.Latency(0.5, groups=None, table=table)
    with pytest.raises(OptionError, match="table"):
        cbs_opt.Latency(0.5)
    some = replace(table, layers=table.layers[:1])
    how: dict[str, Any] = {"solver": "obd", **ONE_SHOT}
    with pytest.raises(DataError, match="no times of layer '2'"):
        cbs_opt.prune(net(), data(), F.cross_entropy, budget=cbs_opt.Latency(0.5, table=some), **how)
    whole = replace(
        table, layers=tuple(LayerTimes(r.name, (1, r.rows[-1]), (1.0, 1.0), (0.0, 0.0)) for r in table.layers)
    )
    with pytest.raises(OptionError, match="stay whatever is removed"):
        cbs_opt.prune(
            net(), data(), F.cross_entropy, budget=cbs_opt.Latency(0.5, table=whole), solver="obd", **ONE_SHOT
        )
    with pytest.raises(ModelError, match="cannot be timed with fewer rows"):
        cbs_opt.latency_table(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), data())


@pytest.mark.parametrize(
    "text", ["flops:0.5+bytes:0.3", "bytes:0.9+flops:0.2", "flops:0.4:channels+bytes:0.5:channels"]
)
@pytest.mark.parametrize("solver", ["magnitude", "obd", "greedy_ls"])
def test_two_limits_hold_at_once(text: str, solver: str) -> None:
    first, second = (budget_of(part) for part in text.split("+"))
    assert isinstance(first, cbs_opt.CostBudget)
    assert isinstance(second, cbs_opt.CostBudget)
    budget = cbs_opt.Both(first, second)
    assert budget == budget_of(text)
    assert str(budget) == text
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget=text, solver=solver, **ONE_SHOT)
    for part in (first, second):
        spent, limit = cost_of(result.masks, part)
        assert spent <= limit * (1 + 1e-9)
        assert result.report.costs[f"{part.name}_kept"] == pytest.approx(spent / limit * part.share)


@pytest.mark.parametrize("text", ["flops:0.5+flops:0.3", "flops:0.5+2:4", "flops:0.5:channels+bytes:0.5", "flops:0.5+"])
def test_two_limits_that_do_not_go_together_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        budget_of(text)


def test_layer_by_layer_there_is_one_limit() -> None:
    with pytest.raises(OptionError, match="two limits"):
        cbs_opt.prune(
            net(), data(), F.cross_entropy, budget="flops:0.5+bytes:0.3", solver="admm", curvature="layer_inputs"
        )


@pytest.mark.parametrize("way", [{"solver": "obs", "curvature": "layer_inputs"}, {"solver": "obd", **ONE_SHOT}])
def test_columns_of_convolutions_are_input_channels(way: dict[str, Any]) -> None:
    result = cbs_opt.prune(net(), data(), F.cross_entropy, budget="columns:0.5", **way)
    for name in ("0", "2"):
        stays = result.masks[name].permute(1, 0, 2, 3).flatten(1)
        assert torch.equal(stays.all(1), stays.any(1))
    assert torch.equal(result.masks["5"].all(0), result.masks["5"].any(0))
    kept = sum(int(result.masks[name].flatten(2).any(2).any(0).sum()) for name in ("0", "2"))
    assert kept + int(result.masks["5"].any(0).sum()) == (4 + 8 + 128) // 2


def test_columns_of_a_grouped_convolution_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 12)).eval()
    with pytest.raises(OptionError, match="grouped convolution"):
        cbs_opt.prune(model, data(), F.cross_entropy, budget="columns:0.5", solver="obd", **ONE_SHOT)
