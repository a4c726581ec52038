"""The networks: number of weights, shapes, names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.networks import CIFARNet, DigitsMLP, MLPNet, ResNet20


def prunable(model: nn.Module, keep: str = "") -> int:
    return sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and name.startswith(keep)
    )


@pytest.mark.parametrize(
    ("model", "shape", "n"),
    [
        (MLPNet, (1, 28, 28), 32_360),
        (DigitsMLP, (1, 8, 8), 2_720),
        (CIFARNet, (3, 32, 32), 116_704),
    ],
)
def test_weights_and_logits(model: type[nn.Module], shape: tuple[int, ...], n: int) -> None:
    network = model()
    assert prunable(network) == n
    assert network(torch.zeros(2, *shape)).shape == (2, 10)


def test_resnet_blocks_hold_the_published_number_of_weights() -> None:
    network = ResNet20().eval()
    shortcuts = 16 * 32 + 32 * 64
    assert prunable(network, "layer") - shortcuts == 267_264
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    names = set(network.state_dict())
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean", "fc.bias"} <= names
    assert "layer1.0.downsample.0.weight" not in names


def test_mlpnet_has_no_biases() -> None:
    assert set(MLPNet().state_dict()) == {"fc1.weight", "fc2.weight", "fc3.weight"}
