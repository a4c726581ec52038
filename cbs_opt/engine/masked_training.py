"""Training under masks: steps on what stays of a network, removed weights zero to the bit after every one.

    g ← mask(g), clipped to a norm;      w ← mask(step(w, g)),      the length as a function of the number of the step

Gradients are masked before they are clipped, so the optimiser's state is zero, and no norm is taken, where weights are
gone. 16-bit parameters follow a copy in single precision: steps of 1e-4 are lost in their rounding. Where gradients are
computed in halves, the loss is scaled up before, by a factor that is halved for gradients that overflow, whose step is
left out, and doubled after many that do not.

Sources: Loshchilov and Hutter, *Decoupled weight decay regularization*, 2019 (AdamW); Micikevicius et al., *Mixed
precision training*, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cbs_opt.network.layers import PrunableLayers
from solvers.arrays import Mask

#: What is trained: the prunable layers' weights, or with them all that is not frozen (biases, norms, embeddings).
PARAMETERS = ("layers", "all")
#: Norm that gradients are cut to, unless another is given.
LARGEST_NORM = 1.0
#: The first factor of a scaled loss, and steps after which it is doubled.
_SCALE, _GOOD_STEPS = 2.0**16, 2000


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
        self._all, self._buffers = list(model.parameters()), list(model.buffers())
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
    def take_gradients(self, weight: float, largest: float | None = LARGEST_NORM) -> bool:
        """Move gradients, divided by a weight and cut to a norm, to the optimiser; whether they are finite."""
        for tensor, master, gone in zip(self.tensors, self.masters, self._masks, strict=True):
            found = torch.zeros_like(master) if tensor.grad is None else tensor.grad.to(master.dtype).div_(weight)
            master.grad, tensor.grad = found if gone is None else found.masked_fill_(gone, 0.0), None
        return bool(torch.isfinite(nn.utils.clip_grad_norm_(self.masters, math.inf if largest is None else largest)))

    @torch.no_grad()
    def hold(self) -> None:
        """After a step: zeros where weights are gone, and the network has what the optimiser left."""
        for tensor, master, gone in zip(self.tensors, self.masters, self._masks, strict=True):
            if gone is not None:
                master.masked_fill_(gone, 0.0)
            tensor.copy_(master)

    def kept(self) -> list[Tensor]:
        """A copy of the values as they are, those of buffers too."""
        return [value.clone() for value in (*self.masters, *self._buffers)]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Put values back that `kept` has copied."""
        for held, value in zip((*self.masters, *self._buffers), values, strict=True):
            held.copy_(value)
        self.hold()


class MaskedOptimiser:
    """An optimiser of trained weights, its step length a function of the number of the step.

    Parameters
    ----------
    weights : TrainedWeights
    optimiser : Optimizer
        Of the weights' masters; the lengths it has are multiplied.
    rate : callable
        (steps done) → factor.
    largest_norm : float, optional
        That gradients are cut to.
    scaled : bool
        Whether gradients are those of a scaled loss.

    Attributes
    ----------
    scale : float
        What a loss is to be multiplied by before its gradient is taken.
    """

    def __init__(
        self,
        weights: TrainedWeights,
        optimiser: Optimizer,
        rate: Callable[[int], float],
        largest_norm: float | None = LARGEST_NORM,
        scaled: bool = False,
    ) -> None:
        self._weights, self.optimiser, self._rate, self._largest = weights, optimiser, rate, largest_norm
        self._lengths = [group["lr"] for group in optimiser.param_groups]
        self.scale, self._scaled, self._good, self._done = _SCALE if scaled else 1.0, scaled, 0, 0

    def step(self, weight: float) -> bool:
        """A step along the gradients that the network holds, divided by a weight; False, and none, for bad ones."""
        finite = self._weights.take_gradients(weight * self.scale, self._largest)
        if not finite and (not self._scaled or self.scale <= 1.0):
            return False
        if finite:
            factor = self._rate(self._done)
            for group, length in zip(self.optimiser.param_groups, self._lengths, strict=True):
                group["lr"] = length * factor
            self.optimiser.step()
            self._weights.hold()
        self._good = self._good + 1 if finite else 0
        if self._scaled and not finite:
            self.scale /= 2.0
        elif self._scaled and self._good % _GOOD_STEPS == 0:
            self.scale *= 2.0
        self._done += 1
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, numbers) of the state, from which `restore` goes on."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {"scale": self.scale, "good": self._good, "done": self._done}
        for index, entries in self.optimiser.state_dict()["state"].items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{index}/{name}"] = value
        return tensors, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Put a state back."""
        own = dict(numbers)
        self.scale, self._good, self._done = own.pop("scale"), own.pop("good"), own.pop("done")
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**own, **tensors}.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})


def linear_adamw(weights: TrainedWeights, lr: float, steps: int) -> MaskedOptimiser:
    """AdamW without decay, whose step length falls linearly to zero."""
    optimiser = torch.optim.AdamW(weights.masters, lr=lr, weight_decay=0.0)
    return MaskedOptimiser(weights, optimiser, lambda done: max(1.0 - done / steps, 0.0))
