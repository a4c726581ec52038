"""Networks as users bring them: every matrix is pruned, or named as skipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from tests.cbs_opt.transformers import T5, Encoder, Gpt2, Recurrent, Upsampling, ViT

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

NETWORKS = {
    "gpt2": lambda: Gpt2(),
    "gpt2 untied": lambda: Gpt2(tied=False),
    "t5": T5,
    "vit": ViT,
    "lstm": Recurrent,
    "encoder": Encoder,
    "convolutions": Upsampling,
}
SKIPPED = {
    "gpt2": ["wpe.weight"],
    "gpt2 untied": ["wte.weight", "wpe.weight"],
    "t5": ["shared.weight", "encoder.relative_attention_bias.weight", "decoder.relative_attention_bias.weight"],
    "vit": ["cls_token", "pos_embed"],
}
KINDS = {
    "gpt2": {"Conv1D": 8, "Linear": 1},
    "gpt2 untied": {"Conv1D": 8, "Linear": 1},
    "t5": {"Linear": 15},
    "vit": {"Conv2d": 1, "MultiheadAttention": 2, "Linear": 3},
    "lstm": {"LSTM": 8, "Linear": 1},
    "encoder": {"MultiheadAttention": 4, "Linear": 5},
    "convolutions": {"Conv2d": 2, "ConvTranspose2d": 1, "ConvTranspose1d": 1},
}


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    shapes = {"vit": (3, 8, 8), "lstm": (5, 4), "encoder": (5, 8), "convolutions": (4, 5, 5)}
    if name in shapes:
        return model, torch.randn(24, *shapes[name]), torch.randint(0, 3, (24,))
    tokens = torch.randint(0, model.lm_head.out_features, (24, 6))
    return model, tokens[:, :-1], tokens[:, -1]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_matrix_is_found_or_named(name: str) -> None:
    model, _, _ = network(name)
    layers = cbs_opt.find_layers(model)
    kinds = [layer.kind for layer in layers]
    assert {kind: kinds.count(kind) for kind in kinds} == KINDS[name]
    assert [skip.name for skip in layers.skipped] == SKIPPED.get(name, [])
    named = {place for layer in layers for place in layer.places} | {skip.name for skip in layers.skipped}
    matrices = {key: parameter for key, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert set(matrices) <= named
    assert layers.n + sum(matrices[skip.name].numel() for skip in layers.skipped) == sum(
        parameter.numel() for parameter in matrices.values()
    )
    assert layers.n_model == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_masking_training_copying_and_unmasking(name: str) -> None:
    model, x, y = network(name)
    before = copy.deepcopy(model.state_dict())
    result = cbs_opt.prune(model, [(x, y)], F.cross_entropy, sparsity=0.5, solver="obd")
    report, pruned = result.report, result.model
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert int((result.weights == 0).sum()) == result.pruned.sum() == report.n - report.n_kept
    removed = sum(int((p == 0).sum()) for p in cbs_opt.remove_masks(copy.deepcopy(pruned)).parameters() if p.ndim > 1)
    assert report.sparsity_of_model == pytest.approx(removed / report.n_model)
    optimiser = torch.optim.AdamW(pruned.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(pruned(x), y).backward()
        optimiser.step()
    twin = copy.deepcopy(pruned)
    plain = cbs_opt.remove_masks(copy.deepcopy(pruned))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), pruned(x))
        torch.testing.assert_close(plain(x), pruned(x))
    for layer in result.layers:
        for network_ in (pruned, plain):
            weight = getattr(*layer.held(network_))
            assert not bool(weight[~result.masks[layer.name]].any())
            assert bool(weight[result.masks[layer.name]].all())
    assert [key for key, _ in plain.named_parameters()] == [key for key, _ in model.named_parameters()]
    fresh = NETWORKS[name]().eval()
    fresh.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(fresh(x), pruned(x))
    zeros = cbs_opt.masks_from_zeros(fresh)
    assert zeros and all(torch.equal(zeros.get(key, mask | True), mask) for key, mask in result.masks.items())


@pytest.mark.parametrize("curvature", ["layer_inputs", "kfac"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_of_every_kind_are_measured_by_what_they_see(name: str, curvature: str) -> None:
    model, x, y = network(name)
    result = cbs_opt.prune(model, [(x, y)], F.cross_entropy, sparsity=0.5, curvature=curvature, solver="sweep")
    report = result.report
    assert report.n_kept == int(report.n * 0.5) and math.isfinite(report.loss_pruned)
    assert not any("never called" in repair for repair in report.repairs)
    tied = [repair for repair in report.repairs if "as another matrix" in repair]
    assert len(tied) == (name == "gpt2")


@pytest.mark.parametrize("name", ["gpt2", "vit", "lstm", "convolutions"])
def test_gradients_line_up_with_the_weights(name: str) -> None:
    model, x, y = network(name)
    model.double()
    x = x.double() if x.is_floating_point() else x
    prepared = cbs_opt.prepare(model, [(x, y)], F.cross_entropy, fisher=cbs_opt.FisherOptions(dtype="float64"))
    direction = torch.randn(prepared.n, dtype=torch.float64)
    weights, step = torch.from_numpy(prepared.weights), 1e-5
    up, down = (prepared.loss((weights + sign * step * direction).numpy()) for sign in (1, -1))
    slope = float(prepared.gradients.mean @ direction)
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-8)
    again = prepared.prune(sparsity=0.3, solver="magnitude", update="none")
    assert prepared.prune(sparsity=0.6, solver="magnitude", update="none").report.n_kept < again.report.n_kept


def test_rows_of_blocks_are_outputs() -> None:
    model, x, y = network("gpt2")
    prepared = cbs_opt.prepare(model, [(x, y)], F.cross_entropy, fisher=cbs_opt.FisherOptions(blocks="per_row"))
    block = next(block for block in prepared.blocks.blocks if block.name == "h.0.c_attn[2]")
    torch.testing.assert_close(torch.as_tensor(block.weights).float(), model.h[0].c_attn.weight[:, 2].detach())


def test_an_embedding_is_pruned_where_it_is_named() -> None:
    model, x, y = network("gpt2 untied")
    result = cbs_opt.prune(model, [(x, y)], F.cross_entropy, include="wte", sparsity=0.5, solver="obd")
    assert result.layers.names == ("wte",) and result.layers["wte"].kind == "Embedding"
    assert int((result.model.wte.weight == 0).sum()) == 44
    assert all(skip.asked for skip in result.report.skipped if skip.name != "wpe.weight") and not result.report.warnings


def test_the_report_says_what_was_skipped(tmp_path) -> None:
    model, x, y = network("gpt2 untied")
    report = cbs_opt.prune(model, [(x, y)], F.cross_entropy, sparsity=0.5, solver="magnitude", update="none").report
    table = 11 * 8
    share = (table + 6 * 8) / report.n_model
    assert share < 0.1 and not report.warnings
    for parameter in model.h[0].parameters():
        parameter.requires_grad_(False)
    report = cbs_opt.prune(model, [(x, y)], F.cross_entropy, sparsity=0.5, solver="magnitude", update="none").report
    (warning,) = report.warnings
    assert "h.0.c_attn.weight" in warning and f"{share + 12 * 64 / report.n_model:.1%}" in warning
    text = str(report)
    assert "skipped: wte.weight (11, 8): Embedding" in text and "frozen" in text and "warning: " in text
    assert f"whole network: {report.sparsity_of_model:.2%} of {report.n_model:,}" in text
    report.save(tmp_path / "report.json")
    assert cbs_opt.PruneReport.load(tmp_path / "report.json") == report
