"""Evaluation and batch-norm statistics against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.datasets.images import ImageSet, crop_and_flip
from experiments.networks.batch_norm import fresh_statistics
from experiments.networks.evaluation import evaluate


@pytest.fixture
def samples() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (37, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 4, (37,), generator=generator), (0.4,) * 3, (0.2,) * 3)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))


@pytest.mark.parametrize("batch_size", [1, 10, 37, 100])
def test_accuracy_and_loss_do_not_depend_on_the_batch(samples: ImageSet, batch_size: int) -> None:
    model = network().eval()
    x, y = samples.batch(slice(None))
    with torch.no_grad():
        logits = model(x)
    result = evaluate(model, samples, batch_size=batch_size)
    assert result.accuracy == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)


def test_the_mode_is_put_back_and_statistics_are_not_touched(samples: ImageSet) -> None:
    model = network().train()
    before = model[1].running_mean.clone()
    evaluate(model, samples)
    assert model.training and torch.equal(model[1].running_mean, before)


def test_statistics_are_the_mean_over_batches_by_their_size(samples: ImageSet) -> None:
    model = network().eval()
    fresh_statistics(model, samples, seed=4, batch_size=10)
    generator = torch.Generator().manual_seed(4)
    means, variances = torch.zeros(5), torch.zeros(5)
    for indices in torch.randperm(37, generator=generator).split(10):
        with torch.no_grad():
            z = model[0](samples.normalise(crop_and_flip(samples.images[indices], generator)))
        means += z.mean((0, 2, 3)) * len(indices) / 37
        variances += z.var((0, 2, 3), unbiased=True) * len(indices) / 37
    torch.testing.assert_close(model[1].running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, variances, rtol=1e-4, atol=1e-5)
    assert not model.training and model[1].momentum == 0.1


def test_the_same_seed_gives_the_same_statistics(samples: ImageSet) -> None:
    one, two, three = network().eval(), network().eval(), network().eval()
    fresh_statistics(one, samples, seed=4)
    two(samples.batch(slice(None))[0])
    fresh_statistics(two, samples, seed=4)
    fresh_statistics(three, samples, seed=5)
    assert torch.equal(one[1].running_var, two[1].running_var)
    assert not torch.equal(one[1].running_var, three[1].running_var)
