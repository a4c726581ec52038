"""Stages under budgets that are no number: tightened step by step, masks that only grow, the limit kept at the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import FisherOptions, StageOptions
from cbs_opt.engine.limits import Limits
from solvers import NM, Groups, Knapsack

FISHER = FisherOptions(n_rows=24, batch_size=4, damping=1e-3)


def network() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), (x, x[:, :4].argmax(1))


def pruned(budget: str, solver: str = "obd", **options: object) -> cbs_opt.PruneResult:
    model, data = network()
    stages = StageOptions(n_stages=3, n_polish=1, max_evaluations=6)
    return cbs_opt.prune(
        model, data, F.cross_entropy, budget=budget, solver=solver, stages=stages, fisher=FISHER, **options
    )


@pytest.mark.parametrize("solver", ["obd", "joint_ls"])
@pytest.mark.parametrize(
    "budget", ["2:4", "1:4", "channels:0.5", "4x1:0.5", "flops:0.5", "bytes:0.4", "flops:0.5:channels"]
)
def test_stages_tighten_a_budget_and_keep_it(budget: str, solver: str) -> None:
    result = pruned(budget, solver)
    kept = [record.n_kept for record in result.stages]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) >= 2 and kept[-1] == result.report.n_kept
    if budget[1] == ":":
        n = int(budget[0])
        assert (result.pruned.reshape(-1, 4).sum(1) == 4 - n).all()
        assert {count % 36 for count in kept} == {0}
    elif budget[0] in "fb":
        name, share = budget.split(":")[:2]
        assert result.report.costs[f"{name}_kept"] <= float(share) + 1e-9
    elif budget.startswith("channels"):
        rows = np.concatenate([mask.reshape(mask.shape[0], -1).numpy() for mask in result.masks.values()], axis=None)
        assert rows.size == result.report.n and result.report.n_kept < result.report.n


def test_what_is_left_to_ask_is_the_budget_in_the_end() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 4)
    costs = rng.random(6)
    for final in (NM(2, 4).resolve([(6, 4)]), Groups(labels, 3), Knapsack(costs, 0.5 * costs.sum(), labels)):
        limits, active = Limits(final, 24, 12), np.ones(24, dtype=bool)
        for n_kept in (20, 16, 12):
            budget = limits.among(active, n_kept)
            items = budget.over_items
            gone = items.cheapest_of(rng.random(budget.linear(int(active.sum())).items))
            active[np.flatnonzero(active)[budget.linear(int(active.sum())).widen(gone)]] = False
        assert not final.violation(~active)
