"""Which weights are prunable and how they line up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import prune as torch_prune

from cbs_opt import ModelError, OptionError, UnknownNameError, apply_masks, find_layers, prune, remove_masks
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


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_other_parametrizations_and_prune_masks_are_refused_with_the_remedy() -> None:
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="remove_parametrizations"):
        find_layers(normed)
    old = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ModelError, match="weight_norm"):
        find_layers(old)
    assert find_layers(old, exclude="0").names == ("1",)
    masked = nn.Sequential(nn.Linear(3, 3))
    torch_prune.l1_unstructured(masked[0], "weight", 0.5)
    with pytest.raises(ModelError, match="from_torch_prune"):
        find_layers(masked)


def test_lazy_and_complex_weights_are_refused() -> None:
    for lazy in (nn.LazyLinear(3), nn.LazyConvTranspose2d(3, 2), nn.LazyBatchNorm1d()):
        with pytest.raises(ModelError, match="initialised"):
            find_layers(nn.Sequential(lazy, nn.Linear(3, 3)))
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


class Pair(nn.Module):
    """Two layers of one shape and a head, tied in the way asked for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        if how == "data":
            self.second.weight.data = self.first.weight.data
        elif how == "parameter":
            self.second.weight = nn.Parameter(self.first.weight)
        elif how == "transposed":
            self.second.weight = nn.Parameter(self.first.weight.detach().t())
        elif how == "part":
            self.head.weight.data = self.first.weight.data[:3]
        elif how == "buffer":
            self.register_buffer("copy", self.first.weight.data.view(16))
        elif how == "attribute":
            self.alias = self.first.weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def pair_data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(24, 4), torch.randint(0, 3, (24,)))]


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_weights_that_share_storage_are_one_layer_and_stay_tied(how: str) -> None:
    torch.manual_seed(1)
    model = Pair(how)
    layers = find_layers(model)
    assert layers.names == ("first", "head") and layers["first"].places == ("first.weight", "second.weight")
    assert layers["first"].uses == (("first", "weight"), ("second", "weight"))
    assert find_layers(model, exclude="second").names == ("head",)
    twin = Pair("none")
    twin.load_state_dict(model.state_dict())
    twin.second.weight = twin.first.weight
    results = [prune(m, pair_data(), F.cross_entropy, sparsity=0.5, solver="obd") for m in (model, twin)]
    # As if they were one Parameter: the same gradients, and so the same weights.
    torch.testing.assert_close(torch.from_numpy(results[0].weights), torch.from_numpy(results[1].weights))
    pruned = remove_masks(results[0].model)
    assert pruned.first.weight is pruned.second.weight and results[0].report.n == 28
    assert model.second.weight is not model.first.weight
    assert model.second.weight.data_ptr() == model.first.weight.data_ptr()


@pytest.mark.parametrize("how", ["transposed", "part", "buffer", "attribute"])
def test_memory_shared_in_another_layout_is_refused_by_name(how: str) -> None:
    names = {"transposed": "second.weight", "part": "head.weight", "buffer": "copy", "attribute": "alias"}
    with pytest.raises(ModelError, match="shares memory") as error:
        prune(Pair(how), pair_data(), F.cross_entropy, sparsity=0.5, include="head", solver="magnitude")
    assert names[how] in str(error.value) and "first.weight" in str(error.value)


def test_parts_of_one_storage_that_do_not_overlap_are_layers_of_their_own() -> None:
    model, flat = Pair("none"), torch.randn(32)
    model.first.weight.data, model.second.weight.data = flat[:16].view(4, 4), flat[16:].view(4, 4)
    assert find_layers(model).names == ("first", "second", "head")


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_masks_keep_weights_tied_that_share_storage(how: str) -> None:
    model = apply_masks(Pair(how), {"second": torch.eye(4).bool()})
    x, y = pair_data()[0]
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert torch.equal(model.first.weight, model.second.weight)
    assert torch.equal(model.first.weight != 0, torch.eye(4).bool())
    remove_masks(model)
    assert model.first.weight.data_ptr() == model.second.weight.data_ptr()


def test_frozen_weights_are_left_alone_unless_named() -> None:
    model = build(Mlp)
    model.fc2.weight.requires_grad_(False)
    layers = find_layers(model)
    assert layers.names == ("fc1", "fc3")
    assert [(s.name, s.asked) for s in layers.skipped] == [("fc2.weight", False)]
    assert "frozen" in layers.skipped[0].reason
    assert find_layers(model, include="fc*").names == find_layers(model, include=("*", "fc2")).names
    assert "fc2" in find_layers(model, include="fc2.weight").names
    with pytest.raises(ModelError, match="frozen"):
        find_layers(model.requires_grad_(False))


def test_what_is_skipped_is_named_with_the_reason() -> None:
    layers = find_layers(build(TiedEmbedding), exclude="mix")
    assert [(s.name, s.shape, s.reason, s.asked) for s in layers.skipped] == [("mix.weight", (5, 5), "excluded", True)]
    assert layers.n_model == 7 * 5 + 5 * 5 + 5
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Bilinear(2, 2, 3), nn.Linear(3, 2))
    reasons = {s.name: s.reason for s in find_layers(normed, exclude="0").skipped}
    assert set(reasons) == {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "1.weight"}
    assert "Bilinear" in reasons["1.weight"] and "register_layer" in reasons["1.weight"]
