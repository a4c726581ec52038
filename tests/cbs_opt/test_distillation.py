"""The distilled loss against its formula, its gradient at the dense network, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cbs_opt import (
    CalibrationData,
    Choice,
    Distillation,
    FisherOptions,
    Forward,
    Plan,
    Setup,
    StageOptions,
    Workspace,
    find_layers,
)
from cbs_opt.data.distillation import DistilledForward
from cbs_opt.engine.stages import run_stages
from solvers.errors import DataError, ModelError, OptionError


def _setting(options: Distillation) -> tuple[nn.Module, DistilledForward, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double().eval()
    forward = DistilledForward(Forward(model, F.cross_entropy), copy.deepcopy(model), options)
    return model, forward, torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 4


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 2.0), (1.0, 1.0), (0.2, 4.0)])
def test_the_loss_is_its_formula(weight: float, temperature: float) -> None:
    model, forward, x, y = _setting(Distillation(weight, temperature))
    dense = forward.teacher_logits(x, y)
    logits = dense + 0.3 * torch.randn_like(dense)
    p, q = (dense / temperature).softmax(1).numpy(), (logits / temperature).softmax(1).numpy()
    distance = temperature**2 * np.sum(p * (np.log(p) - np.log(q))) / len(x)
    expected = (1 - weight) * F.cross_entropy(logits, y).item() + weight * distance
    assert forward.loss(logits, x, (y, dense)).item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(forward.output(model, x, (y, dense)), model(x))


def test_every_sample_has_gradient_zero_at_the_dense_network() -> None:
    model, forward, x, y = _setting(Distillation(weight=1.0))
    for i in range(len(x)):
        row = x[i : i + 1], y[i : i + 1]
        loss = forward.loss(model(row[0]), row[0], (row[1], forward.teacher_logits(*row)))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert max(float(g.abs().max()) for g in gradients) < 1e-14


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 2.0), (1.1, 2.0), (0.5, 0.0), (0.5, float("inf"))])
def test_options_are_checked(weight: float, temperature: float) -> None:
    with pytest.raises(OptionError, match="distillation"):
        Distillation(weight, temperature)


def test_data_without_labels_and_outputs_that_are_no_logits_are_refused() -> None:
    _, forward, x, y = _setting(Distillation())
    with pytest.raises(DataError, match="pairs"):
        forward.teacher_logits({"x": x}, None)
    flat = DistilledForward(Forward(nn.Flatten(0), F.mse_loss), nn.Flatten(0), Distillation())
    with pytest.raises(ModelError, match="logits"):
        flat.teacher_logits(x, y)


def test_stages_follow_the_dense_network_rather_than_wrong_labels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(300, 6)
    with torch.no_grad():
        dense = model(x)
    noise = CalibrationData(x, torch.randint(0, 3, (300,)), 300)

    def distance(distillation: Distillation | None) -> float:
        pruned = copy.deepcopy(model)
        layers = find_layers(pruned)
        options = StageOptions(n_stages=3, n_polish=3, held_out=50, distillation=distillation)
        setup = Setup(fisher=FisherOptions(n_rows=40, batch_size=5, damping=1e-3), device="cpu")
        choice = Choice(sparsity=0.6, solver="obs")
        plan = Plan.staged(options, n=layers.n, n_kept=choice.kept(layers.n))
        run_stages(Workspace(pruned, layers, noise, Forward(pruned, F.cross_entropy), setup), choice, plan)
        with torch.no_grad():
            return float(F.mse_loss(pruned(x), dense))

    assert distance(Distillation(weight=1.0)) < distance(None)
