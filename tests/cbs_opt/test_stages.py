"""Staged pruning on a tiny network: schedules, stages, journal, and the pieces against their oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.distillation import Distillation
from cbs_opt.data.forward import Forward
from cbs_opt.engine.checks import check_plan
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.damped_refits import DampedRefits
from cbs_opt.engine.journal import Journal, StageState
from cbs_opt.engine.plan import Plan, kept_after_stages
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.engine.stages import run_stages
from cbs_opt.engine.step_search import search_step
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.network.batch_norm import batch_statistics, reestimate, statistics_of
from cbs_opt.network.finding import find_layers
from cbs_opt.network.modes import evaluation_mode
from cbs_opt.report.records import StageRecord
from solvers import QuadraticBlock, SelectionProblem, solve
from solvers.errors import CheckpointError, OptionError, OutputError, UnknownNameError
from solvers.refit import refit
from tests.conftest import random_block

FISHER = FisherOptions(n_rows=40, batch_size=5, damping=1e-3)
BATCHES = FisherOptions(n_rows=20, batch_size=16, damping=1e-3)


def _network(batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm: nn.Module = nn.BatchNorm1d(12) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(6, 12), norm, nn.ReLU(), nn.Linear(12, 3)).eval()


def _data(n: int = 240) -> CalibrationData:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    y = (x[:, :3] + 0.3 * x[:, 3:]).argmax(1)
    return CalibrationData(x, y, n)


def _trained(batch_norm: bool = False) -> tuple[nn.Module, CalibrationData]:
    model, data = _network(batch_norm), _data()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    model.train()
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(data.inputs), data.targets).backward()
        optimiser.step()
    return model.eval(), data


def _run(
    model: nn.Module,
    data: CalibrationData,
    sparsity: float = 0.8,
    *,
    options: StageOptions | None = None,
    fisher: FisherOptions = FISHER,
    solver: str = "obs",
    seed: int = 0,
    start: StageState | None = None,
    **arguments: Any,
):
    layers = find_layers(model)
    setup = Setup(fisher=fisher, device="cpu", seed=seed)
    workspace = Workspace(model, layers, data, Forward(model, F.cross_entropy), setup)
    choice = Choice(n_kept=layers.n_kept(sparsity), solver=solver)
    n_start = None if start is None else start.n_kept
    plan = Plan.staged(options or StageOptions(), n=layers.n, n_kept=choice.kept(layers.n), n_start=n_start)
    check_plan(model, layers, setup, choice, plan)
    return run_stages(workspace, choice, plan, start=start, **arguments)


def _options(**changes) -> StageOptions:
    return StageOptions(**{"n_stages": 3, "n_polish": 2, "held_out": 48, "regrow": 0.3, "settle": 1, **changes})


# -- schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["exponential", "polynomial", "linear"])
def test_schedules_fall_to_the_exact_end(schedule: str) -> None:
    counts = kept_after_stages(schedule, 1000, 13, 7)
    assert len(counts) == 7
    assert counts[-1] == 13
    assert all(a >= b for a, b in zip((1000, *counts), counts, strict=False))


def test_exponential_removes_the_same_fraction_each_time() -> None:
    assert kept_after_stages("exponential", 1024, 1, 10) == tuple(2**k for k in range(9, -1, -1))


def test_a_schedule_may_start_further_down() -> None:
    assert kept_after_stages("linear", 100, 20, 4, n_first=50) == (50, 40, 30, 20)
    # It never goes below the end.
    assert kept_after_stages("linear", 100, 60, 3, n_first=50) == (60, 60, 60)


def test_schedules_refuse_nonsense() -> None:
    with pytest.raises(UnknownNameError, match="exponential"):
        kept_after_stages("exponentail", 10, 5, 2)
    with pytest.raises(OptionError, match="stages"):
        kept_after_stages("linear", 10, 5, 0)
    with pytest.raises(OptionError, match="n_kept"):
        kept_after_stages("linear", 10, 11, 2)


# -- pieces against oracles ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 60])
@pytest.mark.parametrize("factor", [0.1, 1.0, 50.0])
def test_damped_refits_are_cbs_u_at_every_damping(rows: int, factor: float) -> None:
    blocks = [random_block(1, 20, rows, gradient=True), random_block(2, 13, rows, damping=0.3)]
    problem = SelectionProblem(blocks, 12, "joint")
    pruned = np.random.default_rng(0).permutation(np.arange(33) < 12)
    refits = DampedRefits(problem, pruned)
    damped = [QuadraticBlock(b.weights, b.factor, b.damping * factor, b.gradient, b.name) for b in blocks]
    expected = refit(SelectionProblem(damped, 12, "joint"), pruned).weights
    np.testing.assert_allclose(refits.start + refits.step(factor), expected, rtol=1e-8, atol=1e-10)


def test_search_finds_the_best_point_of_a_bowl() -> None:
    target = (4.0**2, 0.5)

    def step(factor: float) -> np.ndarray:
        return np.array([np.log(factor), 1.0])

    def loss(weights: np.ndarray) -> float:
        length = weights[1]
        return float((weights[0] / length - np.log(target[0])) ** 2 + np.log(length / target[1]) ** 2)

    found = search_step(np.zeros(2), step, loss, StageOptions(max_evaluations=30))
    assert (found.ratio, found.length) == target
    fixed = search_step(np.zeros(2), step, loss, StageOptions(search_damping=False, search_step=False))
    assert (fixed.ratio, fixed.length) == (1.0, 1.0)


def test_search_keeps_to_its_budget() -> None:
    calls = []

    def loss(weights: np.ndarray) -> float:
        calls.append(weights)
        return -float(len(calls))

    search_step(np.zeros(1), lambda factor: np.ones(1), loss, StageOptions(max_evaluations=7))
    assert len(calls) == 7


def test_search_adds_the_step_before_where_that_helps() -> None:
    def step(factor: float) -> np.ndarray:
        return np.array([1.0, 0.0])

    def loss(weights: np.ndarray) -> float:
        return float(np.sum((weights - np.array([1.0, 0.4])) ** 2))

    options = StageOptions(search_damping=False, search_step=False, momentum=0.8)
    before = np.array([0.0, 1.0])
    found = search_step(np.zeros(2), step, loss, options, before)
    assert found.momentum == 0.4
    np.testing.assert_allclose(found.weights, [1.0, 0.4])
    assert found.loss == pytest.approx(0.0, abs=1e-15)
    # Where it does not help it is left out, and without a step before there is nothing to add.
    assert search_step(np.zeros(2), step, loss, options, -before).momentum == 0.0
    assert search_step(np.zeros(2), step, loss, options).momentum == 0.0


def test_batch_statistics_show_what_reestimation_gives() -> None:
    model, data = _trained(batch_norm=True)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    before = statistics_of(model)
    forward = Forward(model, F.cross_entropy)
    with batch_statistics(model), torch.no_grad():
        seen = F.cross_entropy(model(data.inputs), data.targets)
    for name, value in statistics_of(model).items():
        assert torch.equal(value, before[name])
    reestimate(model, forward.output, [(data.inputs, data.targets, data.n)])
    assert not model.training
    with torch.no_grad():
        after = F.cross_entropy(model(data.inputs), data.targets)
    # Running variances are unbiased, those of a batch are not.
    assert abs(float(seen) - float(after)) < 0.02 * float(after)
    mean = model[0](data.inputs).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean.detach(), rtol=1e-4, atol=1e-5)


# -- runs ------------------------------------------------------------------------------------------------


def test_stages_reach_the_sparsity_and_beat_one_shot_magnitude() -> None:
    model, data = _trained()
    layers = find_layers(model)
    dense = layers.read(model)
    run = _run(model, data, options=_options())
    n_kept = layers.n_kept(0.8)
    assert run.state.n_kept == n_kept
    assert [r.kind for r in run.records] == ["prune"] * 3 + ["polish"] * 2
    weights = layers.read(model)
    assert int((weights != 0).sum()) <= n_kept
    assert torch.equal(weights, run.state.weights)
    assert not weights[torch.from_numpy(run.state.pruned)].any()
    with torch.no_grad():
        staged = float(F.cross_entropy(model(data.inputs), data.targets))
        layers.write(model, torch.where(dense.abs() >= dense.abs().sort().values[-n_kept], dense, 0.0))
        magnitude = float(F.cross_entropy(model(data.inputs), data.targets))
    assert staged < magnitude


def test_polishing_never_raises_the_held_out_loss() -> None:
    model, data = _trained()
    run = _run(model, data, 0.85, options=_options(n_polish=4))
    for record in run.records:
        if record.kind == "polish":
            assert record.loss_after <= record.loss_before


@pytest.mark.parametrize("solver", ["magnitude", "obd", "woodfisher", "greedy_ls", "rmp", "obs"])
def test_any_solver_selects(solver: str) -> None:
    model, data = _trained()
    run = _run(model, data, solver=solver, options=_options(n_stages=2, n_polish=1))
    assert run.state.n_kept == find_layers(model).n_kept(0.8)
    assert run.records[0].solver.startswith(solver)


def test_a_pruning_stage_prunes_even_where_no_step_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _trained()
    monkeypatch.setattr(DampedRefits, "step", lambda self, factor: 1e3 * np.ones(len(self.start)) * (self.start != 0))
    run = _run(model, data, options=_options(n_stages=1, n_polish=1, regrow=0.0))
    layers = find_layers(model)
    assert run.state.n_kept == layers.n_kept(0.8)
    assert int((layers.read(model) != 0).sum()) == layers.n_kept(0.8)
    assert [r.step for r in run.records] == [0.0, 0.0]
    assert [r.damping for r in run.records] == [FISHER.damping, 4.0 * FISHER.damping]


def test_blocks_per_layer_and_fixed_settings() -> None:
    model, data = _trained()
    fisher = FisherOptions(n_rows=40, batch_size=5, damping=1e-2, blocks="per_layer")
    options = _options(search_damping=False, search_step=False, step_damping=0.03)
    run = _run(model, data, fisher=fisher, options=options)
    assert {record.damping for record in run.records} == {0.03}
    assert {record.step for record in run.records if record.kind == "prune"} == {1.0}


def test_levels_give_the_sparsity_of_each_stage() -> None:
    model, data = _trained()
    layers = find_layers(model)
    run = _run(model, data, 0.7, options=_options(levels=(0.5, 0.6, 0.6, 0.9), n_polish=1))
    wanted = [layers.n_kept(s) for s in (0.5, 0.6, 0.6, 0.7, 0.7)]
    assert [r.n_kept for r in run.records] == wanted


def test_batch_norm_statistics_follow_the_weights() -> None:
    model, data = _trained(batch_norm=True)
    before = statistics_of(model)
    run = _run(model, data, options=_options(n_polish=1))
    after = statistics_of(model)
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert torch.equal(run.state.statistics["1.running_mean"], after["1.running_mean"])
    assert not model.training
    frozen, data = _trained(batch_norm=True)
    _run(frozen, data, options=_options(n_polish=1, batch_norm=False))
    assert torch.equal(before["1.running_mean"], statistics_of(frozen)["1.running_mean"])


@pytest.mark.parametrize(("size", "noted"), [(5, True), (16, False)])
def test_gradients_are_taken_under_batch_statistics(size: int, noted: bool) -> None:
    model, data = _trained(batch_norm=True)
    fisher = FisherOptions(n_rows=12, batch_size=size, damping=1e-3)
    first, *others = _run(model, data, options=_options(), fisher=fisher).records
    assert [any("running batch-norm statistics" in r for r in record.repairs) for record in (first, *others)] == [
        noted
    ] * 5
    # The mean loss of the batches is that of the dense network under the statistics that were meant.
    dense, _ = _trained(batch_norm=True)
    with torch.no_grad(), evaluation_mode(dense):
        running = float(F.cross_entropy(dense(data.inputs), data.targets))
    with torch.no_grad(), batch_statistics(dense):
        pieces = torch.randperm(data.n, generator=torch.Generator().manual_seed(0)).split(size)
        batch = np.mean([float(F.cross_entropy(dense(data.inputs[i]), data.targets[i])) for i in pieces])
    assert abs(first.loss_gradients - (running if noted else batch)) < abs(
        first.loss_gradients - (batch if noted else running)
    )


def test_the_choice_may_leave_the_gradient_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watch(problem: SelectionProblem, *args: Any, **kwargs: Any) -> Any:
        seen.append(problem.gradient is not None)
        return solve(problem, *args, **kwargs)

    monkeypatch.setattr("cbs_opt.engine.stages.solve", watch)
    ends = {}
    for first_order in (True, False, None):
        model, data = _trained()
        run = _run(model, data, options=_options(n_stages=1, n_polish=0, regrow=0.0, first_order=first_order))
        ends[first_order] = run.records[0]
    assert seen == [True, False, True, False]
    # Undecided, the better of the two is taken.
    better = min(True, False, key=lambda way: ends[way].loss_after)
    assert ends[None].loss_after == ends[better].loss_after
    assert ends[None].first_order is better


def test_augmentation_is_applied_to_what_gradients_see() -> None:
    seen = []

    def augment(inputs, generator: torch.Generator):
        seen.append(len(inputs))
        return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)

    model, data = _trained()
    run = _run(model, data, options=_options(n_stages=2, n_polish=0, augment=augment))
    assert sum(seen) == 48 + 2 * 40 * 5
    assert run.state.n_kept == find_layers(model).n_kept(0.8)


# -- journal ---------------------------------------------------------------------------------------------


class _KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("killed_after", "changes"), [(1, {}), (3, {}), (4, {}), (4, {"momentum": 0.8, "distillation": Distillation()})]
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, killed_after: int, changes: dict[str, Any]) -> None:
    whole, data = _trained(batch_norm=True)
    options = _options(**changes)
    reference = _run(whole, data, options=options, fisher=BATCHES)

    def kill(record: StageRecord, state: StageState) -> None:
        if record.stage == killed_after:
            raise _KilledError

    model, _ = _trained(batch_norm=True)
    with pytest.raises(_KilledError):
        _run(model, data, options=options, fisher=BATCHES, journal=tmp_path, progress=kill)
    fresh, _ = _trained(batch_norm=True)
    resumed = _run(fresh, data, options=options, fisher=BATCHES, journal=tmp_path)
    assert resumed.n_resumed == killed_after
    assert torch.equal(resumed.state.weights, reference.state.weights)
    assert np.array_equal(resumed.state.pruned, reference.state.pruned)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert [r.loss_after for r in resumed.records] == [r.loss_after for r in reference.records]


def test_a_finished_journal_is_read_and_not_run(tmp_path: Path) -> None:
    model, data = _trained()
    first = _run(model, data, options=_options(), journal=tmp_path)
    again, _ = _trained()
    second = _run(again, data, options=_options(), journal=tmp_path, progress=lambda *_: pytest.fail("a stage was run"))
    assert second.n_resumed == len(first.records)
    assert torch.equal(first.state.weights, second.state.weights)


def test_another_runs_journal_is_refused(tmp_path: Path) -> None:
    model, data = _trained()
    _run(model, data, options=_options(), journal=tmp_path)
    other, _ = _trained()
    with pytest.raises(OutputError, match="n_kept"):
        _run(other, data, 0.9, options=_options(), journal=tmp_path)
    with pytest.raises(OutputError, match="seed"):
        _run(other, data, options=_options(), journal=tmp_path, seed=1)


def test_damaged_journals_are_refused(tmp_path: Path) -> None:
    model, data = _trained()
    _run(model, data, options=_options(n_stages=1, n_polish=0), journal=tmp_path)
    state = tmp_path / "stage-0001.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    fresh, _ = _trained()
    with pytest.raises(CheckpointError, match="damaged"):
        _run(fresh, data, options=_options(n_stages=1, n_polish=0), journal=tmp_path)
    (tmp_path / "journal.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Journal(tmp_path, {})


def test_a_run_goes_on_from_a_state_of_another() -> None:
    model, data = _trained()
    path = _run(model, data, 0.6, options=_options(n_polish=0))
    on = _run(model, data, 0.8, options=_options(n_stages=1, n_polish=1), start=path.state)
    assert [r.stage for r in on.records] == [4, 5]
    # The same stages in one run, since all randomness comes from the seed and the number of the stage.
    levels = tuple(r.sparsity for r in path.records)
    assert on.state.n_kept == find_layers(model).n_kept(0.8)
    assert len(levels) == 3


# -- refusals --------------------------------------------------------------------------------------------


def test_options_are_checked() -> None:
    for wrong in (
        {"n_stages": -1},
        {"n_polish": 1.5},
        {"max_evaluations": 0},
        {"regrow": -0.1},
        {"regrow": 0.2, "first_order": False},
        {"momentum": 1.0},
        {"momentum": float("nan")},
        {"regrow": float("nan")},
        {"levels": ()},
        {"levels": (0.5, 0.4)},
        {"first_sparsity": 1.2},
        {"step_damping": 0.0},
    ):
        with pytest.raises(OptionError):
            StageOptions(**wrong)
    with pytest.raises(UnknownNameError):
        StageOptions(schedule="cubic")
    assert StageOptions.of(7).n_stages == 7
    with pytest.raises(OptionError, match="stages"):
        StageOptions.of(True)


def test_what_does_not_fit_is_refused() -> None:
    model, data = _trained()
    with pytest.raises(OptionError, match="damping"):
        _run(model, data, fisher=FisherOptions(damping=0.0))
    with pytest.raises(OptionError, match="clusters"):
        _run(model, data, fisher=FisherOptions(blocks="clusters:10"))
    with pytest.raises(OptionError, match="only polishes"):
        _run(model, data, options=_options(n_stages=0))
