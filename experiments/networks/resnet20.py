"""ResNet20 on CIFAR-10, as in WoodFisher, CBS and CHITA: the 18 block convolutions are pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbs_opt import Distillation, FisherOptions, StageOptions
from experiments.networks.experiment import ImageExperiment, Phase, StageDefaults, StagedTable
from experiments.networks.training import Recipe


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (1x1 convolution where the shape changes)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features of half the resolution where the stride is 2."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet20(nn.Module):
    """Residual network for images ``(N, 3, 32, 32)``, returns logits ``(N, 10)``.

    References
    ----------
    He et al., "Deep Residual Learning", CVPR 2016, section 4.2, with a convolutional shortcut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, stride=1)
        self.layer2 = self._stage(16, 32, stride=2)
        self.layer3 = self._stage(32, 64, stride=2)
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(channels_in, channels_out, stride),
            BasicBlock(channels_out, channels_out, 1),
            BasicBlock(channels_out, channels_out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


#: Sparsities late on the path, and stages at each.
_LATE = (
    (0.675, 1), (0.7, 8), (0.73, 1), (0.76, 1), (0.78, 1), (0.8, 12), (0.82, 1), (0.84, 1),
    (0.86, 1), (0.88, 2), (0.9, 10),
)  # fmt: skip

RESNET20 = ImageExperiment(
    name="resnet20-cifar10",
    summary="ResNet20, CIFAR-10, 267,264 weights in 18 block convolutions",
    model=ResNet20,
    dataset="cifar10",
    checkpoint="resnet20_cifar10.safetensors",
    sha256="4470aaf8311342008bb3e8d6f7935ec133d716e16ffe11ef173c8e2e40b31404",
    recipe=Recipe(epochs=160, batch_size=128, learning_rate=0.1, weight_decay=5e-4, augment=True),
    train_on_demand=False,
    sparsities=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    fisher=FisherOptions(n_rows=1_000, batch_size=1, damping=1e-5, blocks="per_layer"),
    # Rows per layer, because a step spans the rows of each layer by itself. At equal images 125 rows of 64 went further
    # than 250 of 32 or 64 of 128, and the weight ½ of the dense network's outputs further than none or 0.9. From the
    # dense network to 60 % the choice was better without the gradient at every λ, and a third better at small λ.
    staged=StageDefaults(
        FisherOptions(n_rows=125, batch_size=64, damping=2e-4, blocks="per_layer", method="loop"),
        StageOptions(
            held_out=1000,
            max_evaluations=6,
            batch_norm_samples=5000,
            step_damping=5e-3,
            momentum=0.8,
            first_order=False,
            distillation=Distillation(weight=0.5, temperature=2.0),
        ),
    ),
    include=("layer*.conv*",),
    stale_batch_norm=True,
    table=StagedTable(
        phases=(
            Phase(((0.3, 2), (0.4, 3), (0.5, 4), (0.6, 4), (0.65, 1))),
            Phase(_LATE),
        ),
        reported=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        bfloat16=True,
    ),
)
