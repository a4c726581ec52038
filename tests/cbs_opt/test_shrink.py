"""Networks whose dead channels and heads are gone compute what the masked ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
from solvers.errors import ModelError

pytest.importorskip("torch_pruning")


class Plain(nn.Module):
    """Convolutions with batch norm and padding, a depthwise one, pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 6, 3, padding=1)
        self.d = nn.Conv2d(6, 5, 1, bias=False)
        self.fc1, self.fc2 = nn.Linear(5 * 9, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn_b(self.b(F.relu(self.bn_a(self.a(x))))))
        x = F.avg_pool2d(F.relu(self.d(torch.sigmoid(self.c(x)))), 2)
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """A shortcut that ties two convolutions, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.d = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        return self.head(torch.cat([self.c(x), torch.tanh(self.d(x))], 1).mean((2, 3)))


def prepared(cls: type[nn.Module], rows: dict[str, list[int]], size: int = 6) -> tuple[nn.Module, torch.Tensor]:
    """A network in which some rows of layers are masked."""
    torch.manual_seed(0)
    model = cls().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2.0)
    masks = {name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool) for name in rows}
    for name, gone in rows.items():
        masks[name][gone] = False
        masks[name] &= torch.rand(masks[name].shape) < 0.9
    return cbs_opt.apply_masks(model, masks), torch.randn(4, 3, size, size)


def rows_of(report: cbs_opt.ShrinkReport) -> dict[str, tuple[int, int]]:
    return {row.name: (row.n, row.n_removed) for row in report.groups}


def test_channels_go_with_their_constants() -> None:
    model, x = prepared(Plain, {"a": [1, 2, 4, 5], "c": [0, 3], "d": [2], "fc1": [0, 5, 6]})
    before = model(x).detach()
    small, report = cbs_opt.shrink(model, x)
    assert rows_of(report)["c"] == (6, 2) and rows_of(report)["d"] == (5, 1) and rows_of(report)["fc1"] == (12, 3)
    # Behind batch norm and zero padding they are constants but for the border: one stands for the others.
    (name,) = (name for name in rows_of(report) if name.endswith("1 others"))
    assert rows_of(report)[name][1] >= 2
    other = torch.randn(7, 3, 6, 6) * 5
    for inputs in (x, other):
        torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), before) and small.d.in_channels == 4 and small.fc1.in_features == 4 * 9
    assert report.parameters_after == sum(p.numel() for p in small.parameters()) < report.parameters_before
    assert report.flops_after < report.flops_before and report.difference < 1e-5
    assert "why others stay" in str(report) and cbs_opt.check(small)


def test_tied_channels_go_together_or_stay() -> None:
    model, x = prepared(Residual, {"a": [0, 2, 3], "b": [0, 3, 4], "c": [1], "d": [0, 4]})
    with torch.no_grad():
        model.a.bias.fill_(-1.0)
        model.a.parametrizations.weight.original.mul_(10.0)
    small, report = cbs_opt.shrink(model, x)
    rows = rows_of(report)
    assert rows["b and 1 others"] == (6, 2) and rows["c"] == (4, 1) and rows["d"] == (5, 2)
    assert small.a.out_channels == small.b.out_channels == small.b.in_channels == 4 and small.head.in_features == 6
    (why,) = (row.why for row in report.groups if row.name.startswith("b "))
    assert "used by another layer" in why
    torch.testing.assert_close(small(x * 3), model(x * 3), rtol=1e-5, atol=1e-5)


def test_nothing_is_removed_where_nothing_is_dead() -> None:
    model, x = prepared(Residual, {"a": []})
    small, report = cbs_opt.shrink(model, x)
    assert report.groups == () and report.parameters_after == report.parameters_before
    assert torch.equal(small(x), model(x))


def test_a_layer_keeps_its_last_channel() -> None:
    model, x = prepared(Residual, {"d": list(range(5))})
    small, _ = cbs_opt.shrink(model, x)
    assert small.d.out_channels == 1
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)


def test_channels_of_a_budget_are_removed() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    data = [(torch.randn(8, 3, 6, 6), torch.randint(0, 4, (8,))) for _ in range(4)]
    options = {"solver": "magnitude", "update": "none", "curvature": "none"}
    result = cbs_opt.prune(model, data, F.cross_entropy, budget="channels:0.5", exclude="fc2", **options)
    small, report = cbs_opt.shrink(result.model, data[0][0])
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(small(x), result.model(x), rtol=1e-5, atol=1e-5)
    assert report.parameters_after < 0.7 * report.parameters_before


def test_one_sample_tells_no_constants() -> None:
    model, x = prepared(Residual, {"a": []})
    with pytest.raises(ModelError, match="two samples"):
        cbs_opt.shrink(model, x[:1])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_heads_and_hidden_units_of_transformers(kind) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
        model, layer = transformers.LlamaForCausalLM(config).eval(), "model.layers.0."
        value, output, up = "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4)).eval()
        layer, up = "encoder.layer.0.", "intermediate.dense"
        value, output = "attention.self.value", "attention.output.dense"
        model.get_submodule(layer + value).bias.data.normal_()
    masks = {}
    for name, gone in ((value, slice(0, 8)), (up, slice(3, 9))):
        weight = model.get_submodule(layer + name).weight
        masks[layer + name] = torch.ones_like(weight, dtype=torch.bool)
        masks[layer + name][gone] = False
    cbs_opt.apply_masks(model, masks)
    example = {"input_ids": torch.randint(0, 31, (3, 7))}
    small, report = cbs_opt.shrink(model, example)
    removed = {row.name: row.n_removed for row in report.groups}
    assert removed[next(name for name in removed if name.startswith("heads"))] == (2 if kind == "llama" else 1)
    assert sum(removed.values()) == (2 if kind == "llama" else 1) + 6
    assert small.get_submodule(layer + output).in_features == (16 if kind == "llama" else 24)
    tokens = torch.randint(0, 31, (2, 9))
    torch.testing.assert_close(small(tokens)[0], model(tokens)[0], rtol=1e-5, atol=1e-5)
    assert small(tokens)[0].shape == model(tokens)[0].shape
