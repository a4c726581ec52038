"""The whole way from network to pruned network."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt
from cbs_opt import CalibrationOptions, FisherOptions, PruneReport
from solvers.errors import (
    CapabilityError,
    CBSError,
    DataError,
    ModelError,
    OptionError,
    OutputError,
    UnknownNameError,
)
from tests.cbs_opt.networks import ConvNet, Mlp, Tied, build, inputs_for, train_briefly


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    x, y = inputs_for(Mlp, 120, dtype=torch.float32)
    y = (x[:, :3] * 2).argmax(1)
    return train_briefly(build(Mlp, dtype=torch.float32), x, y), (x, y)


@pytest.fixture(scope="module")
def prepared(trained) -> cbs_opt.Prepared:
    model, data = trained
    return cbs_opt.prepare(model, data, F.cross_entropy, fisher=FisherOptions(damping=1e-3), device="cpu")


@pytest.mark.parametrize("update", ["none", "single", "combinatorial"])
@pytest.mark.parametrize("solver", ["magnitude", "woodfisher", "greedy_ls"])
def test_exactly_k_weights_stay_and_the_input_is_untouched(trained, solver: str, update: str) -> None:
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    result = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, solver=solver, update=update)
    kept = int(62 * (1 - 0.7))
    assert sum(int(m.sum()) for m in result.masks.values()) == result.report.n_kept == kept
    assert int((result.weights != 0).sum()) <= kept and int((~result.pruned).sum()) == kept
    for name, mask in result.masks.items():
        assert bool((result.model.get_submodule(name).weight[~mask] == 0).all())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not cbs_opt.read_masks(model) and set(cbs_opt.read_masks(result.model)) == {"fc1", "fc2", "fc3"}
    assert torch.equal(result.model.fc1.bias, model.fc1.bias)
    assert torch.isfinite(result.model(data[0])).all()
    assert set(result.model.state_dict()) == set(before)


def test_the_update_lowers_the_loss_of_a_random_mask(trained) -> None:
    model, data = trained
    losses = {}
    for update in ("none", "combinatorial"):
        report = cbs_opt.prune(
            model,
            data,
            F.cross_entropy,
            sparsity=0.5,
            solver="random",
            update=update,
            fisher=FisherOptions(damping=1e-2),
        ).report
        losses[update] = report.loss_pruned
    assert losses["combinatorial"] < losses["none"]


def test_the_report_agrees_with_the_problem_and_the_network(trained, prepared) -> None:
    model, (x, y) = trained
    result = prepared.prune(sparsity=0.6, solver="magnitude", update="combinatorial")
    report, w = result.report, prepared.weights
    order = np.argsort(np.abs(w), kind="stable")
    assert set(np.flatnonzero(result.pruned)) == set(order[: 62 - int(62 * 0.4)])
    problem = prepared.problem(sparsity=0.6)
    assert report.objective == pytest.approx(problem.selection_value(result.pruned), rel=1e-9)
    assert report.refit_objective == pytest.approx(problem.joint_value(result.pruned), rel=1e-6)
    assert report.loss_dense == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert report.loss_pruned == pytest.approx(F.cross_entropy(result.model(x), y).item(), rel=1e-5)
    assert report.loss_samples == 120 and report.sparsity_asked == 0.6
    assert sum(row.n for row in report.layers) == report.n == 62
    assert sum(row.n_kept for row in report.layers) == report.n_kept
    assert sum(row.share for row in report.layers) == pytest.approx(1.0)
    for row, layer in zip(report.layers, prepared.layers, strict=True):
        assert row.norm_before == pytest.approx(np.linalg.norm(w[layer.slice]))
        assert row.norm_after == pytest.approx(np.linalg.norm(result.weights[layer.slice]), rel=1e-5)
        assert row.norm_removed == pytest.approx(np.linalg.norm(w[layer.slice][result.pruned[layer.slice]]))


@pytest.mark.parametrize("solver", ["greedy_ls", "obs"])
def test_a_report_is_printed_saved_and_loaded(prepared, solver: str, tmp_path) -> None:
    report = prepared.prune(sparsity=0.5, solver=solver).report
    text = str(report)
    for piece in ("fc1", "fc2", "fc3", "share of objective", "refit objective", "seconds", "gap", "status", solver):
        assert piece in text or piece == "status"
    path = tmp_path / "report.json"
    report.save(path)
    assert PruneReport.load(path) == report
    with pytest.raises(OutputError, match="cannot write"):
        report.save(tmp_path / "nowhere" / "report.json")


def test_reports_that_cannot_be_read_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        PruneReport.load(tmp_path / "none.json")
    for text in ("", "[]", "{}", '{"version": 1}', '{"version": 1, "layers": [{"name": 3}], "repairs": []}'):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(DataError):
            PruneReport.load(path)


@pytest.mark.parametrize("blocks", ["per_layer", "per_row", "fixed:9", "components:0.01", "clusters:12"])
def test_every_block_structure_ends_in_the_right_weights(trained, blocks: str) -> None:
    model, data = trained
    prepared = cbs_opt.prepare(model, data, F.cross_entropy, fisher=FisherOptions(blocks=blocks, damping=1e-3))
    by_magnitude = prepared.prune(sparsity=0.5, solver="magnitude", update="none")
    order = np.argsort(np.abs(prepared.weights), kind="stable")
    assert set(np.flatnonzero(by_magnitude.pruned)) == set(order[:31])
    np.testing.assert_array_equal(by_magnitude.weights, np.where(by_magnitude.pruned, 0, prepared.weights))
    updated = prepared.prune(sparsity=0.5, solver="greedy_ls", update="combinatorial")
    assert updated.report.n_blocks == len(prepared.blocks.blocks) > 1
    assert updated.report.refit_objective <= updated.report.objective * (1 + 1e-9)


def test_one_preparation_serves_many_prunings(trained, prepared) -> None:
    model, data = trained
    once = prepared.prune(sparsity=0.8, solver="greedy_ls")
    prepared.prune(sparsity=0.3, solver="woodfisher", update="single")
    again = prepared.prune(sparsity=0.8, solver="greedy_ls")
    alone = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.8, fisher=FisherOptions(damping=1e-3))
    assert np.array_equal(once.weights, again.weights) and np.array_equal(once.weights, alone.weights)
    exact = prepared.prune(n_kept=7, solver="magnitude")
    assert exact.report.n_kept == 7


def test_the_calibration_loss_is_that_of_the_masked_network(trained, prepared) -> None:
    model, (x, y) = trained
    pruned = np.random.default_rng(0).random(62) < 0.5
    masked = copy.deepcopy(model)
    cbs_opt.apply_masks(masked, prepared.layers.split(~pruned))
    assert prepared.calibration_loss(pruned) == pytest.approx(F.cross_entropy(masked(x), y).item(), rel=1e-5)


def test_rebuilding_with_other_options_and_at_other_weights(trained, prepared) -> None:
    model, data = trained
    damped = prepared.with_fisher(FisherOptions(damping=0.5, blocks="per_layer", first_order=True))
    assert damped.gradients is prepared.gradients and len(damped.blocks.blocks) == 3
    assert damped.problem(sparsity=0.5).has_gradient
    with pytest.raises(OptionError, match="n_rows"):
        prepared.with_fisher(FisherOptions(n_rows=5))
    moved = np.where(np.arange(62) % 2 == 0, prepared.weights, 0.0)
    there = prepared.relinearised(moved)
    other = copy.deepcopy(model)
    prepared.layers.write(other, moved)
    fresh = cbs_opt.prepare(other, data, F.cross_entropy, fisher=FisherOptions(damping=1e-3))
    assert torch.equal(there.gradients.factor, fresh.gradients.factor)
    assert np.array_equal(there.weights, fresh.weights)
    in_place = there.relinearised(prepared.weights, reuse_memory=True)
    assert in_place.gradients.factor is there.gradients.factor
    assert torch.equal(in_place.gradients.factor, prepared.gradients.factor)


def test_seeds(trained) -> None:
    model, data = trained
    options = {"sparsity": 0.6, "solver": "rmp", "fisher": FisherOptions(n_rows=40)}
    first = cbs_opt.prune(model, data, F.cross_entropy, seed=1, **options)
    same = cbs_opt.prune(model, data, F.cross_entropy, seed=1, **options)
    assert np.array_equal(first.weights, same.weights) and first.report.seed == 1
    rows = [
        cbs_opt.prepare(model, data, F.cross_entropy, seed=seed, fisher=FisherOptions(n_rows=40)).gradients.factor
        for seed in (1, 2)
    ]
    assert not torch.equal(*rows)


def test_convolutions_batch_norm_and_a_loader() -> None:
    x, y = inputs_for(ConvNet, 30, dtype=torch.float32)
    model = build(ConvNet, dtype=torch.float32)
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    result = cbs_opt.prune(
        model, loader, F.cross_entropy, sparsity=0.5, exclude="fc",
        fisher=FisherOptions(batch_size=3, blocks="per_layer"),
        calibration=CalibrationOptions(n_samples=20),
    )  # fmt: skip
    assert set(result.masks) == {"conv1", "grouped", "circular", "dilated"}
    assert (result.report.n_rows, result.report.batch_size, result.report.loss_samples) == (6, 3, 20)
    assert bool((result.model.fc.weight != 0).all())


def test_tied_weights_and_dict_batches() -> None:
    class Named(Tied):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    x, y = inputs_for(Tied, 30)
    model = build(Named)
    result = cbs_opt.prune(
        model, [{"x": x, "label": y}], lambda output, batch: F.cross_entropy(output, batch["label"]), sparsity=0.5
    )
    assert set(result.masks) == {"first", "twice", "head"} and result.report.n_kept == 22
    assert torch.equal(result.model.first.weight, result.model.second.weight)


def test_pruning_a_pruned_network_again(trained) -> None:
    model, data = trained
    once = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5, solver="magnitude", update="none")
    twice = cbs_opt.prune(once.model, data, F.cross_entropy, sparsity=0.8, solver="magnitude", update="none")
    direct = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.8, solver="magnitude", update="none")
    assert all(torch.equal(twice.masks[k], direct.masks[k]) for k in direct.masks)
    assert set(cbs_opt.read_masks(once.model)) == {"fc1", "fc2", "fc3"}


def test_the_training_flag_is_kept(trained) -> None:
    model, data = trained
    training = copy.deepcopy(model).train()
    assert cbs_opt.prune(training, data, F.cross_entropy, sparsity=0.5, solver="magnitude").model.training
    assert not cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5, solver="magnitude").model.training


class Untouchable:
    """Data that must not be read."""

    def __iter__(self):
        raise AssertionError("work has begun")


def broken(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.fc1.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, OptionError, "sparsity"),
        ({"sparsity": -0.2}, OptionError, "sparsity"),
        ({"solver": "greedy"}, UnknownNameError, "greedy_ls"),
        ({"solver": "greedy_ls[windw=3]"}, UnknownNameError, "windw"),
        ({"solver": "brute_force"}, CapabilityError, "brute_force"),
        ({"solver": "magnitude", "time_limit": 5.0}, CapabilityError, "time limit"),
        ({"solver": "greedy_ls", "objective": "joint"}, CapabilityError, "joint"),
        ({"objective": "both"}, UnknownNameError, "both"),
        ({"update": "double"}, UnknownNameError, "update"),
        ({"update_scale": -1.0}, OptionError, "update_scale"),
        ({"include": "fc7"}, UnknownNameError, "fc7"),
        ({"exclude": "*"}, ModelError, "no prunable layer"),
        ({"device": "tpu"}, OptionError, "device"),
        ({"device": "meta"}, OptionError, "device"),
        ({"seed": -1}, OptionError, "seed"),
        ({"seed": 1.5}, OptionError, "seed"),
        ({"loss_samples": 0}, OptionError, "loss_samples"),
        ({"stages": 0}, OptionError, "stages"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_any_work(
    trained, arguments: dict, error: type[CBSError], message: str
) -> None:
    with pytest.raises(error, match=message):
        cbs_opt.prune(trained[0], Untouchable(), F.cross_entropy, **arguments)


def test_bad_networks_are_refused_before_any_work(trained) -> None:
    model, data = trained
    with pytest.raises(ModelError, match=r"'fc1': weight\[0, 0\] is nan"):
        cbs_opt.prune(broken(model), Untouchable(), F.cross_entropy)
    with pytest.raises(ModelError, match="train mode"):
        cbs_opt.prune(build(ConvNet).train(), Untouchable(), F.cross_entropy)
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        cbs_opt.prune("network", Untouchable(), F.cross_entropy)
    with pytest.raises(ModelError, match="no prunable layer"):
        cbs_opt.prune(nn.ReLU(), Untouchable(), F.cross_entropy)
    with pytest.raises(OptionError, match="loss_fn"):
        cbs_opt.prune(model, Untouchable(), "cross_entropy")
    hidden = nn.Linear(3, 3)
    hidden.cache = hidden.weight * 2
    with pytest.raises(ModelError, match="cannot be copied"):
        cbs_opt.prune(hidden, Untouchable(), F.cross_entropy)
    with pytest.raises(OptionError, match="CUDA") if not torch.cuda.is_available() else pytest.raises(CBSError):
        cbs_opt.prune(model, data, F.cross_entropy, device="cuda:99")


def test_bad_data_are_refused_before_gradients(trained) -> None:
    model, (x, y) = trained
    with pytest.raises(DataError, match="is nan"):
        cbs_opt.prune(model, (torch.full_like(x, math.nan), y), F.cross_entropy)
    with pytest.raises(DataError, match="two passes"):
        cbs_opt.prune(model, DataLoader(TensorDataset(x, y), 16, shuffle=True), F.cross_entropy)
    with pytest.raises(DataError, match="one-shot"):
        cbs_opt.prune(model, iter([(x, y)]), F.cross_entropy)
    with pytest.raises(DataError, match="500 rows"):
        cbs_opt.prune(model, (x, y), F.cross_entropy, fisher=FisherOptions(n_rows=500))


@pytest.mark.parametrize("bad", [{}, {"sparsity": 0.5, "n_kept": 3}, {"n_kept": 63}, {"n_kept": -1}, {"n_kept": 2.0}])
def test_either_a_sparsity_or_a_number_of_weights(prepared, bad: dict) -> None:
    with pytest.raises(OptionError, match="n_kept"):
        prepared.prune(solver="magnitude", **bad)


def test_a_solver_that_takes_the_joint_objective_only_gets_it(prepared) -> None:
    report = prepared.prune(sparsity=0.5, solver="obs").report
    assert report.objective_kind == "joint"
    assert report.objective == pytest.approx(report.refit_objective, rel=1e-9)
    assert sum(row.share for row in report.layers) == pytest.approx(1.0)


def test_the_first_order_term_takes_part(trained) -> None:
    model, data = trained
    short = copy.deepcopy(model)
    with torch.no_grad():
        short.fc3.weight.mul_(0.3)
    losses = {}
    for first_order in (False, True):
        fisher = FisherOptions(first_order=first_order, damping=0.05, batch_size=4, n_rows=30)
        losses[first_order] = cbs_opt.prune(
            short, data, F.cross_entropy, sparsity=0.2, solver="magnitude", fisher=fisher
        ).report.loss_pruned
    assert losses[True] < losses[False]


def test_stages_end_at_exactly_k_with_a_report(trained, tmp_path) -> None:
    model, data = trained
    fisher = FisherOptions(n_rows=20, batch_size=4, damping=1e-2)
    options = cbs_opt.StageOptions(n_stages=3, n_polish=1, held_out=20, max_evaluations=4)
    ticks: list[tuple[int, int]] = []
    result = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.7, solver="obs", fisher=fisher, stages=options,
        journal=tmp_path / "journal", progress=lambda *a: ticks.append(a),
    )  # fmt: skip
    report = result.report
    assert report.n_kept == int(62 * (1 - 0.7)) == sum(int(m.sum()) for m in result.masks.values())
    assert report.stages == len(result.stages) == 4 and result.solution is None
    assert ticks == [(i, 4) for i in range(1, 5)]
    x, y = data
    assert report.loss_pruned == pytest.approx(F.cross_entropy(result.model(x), y).item(), rel=1e-5)
    assert report.loss_dense == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    path = tmp_path / "report.json"
    report.save(path)
    assert str(PruneReport.load(path)) == str(report)
    again = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.7, solver="obs", fisher=fisher, stages=options,
        journal=tmp_path / "journal",
    )  # fmt: skip
    assert np.array_equal(again.weights, result.weights) and "journal" in again.report.repairs[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 3, "update": "none"}, "combinatorial"),
        ({"stages": 3, "update_scale": 0.5}, "update_scale"),
        ({"stages": 3, "time_limit": 1.0, "solver": "greedy_ls"}, "time_limit"),
        ({"stages": 3, "fisher": FisherOptions(damping=0.0)}, "damping"),
        ({"stages": 3, "fisher": FisherOptions(blocks="clusters:5")}, "clusters:5"),
        ({"stages": 1, "journal": "somewhere"}, "journal"),
        ({"stages": 2.5}, "stages"),
        ({"allocation": "fair"}, "allocation"),
    ],
    ids=str,
)
def test_what_stages_do_not_support_is_refused_before_any_work(trained, arguments: dict, message: str) -> None:
    with pytest.raises((OptionError, UnknownNameError), match=message):
        cbs_opt.prune(trained[0], Untouchable(), F.cross_entropy, **arguments)
