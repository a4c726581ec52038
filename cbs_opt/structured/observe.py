"""Which input channels of the layers carry no information, whatever the network is given.

A layer whose weights for an output are all zero gives a constant there, and what follows may scale, shift, clip, add or
concatenate it. Whether an input channel of a later layer is such a constant is seen by a call in which everything else
is noise: it is added to every other output of every convolution and linear layer, for each sample on its own, of both
signs and from soft to loud, as functions saturate. What then still is the same for all samples, the network's input
cannot reach.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.formats.record import Example, output_of
from cbs_opt.measure.layer_inputs import quiet

#: Layers that give channels and take them.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Noise of each call, relative to the largest output of a layer.
_LOUDNESS = (0.1, 0.3, 1.0, 10.0)
#: What counts as the same, relative to the largest entry of the channel.
_SAME = 1e-6


@dataclass(eq=False)
class Dead:
    """The dead inputs of one layer.

    Attributes
    ----------
    channels : bool (d,)
        True where the input is the same for all samples (of linear layers: at all positions).
    maps : (d, ...)
        What it is there; of a linear layer one number each.
    """

    channels: Tensor
    maps: Tensor


@dataclass(eq=False)
class Watch:
    """Collects the dead inputs of every layer in noisy calls.

    Attributes
    ----------
    found : dict of module to Dead
    """

    generator: torch.Generator
    loudness: float = 1.0
    found: dict[nn.Module, Dead] = field(default_factory=dict)

    def look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        x = args[0].detach()
        channels = -1 if isinstance(module, nn.Linear) else x.ndim - _spatial(module) - 1
        flat = x.movedim(channels, 0)
        # (d, samples, ...): a linear layer treats all leading dimensions as samples.
        flat = flat.reshape(len(flat), -1, 1) if isinstance(module, nn.Linear) else flat.flatten(2)
        first = flat[:, :1]
        spread = (flat - first).abs().amax((1, 2))
        same = spread <= _SAME * flat.abs().amax((1, 2)).clamp_min(1e-30)
        maps = first[:, 0] if not isinstance(module, nn.Linear) else first[:, 0, 0]
        if module in self.found:
            # Called more than once: only what is the same in every call.
            before = self.found[module]
            if before.maps.shape == maps.shape:
                gap = (before.maps - maps).reshape(len(maps), -1).abs().amax(1)
                same &= before.channels & (gap <= _SAME * maps.reshape(len(maps), -1).abs().amax(1))
            else:
                same = torch.zeros_like(same)
        self.found[module] = Dead(same, maps.clone())

    def disturb(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """A forward hook: noise where the output depends on anything."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        # An output of dead inputs is dead.
        groups, alive = int(getattr(module, "groups", 1)), ~self.found[module].channels
        used = (weight.detach() != 0).reshape(groups, len(weight) // groups, weight.shape[1], -1).any(-1)
        live = (used & alive.reshape(groups, 1, -1)).any(-1).reshape(-1).to(output.dtype)
        shape = (-1,) if isinstance(module, nn.Linear) else (-1, *(1,) * _spatial(module))
        scale = self.loudness * output.detach().abs().amax().clamp_min(1e-3)
        noise = torch.randn(output.shape, generator=self.generator, dtype=torch.float32).to(output)
        return output + noise * scale * live.reshape(shape)


def _spatial(module: nn.Module) -> int:
    kernel = module.kernel_size
    assert isinstance(kernel, tuple)
    return len(kernel)


def dead_inputs(model: nn.Module, example: Example) -> dict[nn.Module, Dead]:
    """What is dead at every convolution and linear layer that a plain network calls."""
    watch = Watch(torch.Generator().manual_seed(0))
    handles = []
    for module in model.modules():
        if isinstance(module, LAYERS):
            handles += [
                module.register_forward_pre_hook(watch.look),
                module.register_forward_hook(watch.disturb),
            ]
    try:
        with quiet(model):
            for watch.loudness in _LOUDNESS:
                output_of(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return watch.found
