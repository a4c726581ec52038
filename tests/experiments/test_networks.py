"""Where trained weights come from, and the catalogue."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cbs_opt import find_layers
from experiments.datasets import Dataset, load_dataset
from experiments.datasets.images import ImageSet
from experiments.networks import DEFAULT, EXPERIMENTS, ResNet20, get_experiment
from experiments.networks.checkpoints import save_checkpoint
from experiments.networks.experiment import ImageExperiment
from experiments.networks.load import Source, cached_checkpoint, find_checkpoint, load_network
from experiments.networks.training import train
from experiments.reports.literature import columns
from experiments.runs.options import published_kept
from solvers.errors import CheckpointError, UnknownNameError

QUICK: ImageExperiment = replace(EXPERIMENTS[DEFAULT], recipe=replace(EXPERIMENTS[DEFAULT].recipe, epochs=2))


def test_catalogue() -> None:
    assert DEFAULT == "digits-mlp"
    images = {"resnet20-cifar10", "cifarnet-cifar10", "efficientnet-lite0-imagenet"}
    assert set(EXPERIMENTS) == {"digits-mlp", "mlpnet-mnist", "smollm2-wikitext2", "minilm-sentences", *images}
    with pytest.raises(UnknownNameError, match="mlpnet-mnist"):
        get_experiment("mlpnet-mnits")


def test_trained_once_then_cached(own_cache: Path) -> None:
    dataset = load_dataset("digits")
    said: list[str] = []
    first = load_network(QUICK, dataset, say=said.append)
    assert any("training digits-mlp" in line for line in said)
    said.clear()
    second = load_network(QUICK, dataset, say=said.append)
    assert said == [f"weights: {cached_checkpoint(QUICK)}"]
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not second.model.training


def test_unwritable_cache_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CBS_OPT_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    network = load_network(QUICK, load_dataset("digits"), say=said.append)
    assert network.origin == "trained for this run"
    assert any("without keeping" in line for line in said)


def test_training_cut_off_under_another_recipe_is_not_thrown_away(own_cache: Path) -> None:
    state = cached_checkpoint(QUICK).with_suffix(".training")
    train(QUICK.model(), load_dataset("digits").train, replace(QUICK.recipe, epochs=1), state_path=state)
    with pytest.raises(CheckpointError, match="delete the file"):
        load_network(QUICK, load_dataset("digits"))
    assert state.exists()


def test_checkpoint_beside_the_data_comes_before_the_cache(tmp_path: Path, own_cache: Path) -> None:
    assert find_checkpoint(QUICK, tmp_path / "data") is None
    save_checkpoint(QUICK.model(), cached_checkpoint(QUICK))
    assert find_checkpoint(QUICK, tmp_path / "data") == cached_checkpoint(QUICK)
    beside = tmp_path / "checkpoints" / QUICK.checkpoint
    save_checkpoint(QUICK.model(), beside)
    for data_dir in (tmp_path / "data", tmp_path / "data" / "digits"):
        assert find_checkpoint(QUICK, data_dir) == beside


def test_other_weights_than_the_published_are_said_to_be_so(tmp_path: Path) -> None:
    path, dataset = tmp_path / "net.safetensors", load_dataset("digits")
    save_file(QUICK.model().state_dict(), path)
    published = replace(QUICK, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    said: dict[str, list[str]] = {"published": [], "other": [], "our own": []}
    load_network(published, dataset, Source(checkpoint=path), said["published"].append)
    save_file(QUICK.model().state_dict(), path)
    load_network(published, dataset, Source(checkpoint=path), said["other"].append)
    save_checkpoint(QUICK.model(), path)
    load_network(published, dataset, Source(checkpoint=path), said["our own"].append)
    warned = {name for name, lines in said.items() if any("not the published file" in line for line in lines)}
    assert warned == {"other"}


def test_the_files_beside_the_data_are_the_published(shared: Path) -> None:
    for experiment in EXPERIMENTS.values():
        if not isinstance(experiment, ImageExperiment):
            continue
        path = shared / "checkpoints" / experiment.checkpoint
        if experiment.sha256:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == experiment.sha256


def test_no_checkpoint_and_training_takes_hours(own_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"python -m experiments.train resnet20-cifar10"):
        load_network(EXPERIMENTS["resnet20-cifar10"], load_dataset("digits"))


def test_stale_statistics_are_estimated_once_per_checkpoint(tmp_path: Path, own_cache: Path) -> None:
    experiment = EXPERIMENTS["resnet20-cifar10"]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    train = ImageSet(images, torch.zeros(40, dtype=torch.int64), (0.5,) * 3, (0.2,) * 3)
    dataset = Dataset("toy", train, train, "made up")
    path = tmp_path / "net.safetensors"
    save_checkpoint(ResNet20(), path)
    said: list[str] = []
    first = load_network(experiment, dataset, Source(checkpoint=path), said.append)
    assert "estimating" in said[-1]
    assert not torch.equal(first.model.bn1.running_mean, torch.zeros(16))
    second = load_network(experiment, dataset, Source(checkpoint=path), said.append)
    assert "estimated earlier" in said[-1]
    assert torch.equal(first.model.bn1.running_mean, second.model.bn1.running_mean)
    kept = next((own_cache / "batchnorm").iterdir())
    kept.write_bytes(b"damaged")
    third = load_network(experiment, dataset, Source(checkpoint=path), said.append)
    assert torch.equal(first.model.bn1.running_mean, third.model.bn1.running_mean)


def test_published_rounding_and_quoted_accuracies() -> None:
    assert [published_kept(32_360, s) for s in (0.9, 0.95, 0.98)] == [3382, 1780, 712]
    assert columns("mlpnet-mnist")["CBS"][0.98] == 55.45
    assert columns("resnet20-cifar10")["C++"][0.9] == 79.32
    assert columns("digits-mlp") == {}


def test_efficientnet_has_the_weights_of_its_paper() -> None:
    model = EXPERIMENTS["efficientnet-lite0-imagenet"].model().eval()
    assert find_layers(model).n == 4_608_992
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 65, 64)).shape == (1, 1000)
