"""Which weights are prunable and how they line up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from cbs_opt import ModelError, OptionError, UnknownNameError, apply_masks, find_layers
from tests.cbs_opt.networks import ConvNet, Mlp, SequenceNet, Tied, TiedEmbedding, build


def test_weights_of_linear_and_convolutions_in_order_without_biases() -> None:
    layers = find_layers(build(ConvNet))
    assert layers.names == ("conv1", "grouped", "circular", "dilated", "fc")
    assert [layer.shape for layer in layers][1] == (6, 2, 3, 3)
    assert [layer.kind for layer in layers] == ["Conv2d"] * 4 + ["Linear"]
    assert layers.n == sum(layer.n for layer in layers) == 72 + 108 + 36 + 96 + 12
    assert [layer.start for layer in layers] == [0, 72, 180, 216, 312]
    assert find_layers(build(SequenceNet))["conv"].kind == "Conv1d"


def test_read_write_split_and_join_are_inverse() -> None:
    model = build(ConvNet)
    layers = find_layers(model)
    w = layers.read(model)
    assert w.dtype == torch.float64 and w.shape == (layers.n,)
    assert torch.equal(w[layers["grouped"].slice].view(6, 2, 3, 3), model.grouped.weight)
    assert torch.equal(layers.join(layers.split(w)), w)
    new = torch.arange(layers.n, dtype=torch.float64)
    biases = model.conv1.bias.clone()
    layers.write(model, new)
    assert torch.equal(layers.read(model), new)
    assert torch.equal(model.conv1.bias, biases)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 32360), (0.5, 16180), (0.9, 3235), (0.95, 1618), (0.98, 647)])
def test_the_number_kept_truncates_as_in_the_literature(sparsity: float, kept: int) -> None:
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((784, 40), (40, 20), (20, 10))))
    layers = find_layers(model)
    assert layers.n_kept(sparsity) == kept
    assert layers.n_prune(sparsity) == 32360 - kept


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), 90, "much", None])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity: object) -> None:
    with pytest.raises(OptionError, match="sparsity"):
        find_layers(build(Mlp)).n_kept(sparsity)


def test_include_and_exclude_patterns() -> None:
    model = build(Mlp)
    assert find_layers(model, include="fc[12]").names == ("fc1", "fc2")
    assert find_layers(model, include=("fc1", "fc3.weight")).names == ("fc1", "fc3")
    assert find_layers(model, exclude=["fc2"]).names == ("fc1", "fc3")


def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"include pattern 'fc4'.*Did you mean 'fc"):
        find_layers(build(Mlp), include=("fc1", "fc4"))
    with pytest.raises(UnknownNameError, match="exclude pattern"):
        find_layers(build(Mlp), exclude="conv*")
    with pytest.raises(UnknownNameError, match="bn"):
        find_layers(build(ConvNet), include="bn")


def test_no_prunable_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="no prunable layer"):
        find_layers(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))
    with pytest.raises(ModelError, match="no prunable layer is left"):
        find_layers(build(Mlp), exclude="*")


def test_tied_weights_are_one_layer() -> None:
    layers = find_layers(build(Tied))
    assert layers.names == ("first", "twice", "head")
    assert layers["first"].places == ("first.weight", "second.weight")
    assert layers.n == 16 + 16 + 12
    assert find_layers(build(Tied), exclude="second").names == ("twice", "head")
    assert find_layers(build(TiedEmbedding))["head"].places == ("head.weight", "embedding.weight")


def test_a_module_that_is_registered_twice_is_one_layer() -> None:
    shared = nn.Linear(3, 3)
    layers = find_layers(nn.Sequential(shared, nn.ReLU(), shared))
    assert layers.names == ("0",)
    assert layers.n == 9


def test_masked_layers_are_the_same_layers() -> None:
    model = build(Tied)
    before = find_layers(model)
    apply_masks(model, {"first": torch.eye(4).bool()})
    assert find_layers(model) == before
    assert int((before.read(model)[:16] != 0).sum()) == 4
    with pytest.raises(ModelError, match="parametrization"):
        before.write(model, torch.zeros(before.n))


def test_other_parametrizations_and_prune_masks_are_refused_with_the_remedy() -> None:
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="remove_parametrizations"):
        find_layers(normed)
    masked = nn.Sequential(nn.Linear(3, 3))
    torch_prune.l1_unstructured(masked[0], "weight", 0.5)
    with pytest.raises(ModelError, match="from_torch_prune"):
        find_layers(masked)


def test_lazy_and_complex_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="initialised"):
        find_layers(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ModelError, match="real"):
        find_layers(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = build(Mlp)
    with torch.no_grad():
        model.fc2.weight[1, 3] = value
    with pytest.raises(ModelError, match=r"'fc2': weight\[1, 3\] is (nan|inf)"):
        find_layers(model).read(model)


def test_another_architecture_is_refused() -> None:
    layers = find_layers(build(Mlp))
    with pytest.raises(ModelError, match="fc1"):
        layers.read(build(ConvNet))
    other = copy.deepcopy(build(Mlp))
    other.fc2 = nn.Linear(5, 5)
    with pytest.raises(ModelError, match="'fc2'"):
        layers.read(other)
    with pytest.raises(ModelError, match="vector"):
        layers.write(build(Mlp), torch.zeros(3))
    with pytest.raises(ModelError, match="fc2"):
        layers.join({"fc1": torch.zeros(5, 6)})
    with pytest.raises(UnknownNameError, match="fc9"):
        layers["fc9"]
