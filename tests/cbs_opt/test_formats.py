"""Exported networks: what is in the files, that they compute the same, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import cbs_opt
from cbs_opt.formats import export as exporting
from cbs_opt.formats import semi_structured
from solvers.errors import (
    BackendError,
    CapabilityError,
    CheckpointError,
    DataError,
    ModelError,
    OptionError,
    UnknownNameError,
)
from tests.cbs_opt.networks import ConvNet, Mlp, Tied, TiedEmbedding, build, inputs_for
from tests.cbs_opt.transformers import Recurrent


def masked(cls: type[nn.Module] = Mlp, kept: float = 0.2) -> nn.Module:
    model = build(cls, dtype=torch.float32)
    layers = cbs_opt.find_layers(model)
    weights = zip(layers.names, layers.parameters(model), strict=True)
    torch.manual_seed(3)
    return cbs_opt.apply_masks(model, {name: torch.rand(weight.shape) < kept for name, weight in weights})


@pytest.mark.parametrize("cls", [Mlp, ConvNet, Tied, TiedEmbedding, Recurrent])
@pytest.mark.parametrize("kept", [0.2, 1.0])
def test_packed_files_give_back_every_bit(cls, kept, tmp_path) -> None:
    model = masked(cls, kept)
    report = cbs_opt.export(model, tmp_path / "deep" / "net.packed", "packed")
    state = cbs_opt.load_packed(tmp_path / "deep" / "net.packed")
    expected = model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in expected.items())
    plain = build(cls, seed=9, dtype=torch.float32)
    plain.load_state_dict(state)
    assert report.smaller == (kept < 1 and report.bytes_stored < 0.99 * report.bytes_plain)
    assert cbs_opt.check(plain, cbs_opt.read_masks(model))


def test_packed_bytes_are_a_bit_for_each_weight_and_the_values(tmp_path) -> None:
    model = nn.Linear(100, 90, bias=False)
    mask = torch.rand(90, 100) < 0.1
    cbs_opt.apply_masks(model, {"": mask})
    report = cbs_opt.export(model, tmp_path / "net", "packed")
    raw = load_file(tmp_path / "net")
    assert len(raw["weight:bits"]) == 9000 // 8 and len(raw["weight:values"]) == int(mask.sum())
    assert (np.unpackbits(raw["weight:bits"].numpy(), count=9000).reshape(90, 100).astype(bool) == mask.numpy()).all()
    assert report.smaller and report.bytes_stored < 9000 // 8 + 4 * int(mask.sum()) + 500
    assert "zeros alone make nothing faster" in str(report) and math.isnan(report.seconds_exported)


def test_dense_files_load_into_the_plain_network(tmp_path) -> None:
    model = masked()
    report = cbs_opt.export(model, tmp_path / "net.safetensors")
    plain = build(Mlp, seed=4, dtype=torch.float32)
    plain.load_state_dict(load_file(tmp_path / "net.safetensors"))
    x, _ = inputs_for(Mlp, 3, dtype=torch.float32)
    assert torch.equal(plain(x), model(x)) and not report.smaller
    assert "second.weight (as first.weight)" in str(cbs_opt.export(masked(Tied), tmp_path / "tied"))


def test_damaged_and_other_files_are_refused(tmp_path) -> None:
    cbs_opt.export(masked(), tmp_path / "net", "packed")
    with safe_open(tmp_path / "net", framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["fc1.weight:values"] = tensors["fc1.weight:values"][1:].clone()
    save_file(tensors, tmp_path / "short", about)
    with pytest.raises(CheckpointError, match=r"fc1.weight.*damaged"):
        cbs_opt.load_packed(tmp_path / "short")
    save_file(tensors, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a packed network"):
        cbs_opt.load_packed(tmp_path / "other")
    with pytest.raises(CheckpointError, match="cannot read"):
        cbs_opt.load_packed(tmp_path / "none")


@pytest.mark.parametrize("cls", [Mlp, ConvNet])
def test_programs_compute_the_same_for_any_batch(cls, tmp_path) -> None:
    model = masked(cls)
    x, _ = inputs_for(cls, 6, dtype=torch.float32)
    report = cbs_opt.export(model, tmp_path / "net.pt2", "torch", example=x)
    call = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(call(x[:3]), model(x[:3]))
    assert report.difference < 1e-5 and report.seconds_exported > 0 and "a call takes" in str(report)
    assert cbs_opt.check(model)


@pytest.mark.parametrize("cls", [Mlp, ConvNet])
def test_onnx_files_compute_the_same_for_any_batch(cls, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = masked(cls)
    x, _ = inputs_for(cls, 6, dtype=torch.float32)
    report = cbs_opt.export(model, tmp_path / "net.onnx", "onnx", example=x)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:4].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x[:4]).detach())
    assert report.difference < 1e-5 and "comes from onnxruntime" in str(report)


def test_onnx_of_a_language_model_called_by_keywords(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    cbs_opt.apply_masks(model, {"model.layers.0.mlp.up_proj": torch.rand(24, 16) < 0.5})
    tokens = torch.randint(0, 31, (3, 8))
    cbs_opt.export(model, tmp_path / "net.onnx", "onnx", example={"input_ids": tokens})
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    found = session.run(None, {"input_ids": tokens[:2].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(input_ids=tokens[:2]).logits.detach())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if bool(x.sum() > 0) else x


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_what_cannot_be_exported_is_told(format, tmp_path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    x, _ = inputs_for(Mlp, 6, dtype=torch.float32)
    with pytest.raises(OptionError, match="takes example="):
        cbs_opt.export(masked(), tmp_path / "net", format)
    with pytest.raises(OptionError, match="dynamic_batch=False"):
        cbs_opt.export(masked(), tmp_path / "net", format, example=x[:1])
    cbs_opt.export(masked(), tmp_path / "net", format, example=x[:1], dynamic_batch=False)
    with pytest.raises(DataError, match="not int"):
        cbs_opt.export(masked(), tmp_path / "net", format, example=3)
    with pytest.raises(ModelError, match="Branching"):
        cbs_opt.export(Branching(), tmp_path / "net", format, example=x[:, :3])
    with pytest.raises(UnknownNameError, match="dense"):
        cbs_opt.export(masked(), tmp_path / "net", "tflite")


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch) -> None:
    x, _ = inputs_for(Mlp, 6, dtype=torch.float32)
    monkeypatch.setattr(exporting, "_torch_program", lambda *_: lambda x: 2 * torch.ones(len(x), 3))
    with pytest.raises(BackendError, match="differ"):
        cbs_opt.export(masked(), tmp_path / "net", "torch", example=x)


def test_patterns_of_2_of_4_are_recognised() -> None:
    weight = torch.randn(8, 16)
    assert not semi_structured.is_2_of_4(weight)
    weight.view(8, 4, 4)[..., 1::2] = 0
    assert semi_structured.is_2_of_4(weight) and not semi_structured.is_2_of_4(weight[:, :15])


def test_sparse_tensor_cores_are_refused_where_there_are_none(monkeypatch) -> None:
    model = cbs_opt.apply_masks(nn.Linear(64, 32), {"": torch.tensor([True, False]).repeat(32, 32)})
    with pytest.raises(CapabilityError, match="the network is on cpu"):
        cbs_opt.semi_structured(model)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "an older card")
    with pytest.raises(CapabilityError, match=r"an older card has compute capability 7\.5"):
        semi_structured.check_device(torch.device("cuda"))


def test_layers_that_are_no_2_of_4_stay_dense_and_are_named(monkeypatch) -> None:
    monkeypatch.setattr(semi_structured, "check_device", lambda place: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64)).half()
    with pytest.raises(ModelError, match="more than 2 of 4"):
        cbs_opt.semi_structured(model)
    cbs_opt.apply_masks(model, {"0": torch.tensor([True, False]).repeat(32, 32)})
    sparse, report = cbs_opt.semi_structured(model)
    assert "1: " not in report.notes[0] and "1 linear layers" in report.notes[0]
    assert "1 stays dense: 64 × 32 are not multiples" in report.notes[1] and "more than 2 of 4" in report.notes[2]
    assert report.bytes_plain - report.bytes_stored == 32 * 64 * 2 // 2 - 32 * 64 // 8
    assert type(sparse[0]) is nn.Linear and cbs_opt.check(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse tensor cores are on CUDA devices")
def test_sparse_tensor_cores_compute_the_same() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).half().cuda().eval()
    cbs_opt.apply_masks(model, {"0": torch.tensor([True, False]).repeat(256, 128).cuda()})
    _, report = cbs_opt.semi_structured(model, torch.randn(64, 256).half().cuda())
    assert report.difference < 5e-2 and report.smaller
