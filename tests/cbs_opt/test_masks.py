"""Masks stay: through copies, state dicts, training and conversions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from cbs_opt import (
    ModelError,
    apply_masks,
    from_torch_prune,
    masks_from_zeros,
    read_masks,
    remove_masks,
    to_torch_prune,
)
from tests.cbs_opt.networks import Mlp, Tied, TiedEmbedding, build, inputs_for


def some_masks(model: nn.Module, *names: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(model.get_submodule(n).weight.shape, generator=generator) < 0.5 for n in names}


@pytest.fixture
def masked() -> tuple[nn.Module, dict[str, Tensor]]:
    model = build(Mlp)
    masks = some_masks(model, "fc1", "fc3")
    return apply_masks(model, masks), masks


def check_masked(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        assert bool((model.get_submodule(name).weight[~mask] == 0).all())
        assert bool((model.get_submodule(name).weight[mask] != 0).any())


def same_masks(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_masks_are_applied_and_read_back(masked) -> None:
    model, masks = masked
    check_masked(model, masks)
    assert same_masks(read_masks(model), masks)
    assert bool((model.fc2.weight != 0).all())


def test_masks_survive_a_deep_copy_and_copies_are_independent(masked) -> None:
    model, masks = masked
    twin = copy.deepcopy(model)
    check_masked(twin, masks)
    assert same_masks(read_masks(twin), masks)
    remove_masks(twin)
    assert not read_masks(twin)
    check_masked(model, masks)
    assert torch.isfinite(model(inputs_for(Mlp, 2)[0])).all()
    again = copy.deepcopy(model)
    apply_masks(again, {"fc1.bias": torch.zeros(5, dtype=torch.bool)})
    assert bool((again.fc1.bias == 0).all()) and bool((model.fc1.bias != 0).any())


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_training_does_not_bring_pruned_weights_back(masked, optimiser: str) -> None:
    model, masks = masked
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    x, y = inputs_for(Mlp, 32)
    if optimiser == "adam":
        steps = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    else:
        steps = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for _ in range(8):
        steps.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps.step()
    check_masked(model, masks)
    for name, mask in masks.items():
        assert bool((model.get_submodule(name).weight[mask] != before[name][mask]).any())
        assert bool((model.get_submodule(name).parametrizations.weight.original[~mask] == 0).all())


def test_the_state_dict_keeps_its_names_and_loads_anywhere(masked) -> None:
    model, masks = masked
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert set(state) == set(build(Mlp).state_dict())
    x, _ = inputs_for(Mlp, 4)
    dense = build(Mlp, seed=5)
    dense.load_state_dict(state)
    assert torch.equal(dense(x), model(x))
    assert same_masks({k: masks_from_zeros(dense)[k] for k in masks}, masks)
    other = apply_masks(build(Mlp, seed=6), masks)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    check_masked(other, masks)


def test_a_state_dict_of_another_mask_is_refused(masked) -> None:
    model, _ = masked
    with pytest.raises(RuntimeError, match="mask has removed"):
        model.load_state_dict(build(Mlp).state_dict())


def test_a_single_layer_as_the_whole_network() -> None:
    layer = nn.Linear(3, 3)
    mask = torch.eye(3).bool()
    apply_masks(layer, {"": mask})
    fresh = nn.Linear(3, 3)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight != 0, mask)
    layer.load_state_dict(fresh.state_dict())
    assert torch.equal(read_masks(layer)[""], mask)


def test_removing_masks_leaves_plain_zeros(masked) -> None:
    model, masks = masked
    x, _ = inputs_for(Mlp, 4)
    before = model(x).detach()
    plain = remove_masks(model)
    assert plain is model and type(model.fc1) is nn.Linear
    assert list(dict(model.named_parameters())) == list(dict(build(Mlp).named_parameters()))
    assert torch.equal(model(x), before)
    check_masked(model, masks)
    model.load_state_dict(build(Mlp).state_dict())
    assert bool((model.fc1.weight != 0).all())


def test_applying_again_replaces_the_mask(masked) -> None:
    model, masks = masked
    new = {"fc1": ~masks["fc1"]}
    apply_masks(model, new)
    assert torch.equal(read_masks(model)["fc1"], new["fc1"])
    assert bool((model.fc1.weight == 0).all())
    assert len(model.fc1.parametrizations.weight) == 1


def test_shared_weights_are_masked_everywhere() -> None:
    model = build(Tied)
    mask = some_masks(model, "first")["first"]
    apply_masks(model, {"first": mask})
    assert torch.equal(model.second.weight, model.first.weight)
    twin = copy.deepcopy(model)
    assert twin.first.parametrizations.weight.original is twin.second.parametrizations.weight.original
    remove_masks(model)
    assert model.first.weight is model.second.weight
    embedding = build(TiedEmbedding)
    mask = some_masks(embedding, "head")["head"]
    apply_masks(embedding, {"head": mask})
    assert bool((embedding.embedding.weight[~mask] == 0).all())


def test_a_nan_under_the_mask_does_not_leak(masked) -> None:
    model, masks = masked
    with torch.no_grad():
        model.fc1.parametrizations.weight.original[~masks["fc1"]] = float("nan")
    assert torch.isfinite(model(inputs_for(Mlp, 2)[0])).all()
    assert torch.isfinite(model.state_dict()["fc1.weight"]).all()


def test_conversions_to_and_from_torch_prune(masked) -> None:
    model, masks = masked
    x, _ = inputs_for(Mlp, 4)
    theirs = to_torch_prune(model)
    assert "fc1.weight_mask" in theirs.state_dict() and torch_prune.is_pruned(theirs)
    assert torch.equal(theirs(x), model(x))
    assert same_masks(read_masks(model), masks)
    theirs(x).sum().backward()
    ours = from_torch_prune(theirs)
    assert same_masks(read_masks(ours), masks)
    assert torch.equal(ours(x), model(x))
    assert torch_prune.is_pruned(theirs) and not torch_prune.is_pruned(ours)
    assert torch.equal(theirs(x), model(x))
    check_masked(copy.deepcopy(ours), masks)


def test_conversion_of_masks_made_by_torch(masked) -> None:
    model = build(Mlp)
    torch_prune.l1_unstructured(model.fc1, "weight", 0.5)
    torch_prune.random_unstructured(model.fc1, "bias", 2)
    x, _ = inputs_for(Mlp, 4)
    ours = from_torch_prune(model)
    assert set(read_masks(ours)) == {"fc1", "fc1.bias"}
    assert torch.equal(ours(x), model(x))


def test_nothing_to_convert_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to convert"):
        to_torch_prune(build(Mlp))
    with pytest.raises(ModelError, match="nothing to convert"):
        from_torch_prune(build(Mlp))


def test_bad_masks_are_refused_and_change_nothing() -> None:
    model = build(Mlp)
    good = torch.zeros(5, 6, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"shape \(2, 2\)"):
        apply_masks(model, {"fc1": good, "fc2": torch.ones(2, 2).bool()})
    with pytest.raises(ModelError, match="no weight 'fc7'"):
        apply_masks(model, {"fc1": good, "fc7": good})
    with pytest.raises(ModelError, match="0 and 1"):
        apply_masks(model, {"fc1": torch.full((5, 6), 0.5)})
    assert not parametrize.is_parametrized(model.fc1)
    parametrizations.weight_norm(model.fc2)
    with pytest.raises(ModelError, match="already has a parametrization"):
        apply_masks(model, {"fc2": torch.ones(4, 5)})
