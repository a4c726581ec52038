"""EfficientNet-Lite0 on ImageNet: EfficientNet-B0 without squeeze and excitation, with ReLU6, for small devices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt import FisherOptions, StageOptions
from experiments.networks.experiment import ImageExperiment, StageDefaults
from experiments.networks.training import Recipe

#: Kernel, first stride, expansion, channels, blocks of each stage.
_STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip


class SamePad(nn.Conv2d):
    """A convolution whose output has ⌈size / stride⌉ places, padded at the end where that is uneven."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve."""
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Expand, convolve each channel by itself, project; with a shortcut where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == out
        if expansion > 1:
            self._expand_conv, self._bn0 = SamePad(channels, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv = SamePad(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = SamePad(wide, out, 1, bias=False), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Takes images ``(N, 3, 224, 224)``, returns logits ``(N, 1000)``; 4.6 M prunable weights.

    References
    ----------
    Tan and Le, "EfficientNet", ICML 2019; Liu, "Higher accuracy on vision models with EfficientNet-Lite", 2020.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePad(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks = nn.ModuleList()
        channels = 32
        for kernel, stride, expansion, out, count in _STAGES:
            for number in range(count):
                self._blocks.append(Block(channels, out, kernel, stride if number == 0 else 1, expansion))
                channels = out
        self._conv_head, self._bn1 = SamePad(320, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(torch.mean(x, (2, 3)))
        return logits


EFFICIENTNET_LITE0 = ImageExperiment(
    name="efficientnet-lite0-imagenet",
    summary="EfficientNet-Lite0, 1,000 images of ImageNet, 4.6 M weights; meant for --curvature layer_inputs and kfac",
    model=EfficientNetLite0,
    dataset="imagenet-sample",
    checkpoint="efficientnet_lite0_imagenet.safetensors",
    sha256="0c677c314df2a69239bef9609a095a957201d5092462c5ace5d8bf3e0201bbd7",
    recipe=Recipe(epochs=350, batch_size=256, learning_rate=0.1, weight_decay=1e-5, augment=True),
    train_on_demand=False,
    sparsities=(0.3, 0.5, 0.6, 0.7),
    fisher=FisherOptions(n_rows=500, batch_size=1, damping=1e-5, blocks="per_layer"),
    staged=StageDefaults(FisherOptions(n_rows=50, batch_size=10, damping=1e-4), StageOptions()),
)
