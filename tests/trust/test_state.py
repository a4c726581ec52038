"""Process-wide settings of torch and numpy change nothing: results are those of a new process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
import solvers
from tests.conftest import random_problem
from tests.trust.test_losses import labels, net


@contextmanager
def _set(setter, getter, value: object) -> Iterator[None]:
    before = getter()
    setter(value)
    try:
        yield
    finally:
        setter(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to halves": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default float64": lambda: _set(torch.set_default_dtype, torch.get_default_dtype, torch.float64),
    "default bfloat16": lambda: _set(torch.set_default_dtype, torch.get_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled, True),
    "quick products": lambda: _set(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision, "medium"),
    "numpy raises": lambda: np.errstate(all="raise"),
    "another seed": lambda: torch.random.fork_rng(),
}


class Positional(nn.Module):
    """Makes constants in the default dtype on the default device, as networks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x + torch.linspace(0.0, 0.1, 6))))


def _same(one: cbs_opt.PruneResult, other: cbs_opt.PruneResult) -> None:
    assert np.array_equal(one.pruned, other.pruned)
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.report.loss_dense == other.report.loss_dense
    assert one.report.loss_pruned == other.report.loss_pruned
    assert one.report.objective == other.report.objective


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("make", [net, Positional])
def test_pruning_is_the_same_under_any_settings(state: str, make) -> None:
    model, data = make().eval(), labels()
    expected = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5)
    with STATES[state]():
        found = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5)
    _same(found, expected)
    assert not any(p.is_inference() for p in found.model.parameters())
    F.cross_entropy(found.model(data[0]), data[1]).backward()


@pytest.mark.parametrize("state", STATES)
def test_prepared_networks_are_the_same_under_any_settings(state: str) -> None:
    model, data = net(), labels()
    prepared = cbs_opt.prepare(model, data, F.cross_entropy)
    expected = prepared.prune(sparsity=0.5, solver="obs", objective="joint")
    with STATES[state]():
        inside = cbs_opt.prepare(model, data, F.cross_entropy)
        found = prepared.prune(sparsity=0.5, solver="obs", objective="joint")
        updated = prepared.update_masks(expected.masks, objective="joint")
    again = inside.prune(sparsity=0.5, solver="obs", objective="joint")
    for one in (found, updated, again):
        assert np.array_equal(one.pruned, expected.pruned)
        np.testing.assert_allclose(one.weights, expected.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("state", STATES)
def test_stages_are_the_same_under_any_settings(state: str) -> None:
    options = cbs_opt.StageOptions(n_stages=2, n_polish=1)
    arguments = (net(), labels(80), F.cross_entropy)
    expected = cbs_opt.prune(*arguments, sparsity=0.5, solver="obs", stages=options)
    with STATES[state]():
        found = cbs_opt.prune(*arguments, sparsity=0.5, solver="obs", stages=options)
    assert np.array_equal(found.pruned, expected.pruned)
    np.testing.assert_array_equal(found.weights, expected.weights)


@pytest.mark.parametrize(("state", "solver"), itertools.product(STATES, ["greedy_ls", "obs", "iht", "branch_bound"]))
def test_solving_is_the_same_under_any_settings(state: str, solver: str) -> None:
    objective = "selection" if solver == "greedy_ls" else "joint"
    expected = solvers.solve(random_problem(3, (14,), 7, objective), solver)
    with STATES[state]():
        problem = random_problem(3, (14,), 7, objective)
        found = solvers.solve(problem, solver)
        assert problem.joint_value(found.pruned) == pytest.approx(expected.refit_objective, rel=1e-12)
    assert np.array_equal(found.pruned, expected.pruned) and found.objective == expected.objective


@pytest.mark.parametrize("state", STATES)
def test_masks_are_the_same_under_any_settings(state: str) -> None:
    masks, model, other = {"0": torch.arange(48).view(8, 6) % 2 == 0}, net(), net()
    with STATES[state]():
        model = cbs_opt.apply_masks(model, masks)
        plain = cbs_opt.remove_masks(cbs_opt.apply_masks(other, masks))
    F.cross_entropy(model(labels()[0]), labels()[1]).backward()
    assert torch.equal(cbs_opt.read_masks(model)["0"], masks["0"]) and cbs_opt.read_masks(plain) == {}


def test_networks_made_in_inference_mode_are_pruned() -> None:
    with torch.inference_mode():
        model = nn.Sequential(net(), nn.BatchNorm1d(3)).eval()
    found = cbs_opt.prune(model, labels(), F.cross_entropy, sparsity=0.5)
    expected = cbs_opt.prune(nn.Sequential(net(), nn.BatchNorm1d(3)).eval(), labels(), F.cross_entropy, sparsity=0.5)
    _same(found, expected)


def test_settings_are_left_as_they_were() -> None:
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision(), np.geterr(), torch.random.get_rng_state()
    cbs_opt.prune(net(), labels(), F.cross_entropy, sparsity=0.5)
    torch.manual_seed(0)
    after = torch.get_default_dtype(), torch.get_float32_matmul_precision(), np.geterr()
    assert after == before[:3]


def test_random_numbers_of_the_caller_are_not_used() -> None:
    model, data = net(), labels()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5, stages=2, solver="obs")
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
