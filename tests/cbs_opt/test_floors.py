"""No layer is removed whole unless that is asked for: one shot, stages, layer by layer, blocks in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import FisherOptions, StageOptions
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.floors import Floors
from solvers.errors import OptionError, UnknownNameError

BATCHES = FisherOptions(n_rows=12, batch_size=16, damping=1e-3)


def net(scale: float = 1e-3) -> nn.Module:
    """Its middle layer has 600 weights, all smaller than almost any of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def data(n: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 40, generator=generator)
    return x, x[:, :10].argmax(1)


def pruned(**arguments: Any) -> cbs_opt.PruneResult:
    return cbs_opt.prune(net(), data(), F.cross_entropy, **{"sparsity": 0.95, "solver": "magnitude", **arguments})


def kept(result: cbs_opt.PruneResult) -> list[int]:
    return [int(mask.sum()) for mask in result.masks.values()]


def test_a_layer_that_would_go_whole_keeps_a_weight_and_the_report_says_so() -> None:
    free = pruned(update="none", min_kept=0)
    assert kept(free)[1] == 0 and any("nothing is left of 1 of 3 layers: 2" in w for w in free.report.warnings)
    result = pruned(update="none")
    assert kept(result)[1] == 1 and sum(kept(result)) == sum(kept(free)) == result.report.n_kept
    assert any("floors: 1 weights of 1 groups were put back" in repair for repair in result.report.repairs)
    assert not any("nothing is left" in w for w in result.report.warnings)
    weight = net()[2].weight.detach().abs()
    assert bool(result.masks["2"].flatten()[weight.flatten().argmax()])


@pytest.mark.parametrize("solver", ["magnitude", "obs", "greedy_ls", "woodfisher"])
def test_where_floors_are_kept_anyway_nothing_changes(solver: str) -> None:
    settings = {"sparsity": 0.9, "solver": solver, "fisher": FisherOptions(n_rows=30, damping=1e-3)}
    with_floors, without = (
        cbs_opt.prune(net(1.0), data(), F.cross_entropy, **settings, min_kept=floor) for floor in (None, 0)
    )
    assert all(torch.equal(mask, without.masks[name]) for name, mask in with_floors.masks.items())
    assert with_floors.report.objective == without.report.objective
    assert with_floors.report.repairs == without.report.repairs


WAYS: dict[str, dict[str, Any]] = {
    "one block": {"solver": "obs", "fisher": FisherOptions(n_rows=30, damping=1e-3)},
    "allocated": {"allocation": "magnitude", "update": "none"},
    "clusters": {"solver": "obd", "fisher": FisherOptions(n_rows=30, damping=1e-3, blocks="clusters:500")},
    "stages": {"solver": "obs", "fisher": BATCHES, "stages": StageOptions(n_stages=3, n_polish=1)},
    "kfac": {"solver": "obd", "curvature": "kfac", "allocation": "magnitude"},
    "layer inputs": {"solver": "sweep", "curvature": "layer_inputs", "allocation": "magnitude"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("floor", "least"), [({}, 1), ({"min_kept": 7}, 7), ({"min_kept": 0.02}, 12)])
def test_every_layer_keeps_its_floor_in_every_way_of_pruning(way: str, floor: dict[str, float], least: int) -> None:
    result = pruned(**WAYS[way], **floor)
    assert kept(result)[1] >= least and sum(kept(result)) == int(2000 * (1 - 0.95))
    if "curvature" in WAYS[way]:
        assert any("were left to 2, and as many fewer to others" in repair for repair in result.report.repairs)


@pytest.mark.parametrize("way", WAYS)
def test_every_row_keeps_its_floor(way: str) -> None:
    result = pruned(**WAYS[way], min_kept_per_row=1)
    rows = torch.cat([mask.sum(1) for mask in result.masks.values()])
    assert rows.numel() == 60 and int(rows.min()) >= 1 and int(rows.sum()) == int(2000 * (1 - 0.95))


@pytest.mark.parametrize("way", ["one block", "stages", "kfac"])
def test_what_the_budget_does_not_leave_is_refused_before_data_are_read(way: str) -> None:
    def unread() -> Any:
        raise AssertionError("data were read")
        yield

    settings = {"sparsity": 0.95, **WAYS[way]}
    for floor, message in (
        ({"min_kept": 40}, "min_kept=40 keeps 120 weights of the 3 layers together, but only 100 of 2000"),
        ({"min_kept_per_row": 2}, "min_kept_per_row=2 keeps 120 weights of the 60 rows together, but only 100 of 2000"),
    ):
        with pytest.raises(OptionError, match=message):
            cbs_opt.prune(net(), unread(), F.cross_entropy, **settings, **floor)


@pytest.mark.parametrize(
    "floor",
    [
        {"min_kept": -1},
        {"min_kept": 1.5},
        {"min_kept": 0.0},
        {"min_kept": float("nan")},
        {"min_kept": "1"},
        {"min_kept": True},
        {"min_kept_per_row": 0.5},
        {"min_kept": 2, "min_kept_per_row": 1},
    ],
)
def test_floors_that_make_no_sense_are_refused(floor: dict[str, Any]) -> None:
    with pytest.raises((OptionError, UnknownNameError), match="min_kept"):
        Choice(sparsity=0.5, **floor)


def test_floors_follow_the_weights_that_are_still_there() -> None:
    layers = cbs_opt.find_layers(net())
    floors = Floors.of(Choice(n_kept=100, min_kept=5), layers)
    assert floors.least.tolist() == [5, 5, 5] and floors.sizes.tolist() == [1200, 600, 200]
    some = np.zeros(2000, dtype=bool)
    some[[0, 1, 2, 1200, *range(1800, 1810)]] = True
    among = floors.among(some)
    assert among.sizes.tolist() == [3, 1, 10] and among.least.tolist() == [3, 1, 5]
    assert floors.inside(1200, 1800).sizes.tolist() == [600]
    assert floors.shared(np.array([1200, 500, 200]), layers).tolist() == [1195, 510, 195]
    assert Floors.of(Choice(n_kept=2), layers).least.tolist() == [0, 0, 0]
