"""A pruned network in a folder and back, and what the rest of torch makes of a masked network."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import cbs_opt
from solvers.errors import CheckpointError, ModelError, OutputError
from tests.cbs_opt.networks import ConvNet, Mlp, Tied, TiedEmbedding, build, inputs_for
from tests.cbs_opt.transformers import Recurrent

NETWORKS = [Mlp, ConvNet, Tied, TiedEmbedding]


def pruned(cls: type[nn.Module] = Mlp, **options: object) -> cbs_opt.PruneResult:
    data = inputs_for(cls, 24, dtype=torch.float32)
    settings = {"solver": "magnitude", "update": "none", "sparsity": 0.6, **options}
    return cbs_opt.prune(build(cls, dtype=torch.float32), data, F.cross_entropy, **settings)


@pytest.mark.parametrize("cls", NETWORKS)
def test_a_saved_network_comes_back_as_it_was(cls, tmp_path) -> None:
    result = pruned(cls)
    result.save(tmp_path)
    other = build(cls, seed=7, dtype=torch.float32)
    loaded = cbs_opt.load(tmp_path, other)
    x, _ = inputs_for(cls, 5, dtype=torch.float32)
    assert loaded.model is other and torch.equal(other(x), result.model(x))
    masks = cbs_opt.read_masks(other)
    assert all(torch.equal(masks[name], mask) for name, mask in result.masks.items())
    assert cbs_opt.check(other, tmp_path)
    assert str(loaded.report) == str(result.report) and loaded.settings == result.settings
    assert (loaded.pruned == result.pruned).all() and loaded.layers.names == result.layers.names
    assert str(loaded.stages) == str(result.stages) and loaded.solution is None
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_folder_holds_nothing_but_tensors_and_json(tmp_path) -> None:
    pruned().save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors", ".html"}
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["solver"] == "magnitude" and settings["sparsity"] == 0.6 and settings["device"] == "cpu"
    header = json.loads((tmp_path / "cbs_opt.json").read_text())
    assert header["versions"]["torch"] == torch.__version__
    plain = build(Mlp, dtype=torch.float32)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_stages_and_their_settings_are_saved(tmp_path) -> None:
    result = pruned(solver="obs", update="combinatorial", stages=cbs_opt.StageOptions(n_stages=2, n_polish=0))
    result.save(tmp_path)
    loaded = cbs_opt.load(tmp_path, build(Mlp, dtype=torch.float32))
    assert str(loaded.stages) == str(result.stages) and len(loaded.stages) == 2
    assert loaded.settings["stages"]["n_stages"] == 2 and loaded.settings["objective"] == "joint"


def test_loading_over_a_pruned_network_replaces_its_masks(tmp_path) -> None:
    result, other = pruned(), pruned(sparsity=0.3)
    result.save(tmp_path)
    cbs_opt.load(tmp_path, other.model)
    masks = cbs_opt.read_masks(other.model)
    assert all(torch.equal(masks[name], mask) for name, mask in result.masks.items())


class Wider(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(5, 4)


class Longer(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(5, 6, bias=False)
        self.fc3 = nn.Linear(6, 3, bias=False)


class Untied(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.second.weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (Mlp, Wider, "'fc2.bias' was not saved"),
        (Wider, Mlp, "has no 'fc2.bias', which was saved"),
        (Mlp, Longer, r"'fc2.weight' was saved with shape \(4, 5\), and the network's has shape \(6, 5\)"),
        (Tied, Untied, "'second.weight' was saved tied to 'first.weight', and the network's is untied"),
    ],
)
def test_a_network_that_does_not_fit_is_named_and_left_alone(saved, given, message, tmp_path) -> None:
    torch.manual_seed(0)
    name = next(iter(saved().state_dict()))
    mask = {name: torch.rand(saved().state_dict()[name].shape) > 0.5}
    model = cbs_opt.apply_masks(saved(), mask)
    result = pruned(Mlp if issubclass(saved, Mlp) else Tied)
    from cbs_opt.report import folders

    folders.write(tmp_path, model, mask, result.report, {}, ())
    other = given()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ModelError, match=message):
        cbs_opt.load(tmp_path, other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_another_dtype_is_refused(tmp_path) -> None:
    pruned().save(tmp_path)
    with pytest.raises(ModelError, match=r"model.to\(torch.float32\)"):
        cbs_opt.load(tmp_path, build(Mlp, dtype=torch.float16))


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors", "report.json", "settings.json"])
def test_damage_is_found(name, tmp_path) -> None:
    pruned().save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="digest"):
        cbs_opt.load(tmp_path, build(Mlp, dtype=torch.float32))
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        cbs_opt.load(tmp_path, build(Mlp, dtype=torch.float32))


def test_a_folder_of_something_else_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no cbs_opt\.json"):
        cbs_opt.load(tmp_path, build(Mlp))
    (tmp_path / "cbs_opt.json").write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        cbs_opt.load(tmp_path, build(Mlp))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        pruned().save(tmp_path / "file")


def test_weights_that_came_back_are_not_saved(tmp_path) -> None:
    result = pruned()
    cbs_opt.remove_masks(result.model)
    result.save(tmp_path)
    with torch.no_grad():
        result.model.fc1.weight.fill_(1.0)
    with pytest.raises(ModelError, match="came back"):
        result.save(tmp_path)


def test_check_finds_weights_that_came_back() -> None:
    result = pruned()
    model, removed = result.model, int((~result.masks["fc1"]).sum())
    found = cbs_opt.check(model)
    assert found and found.ok and "all still zero" in str(found)
    stored = model.fc1.parametrizations.weight.original
    with torch.no_grad():
        stored.fill_(1.0)
    hidden = cbs_opt.check(model)
    assert not hidden and hidden.layers[0].n_hidden == removed and hidden.revived == {}
    plain = build(Mlp, seed=3, dtype=torch.float32)
    merged = cbs_opt.check(plain, result.masks)
    assert not merged and merged.revived["fc1"] == removed and not merged.layers[0].masked
    assert "came back" in str(merged)
    cbs_opt.apply_masks(plain, result.masks)
    assert cbs_opt.check(plain, result.masks)
    with torch.no_grad():
        plain.fc1.parametrizations.weight.original.fill_(float("nan"))
    assert cbs_opt.check(plain).layers[0].n_not_finite > 0


def test_check_without_masks_to_hold_against_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="holds no mask"):
        cbs_opt.check(build(Mlp))
    with pytest.raises(ModelError, match=r"shape \(5, 6\)"):
        cbs_opt.check(build(Mlp), {"fc1": torch.ones(2, 2).bool()})
    with pytest.raises(CheckpointError):
        cbs_opt.check(build(Mlp), tmp_path)


# Each of the following is a row of the table in docs/saving.md.


@pytest.mark.parametrize("cls", [*NETWORKS, Recurrent])
@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy", "copy"])
def test_copies_keep_outputs_masks_and_ties(cls, way, tmp_path) -> None:
    torch.manual_seed(0)
    model = cls().eval()
    layers = cbs_opt.find_layers(model)
    weights = zip(layers.names, layers.parameters(model), strict=True)
    cbs_opt.apply_masks(model, {name: torch.rand(w.shape) > 0.5 for name, w in weights})
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else copy.copy(model)
    x = torch.randint(0, 7, (4, 3)) if cls is TiedEmbedding else None
    x = torch.randn(4, *{Mlp: (6,), ConvNet: (2, 9, 8), Tied: (4,)}.get(cls, (6, 4))) if x is None else x
    assert torch.equal(twin(x), model(x))
    assert list(twin.state_dict()) == list(model.state_dict())
    assert list(dict(twin.named_parameters())) == list(dict(model.named_parameters()))
    masks = cbs_opt.read_masks(model)
    assert {name: mask.sum() for name, mask in cbs_opt.read_masks(twin).items()} == {
        name: mask.sum() for name, mask in masks.items()
    }
    assert cbs_opt.check(twin, masks)
    optimiser = torch.optim.SGD(twin.parameters(), 0.1)
    twin(x).sum().backward()
    optimiser.step()
    assert cbs_opt.check(twin, masks)
    if cls is Tied:
        assert twin.first.parametrizations.weight.original is twin.second.parametrizations.weight.original
    plain = cbs_opt.remove_masks(twin)
    assert list(dict(plain.named_parameters())) == list(dict(cls().named_parameters()))


def test_pickled_twice_is_masked_once() -> None:
    twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(pruned().model))))
    assert len(twin.fc1._state_dict_hooks) == 1 and len(twin.fc1.parametrizations.weight) == 1


def test_other_parametrizations_are_not_pickled() -> None:
    model = pruned().model
    nn.utils.parametrizations.weight_norm(model.fc1, "bias", dim=None)
    with pytest.raises(ModelError, match="no mask"):
        pickle.dumps(model)


def test_under_distributed_data_parallel(tmp_path) -> None:
    result = pruned()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(result.model)
        x, y = inputs_for(Mlp, 8, dtype=torch.float32)
        optimiser = torch.optim.AdamW(model.parameters(), 0.1)
        before = model(x).detach()
        for _ in range(2):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        assert not torch.equal(model(x), before)
    finally:
        torch.distributed.destroy_process_group()
    assert cbs_opt.check(result.model, result.masks)


def test_compiled_and_exported() -> None:
    result = pruned()
    x, _ = inputs_for(Mlp, 8, dtype=torch.float32)
    expected = result.model(x)
    assert torch.equal(torch.compile(result.model, backend="eager")(x), expected)
    program = torch.export.export(result.model, (x,))
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(torch.jit.trace(result.model, x)(x), expected)


def test_what_needs_plain_weights_says_so() -> None:
    model = pruned().model
    for convert in (
        lambda: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
        lambda: torch.jit.script(model),
    ):
        with pytest.raises(ModelError, match="remove_masks"):
            convert()
    plain = cbs_opt.remove_masks(copy.deepcopy(model))
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    weight = quantised.fc1.weight().dequantize()
    assert bool((weight[plain.fc1.weight == 0] == 0).all())
    assert isinstance(torch.jit.script(plain), torch.jit.ScriptModule)


def test_a_network_from_transformers_loads_by_from_pretrained(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 31, (2, 8))} for _ in range(4)]
    result = cbs_opt.prune(model, data, curvature="layer_inputs", solver="magnitude", update="none", sparsity=0.5)
    result.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaForCausalLM
    tokens = data[0]["input_ids"]
    expected = result.model(input_ids=tokens).logits
    assert torch.equal(theirs(input_ids=tokens).logits, expected)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert not cbs_opt.check(theirs, tmp_path).layers[0].masked
    cbs_opt.load(tmp_path, theirs)
    assert cbs_opt.check(theirs) and torch.equal(theirs(input_ids=tokens).logits, expected)


def test_onnx_computes_what_the_masked_network_does(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    result = pruned()
    x, _ = inputs_for(Mlp, 8, dtype=torch.float32)
    torch.onnx.export(result.model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), result.model(x).detach())
