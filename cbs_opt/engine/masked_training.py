"""Training under masks: AdamW on what stays of a network, removed weights zero to the bit after every step.

    g ← mask(g), clipped to norm 1;      w ← mask(AdamW(w, g)),      step length η (1 − t/T) in step t = 0 … T − 1

Gradients are masked before they are clipped, so the optimiser's state is zero, and no norm is taken, where weights are
gone. 16-bit parameters follow a copy in single precision: steps of 1e-4 are lost in their rounding.

Source: Loshchilov and Hutter, *Decoupled weight decay regularization*, 2019 (AdamW; the decay is 0 here).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cbs_opt.network.layers import PrunableLayers
from solvers.arrays import Mask

#: What is trained: the prunable layers' weights, or with them all that is not frozen (biases, norms, embeddings).
PARAMETERS = ("layers", "all")
_LARGEST_NORM = 1.0


class TrainedWeights:
    """The parameters of a network that are trained, those of a mask zero throughout.

    Parameters
    ----------
    model : nn.Module
        Without masks; its weights are zero where pruned.
    layers : PrunableLayers
    pruned : bool (n,)
    parameters : {"layers", "all"}
    """

    def __init__(self, model: nn.Module, layers: PrunableLayers, pruned: Mask, parameters: str) -> None:
        held = dict(zip(map(id, layers.parameters(model)), layers, strict=True))
        self._all = list(model.parameters())
        asked = (p for p in self._all if id(p) in held or (parameters == "all" and p.requires_grad))
        self.tensors = [p for p in asked if p.is_floating_point()]
        self._masks: list[Tensor | None] = []
        for tensor in self.tensors:
            layer = held.get(id(tensor))
            gone = None if layer is None else layer.view.unflatten(torch.tensor(pruned[layer.slice]))
            self._masks.append(None if gone is None or not gone.any() else gone.to(tensor.device))
        short = {torch.float16, torch.bfloat16}
        self.masters = [
            tensor.detach().float() if tensor.dtype in short else tensor.detach() for tensor in self.tensors
        ]

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Take gradients with respect to these parameters and no others."""
        flags, chosen = [p.requires_grad for p in self._all], set(map(id, self.tensors))
        for parameter in self._all:
            parameter.requires_grad_(id(parameter) in chosen)
        try:
            yield
        finally:
            for parameter, flag in zip(self._all, flags, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = None

    @torch.no_grad()
    def take_gradients(self, weight: float) -> bool:
        """Move gradients, divided by a weight, to where the optimiser looks; whether they are finite."""
        for tensor, master, gone in zip(self.tensors, self.masters, self._masks, strict=True):
            found = torch.zeros_like(master) if tensor.grad is None else tensor.grad.to(master.dtype).div_(weight)
            master.grad, tensor.grad = found if gone is None else found.masked_fill_(gone, 0.0), None
        return bool(torch.isfinite(nn.utils.clip_grad_norm_(self.masters, _LARGEST_NORM)))

    @torch.no_grad()
    def hold(self) -> None:
        """After a step: zeros where weights are gone, and the network has what the optimiser left."""
        for tensor, master, gone in zip(self.tensors, self.masters, self._masks, strict=True):
            if gone is not None:
                master.masked_fill_(gone, 0.0)
            tensor.copy_(master)

    def kept(self) -> list[Tensor]:
        """A copy of the values as they are."""
        return [master.clone() for master in self.masters]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Put values back that `kept` has copied."""
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(value)
        self.hold()


class LinearAdamW:
    """AdamW whose step length falls linearly to zero.

    Parameters
    ----------
    weights : TrainedWeights
    lr : float
        Of the first step.
    steps : int
    """

    def __init__(self, weights: TrainedWeights, lr: float, steps: int) -> None:
        self._weights = weights
        self._optimiser = torch.optim.AdamW(weights.masters, lr=lr, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda done: max(1.0 - done / steps, 0.0))

    def step(self, weight: float) -> bool:
        """A step along the gradients that the network holds, divided by a weight; False, and none, for bad ones."""
        if not self._weights.take_gradients(weight):
            return False
        self._optimiser.step()
        self._schedule.step()
        self._weights.hold()
        return True
