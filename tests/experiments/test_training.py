"""Training: resumes to the same weights, keeps nothing half-written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.datasets import load_dataset
from experiments.datasets.images import ImageSet
from experiments.networks import DigitsMLP
from experiments.networks.checkpoints import read_tensors
from experiments.networks.evaluation import evaluate
from experiments.networks.training import Epoch, Recipe, train, train_to_file
from solvers.errors import CheckpointError

RECIPE = Recipe(epochs=4, batch_size=64, learning_rate=0.05, augment=True)


@pytest.fixture(scope="module")
def samples() -> ImageSet:
    return load_dataset("digits").train.subset(slice(0, 300))


def fresh() -> nn.Module:
    torch.manual_seed(3)
    return DigitsMLP()


def test_learns(samples: ImageSet) -> None:
    model = train(fresh(), samples, replace(RECIPE, epochs=20, batch_size=16, augment=False))
    assert evaluate(model, samples).accuracy > 95
    assert not model.training


def test_cut_off_training_resumes_to_the_same_weights(samples: ImageSet, tmp_path: Path) -> None:
    straight = train(fresh(), samples, RECIPE)

    class CutOffError(Exception):
        pass

    def cut(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise CutOffError

    path = tmp_path / "net.safetensors"
    with pytest.raises(CutOffError):
        train_to_file(fresh(), samples, RECIPE, path, report=cut)
    assert not path.exists() and path.with_suffix(".training").exists()
    seen: list[int] = []
    # The weights it begins with do not matter: they come from the state.
    train_to_file(DigitsMLP(), samples, RECIPE, path, report=lambda e: seen.append(e.number))
    assert seen == [3, 4]
    assert not path.with_suffix(".training").exists()
    stored, _ = read_tensors(path)
    for key, value in straight.state_dict().items():
        assert torch.equal(stored[key], value), key


def test_state_of_another_recipe_or_damaged_is_refused(samples: ImageSet, tmp_path: Path) -> None:
    state = tmp_path / "net.training"
    train(fresh(), samples, replace(RECIPE, epochs=1), state_path=state)
    with pytest.raises(CheckpointError, match=r"another recipe.*delete the file"):
        train(fresh(), samples, RECIPE, state_path=state)
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot resume"):
        train(fresh(), samples, replace(RECIPE, epochs=1), state_path=state)


def test_bfloat16_keeps_float32_weights(samples: ImageSet) -> None:
    model = train(fresh(), samples, replace(RECIPE, bfloat16=True))
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.parameters())
