"""Measure, select and update apart: gradients and masks on disk give the figures of the one call."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import FisherOptions, Setup
from solvers.errors import CapabilityError, CheckpointError, ModelError, OptionError, OutputError
from tests.cbs_opt.networks import Mlp, build, inputs_for, train_briefly

FISHER = FisherOptions(n_rows=60, damping=1e-3)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    x, _ = inputs_for(Mlp, 120, dtype=torch.float32)
    y = (x[:, :3] * 2).argmax(1)
    return train_briefly(build(Mlp, dtype=torch.float32), x, y), (x, y)


@pytest.fixture
def kept(trained, tmp_path: Path) -> Path:
    model, data = trained
    cbs_opt.prepare(model, data, F.cross_entropy, fisher=FISHER, seed=3).save(tmp_path / "gradients")
    return tmp_path / "gradients"


def figures(result: cbs_opt.PruneResult) -> tuple:
    report = result.report
    weights = [value.tolist() for value in result.model.state_dict().values()]
    return weights, report.objective, report.refit_objective, report.loss_dense, report.loss_pruned, report.layers


# -- three parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["none", "single", "combinatorial", "searched"])
@pytest.mark.parametrize("blocks", ["one", "per_layer", "clusters:20"])
def test_three_parts_give_the_figures_of_one_call(trained, tmp_path: Path, update: str, blocks: str) -> None:
    model, data = trained
    fisher = FisherOptions(n_rows=60, damping=1e-3, blocks=blocks)
    whole = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.8, solver="greedy_ls", update=update, fisher=fisher, seed=3
    )
    cbs_opt.prepare(model, data, F.cross_entropy, fisher=fisher, seed=3).save(tmp_path / "gradients")
    chosen = cbs_opt.load_prepared(tmp_path / "gradients", model, data, F.cross_entropy).prune(
        sparsity=0.8, solver="greedy_ls", update="none"
    )
    cbs_opt.save_masks(tmp_path / "masks.safetensors", chosen.masks)
    there = cbs_opt.load_prepared(tmp_path / "gradients", model, data, F.cross_entropy)
    updated = there.update_masks(cbs_opt.load_masks(tmp_path / "masks.safetensors"), update=update)
    assert figures(updated) == figures(whole)
    assert updated.report.solver == "masks given"


def test_a_sweep_of_the_scale_solves_once_and_is_that_of_single_calls(trained, kept: Path, monkeypatch) -> None:
    model, data = trained
    prepared = cbs_opt.load_prepared(kept, model, data, F.cross_entropy)
    alone = {
        scale: figures(prepared.prune(sparsity=0.7, solver="obs", update_scale=scale, objective="joint"))
        for scale in (0.0, 0.4, 1.0)
    }
    masks = prepared.prune(sparsity=0.7, solver="obs", update="none").masks
    fresh, calls = cbs_opt.load_prepared(kept, model, data, F.cross_entropy), []
    original = cbs_opt.update_weights
    monkeypatch.setattr("cbs_opt.engine.measured.update_weights", lambda *a, **k: calls.append(1) or original(*a, **k))
    for scale, expected in alone.items():
        assert figures(fresh.update_masks(masks, scale=scale, objective="joint"))[0] == expected[0]
    assert len(calls) == 1


def test_masks_of_any_origin_are_updated(trained, kept: Path) -> None:
    model, data = trained
    prepared = cbs_opt.load_prepared(kept, model, data, F.cross_entropy)
    foreign = {"fc2.weight": torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5}
    plain = prepared.update_masks(foreign, update="none")
    better = prepared.update_masks(foreign, update="combinatorial")
    removed = int((~foreign["fc2.weight"]).sum())
    assert plain.report.n_kept == better.report.n_kept == 62 - removed
    assert bool(plain.masks["fc1"].all()) and torch.equal(better.masks["fc2"], foreign["fc2.weight"])
    assert better.report.refit_objective == pytest.approx(plain.report.refit_objective)
    assert better.report.refit_objective <= plain.report.objective
    for wrong, message in (
        ({"fc9": foreign["fc2.weight"]}, "fc9"),
        ({"fc2": foreign["fc2.weight"].T}, "shape"),
        ({"fc2": foreign["fc2.weight"].float()}, "bool"),
    ):
        with pytest.raises(ModelError, match=message):
            prepared.update_masks(wrong)
    bare = cbs_opt.prepare(model, data, F.cross_entropy, curvature="none")
    assert torch.equal(bare.update_masks(foreign, update="none").model.fc2.weight, plain.model.fc2.weight)
    with pytest.raises(CapabilityError, match="curvature"):
        bare.update_masks(foreign)


# -- gradients on disk -----------------------------------------------------------------------------------


def test_kept_gradients_are_mapped_and_bring_their_setup(trained, kept: Path) -> None:
    model, data = trained
    fresh = cbs_opt.prepare(model, data, F.cross_entropy, fisher=FISHER, seed=3)
    found = cbs_opt.load_prepared(kept, model, data, F.cross_entropy)
    assert torch.equal(found.gradients.factor, fresh.gradients.factor)
    assert torch.equal(found.gradients.mean, fresh.gradients.mean)
    assert (found.fisher, found.workspace.setup.seed) == (FISHER, 3)
    damped = Setup(fisher=FisherOptions(n_rows=60, damping=0.5, blocks="per_layer"), seed=3)
    other = cbs_opt.load_prepared(kept, model, data, F.cross_entropy, damped)
    assert other.fisher.damping == 0.5 and len(other.blocks.blocks) == 3


def test_gradients_at_other_weights_come_back_with_them(trained, tmp_path: Path) -> None:
    model, data = trained
    prepared = cbs_opt.prepare(model, data, F.cross_entropy, fisher=FISHER)
    moved = prepared.relinearised(np.where(np.arange(62) % 3 == 0, 0.0, prepared.weights))
    moved.save(tmp_path)
    found = cbs_opt.load_prepared(tmp_path, model, data, F.cross_entropy)
    assert np.array_equal(found.weights, moved.weights)
    assert figures(found.prune(sparsity=0.5)) == figures(moved.prune(sparsity=0.5))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("network", "network"),
        ("data", "data"),
        ("loss", "loss"),
        (Setup(fisher=FISHER, seed=4), "seed"),
        (Setup(fisher=FisherOptions(n_rows=50, damping=1e-3), seed=3), "rows"),
        (Setup(fisher=FisherOptions(n_rows=60, dtype="float64"), seed=3), "dtype"),
        (Setup(fisher=FISHER, seed=3, exclude="fc2"), "layers"),
    ],
    ids=str,
)
def test_a_wrong_key_is_refused_and_named(trained, kept: Path, change: str | Setup, named: str) -> None:
    model, (x, y) = trained
    other = build(Mlp, seed=5, dtype=torch.float32) if change == "network" else model
    data = (x + 1e-3, y) if change == "data" else (x, y)
    loss = F.multi_margin_loss if change == "loss" else F.cross_entropy
    with pytest.raises(OptionError, match=f"the {named} is .* there and .* here"):
        cbs_opt.load_prepared(kept, other, data, loss, change if isinstance(change, Setup) else None)


def test_folders_without_whole_gradients_are_refused(trained, kept: Path, tmp_path: Path) -> None:
    model, data = trained
    with pytest.raises(CheckpointError, match="holds no gradients"):
        cbs_opt.load_prepared(tmp_path / "nowhere", model, data, F.cross_entropy)
    tensors = kept / "gradients.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        cbs_opt.load_prepared(kept, model, data, F.cross_entropy)
    header = json.loads((kept / "gradients.json").read_text())
    (kept / "gradients.json").write_text(json.dumps({**header, "version": 0}))
    with pytest.raises(CheckpointError, match="version"):
        cbs_opt.load_prepared(kept, model, data, F.cross_entropy)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        cbs_opt.prepare(model, data, F.cross_entropy, fisher=FISHER).save(tmp_path / "file")


# -- masks on disk ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**32)),
        min_size=1,
        max_size=4,
    )
)
def test_masks_come_back_as_they_were(tmp_path_factory, drawn: dict[str, tuple[list[int], int]]) -> None:
    path = tmp_path_factory.mktemp("masks") / "deep" / "masks.safetensors"
    masks = {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        for name, (shape, seed) in drawn.items()
    }
    cbs_opt.save_masks(path, masks)
    found = cbs_opt.load_masks(path)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) and found[name].dtype == torch.bool for name, mask in masks.items())


def test_masks_take_a_bit_a_weight(tmp_path: Path) -> None:
    cbs_opt.save_masks(tmp_path / "masks", {"fc": torch.rand(1000, 80) < 0.5})
    assert 10_000 <= (tmp_path / "masks").stat().st_size < 10_500


def test_bad_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    with pytest.raises(ModelError, match="no masks"):
        cbs_opt.save_masks(path, {})
    with pytest.raises(ModelError, match="bool"):
        cbs_opt.save_masks(path, {"fc": torch.ones(3)})
    cbs_opt.save_masks(path, {"fc": torch.ones(64, dtype=torch.bool)})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        cbs_opt.load_masks(path)
    for text in (b"", b"{}", b"not masks at all"):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match="cannot read"):
            cbs_opt.load_masks(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        cbs_opt.load_masks(tmp_path / "nowhere")
