"""Checkpoints: round trip, damage, misfits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.networks import CIFARNet, MLPNet, ResNet20
from experiments.networks.checkpoints import load_checkpoint, read_tensors, save_checkpoint
from solvers.errors import CheckpointError


def test_round_trip_keeps_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "net.safetensors"
    model = ResNet20()
    save_checkpoint(model, path, note="made for a test")
    other = ResNet20()
    load_checkpoint(other, path)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert [p.name for p in path.parent.iterdir()] == ["net.safetensors"]


def test_files_made_elsewhere_may_lack_how_many_batches_were_seen(tmp_path: Path) -> None:
    path, model, other = tmp_path / "net.safetensors", ResNet20(), ResNet20()
    save_file({key: t for key, t in model.state_dict().items() if "num_batches" not in key}, path)
    load_checkpoint(other, path)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(MLPNet(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        read_tensors(path)


def test_absent_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            load_checkpoint(MLPNet(), path)


def test_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(MLPNet(), path)
    with pytest.raises(CheckpointError, match=r"not one of CIFARNet: it lacks 'conv1.bias' and \d more"):
        load_checkpoint(CIFARNet(), path)
    tensors = dict(MLPNet().state_dict())
    save_file({**tensors, "fc9.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"has an unknown 'fc9.weight'"):
        load_checkpoint(MLPNet(), path)
    save_file({**tensors, "fc2.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"'fc2.weight' has shape \(3, 3\), expected \(20, 40\)"):
        load_checkpoint(MLPNet(), path)


def test_a_changed_bit_is_noticed_where_there_is_a_digest(tmp_path: Path) -> None:
    path, model = tmp_path / "net.safetensors", MLPNet()
    save_checkpoint(model, path)
    assert load_checkpoint(model, path)
    whole = path.read_bytes()
    for place in (-1, -40_000):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged.*copy it again"):
            load_checkpoint(model, path)
    save_file(model.state_dict(), path)
    assert not load_checkpoint(model, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, value: float) -> None:
    tensors = {key: t.clone() for key, t in MLPNet().state_dict().items()}
    tensors["fc3.weight"][2, 3] = value
    save_file(tensors, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 'fc3.weight'"):
        load_checkpoint(MLPNet(), tmp_path / "net.safetensors")
