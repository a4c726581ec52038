"""The ways of computing rows of gradients, with one signature: write scale · gradient of each row, return the losses.

See `cbs_opt.measure.gradients` for what they are and when which is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from cbs_opt.data.trees import Tree, row_of
from cbs_opt.measure.outer_products import outer_product_rows
from cbs_opt.measure.subject import Rows, Subject
from solvers.errors import UnknownNameError


class GradientMethod(str, Enum):
    """How rows of gradients are computed; see the module's docstring."""

    AUTO = "auto"
    OUTER = "outer"
    VMAP = "vmap"
    LOOP = "loop"

    def __str__(self) -> str:
        return self.value


def parse_method(method: GradientMethod | str) -> GradientMethod:
    """The method of that name; raises UnknownNameError."""
    try:
        return GradientMethod(method)
    except ValueError:
        raise UnknownNameError.of("gradient method", str(method), [m.value for m in GradientMethod]) from None


Engine = Callable[[Subject, Rows, Tensor, float], Tensor]


def vmap_rows(subject: Subject, samples: Rows, out: Tensor, scale: float) -> Tensor:
    """Rows by torch.func; arguments and result as in `outer_product_rows`."""
    model, layers, forward, (inputs, targets) = subject.model, subject.layers, subject.forward, samples
    weights = {layer.parameter: w.detach() for layer, w in zip(layers, layers.parameters(model), strict=True)}

    def loss(values: dict[str, Tensor], row: Tree, target: Tree | None) -> Tensor:
        output = forward.output(lambda *a, **k: functional_call(model, values, a, k), row, target)
        return forward.loss(output, row, target)

    dimensions = (None, 0, None if targets is None else 0)
    gradients, losses = vmap(grad_and_value(loss), in_dims=dimensions)(weights, inputs, targets)
    for layer in layers:
        torch.mul(layer.view.flatten(gradients[layer.parameter]), scale, out=out[:, layer.slice])
    return losses.detach()  # type: ignore[no-any-return]


def loop_rows(subject: Subject, samples: Rows, out: Tensor, scale: float) -> Tensor:
    """Rows by plain autograd, one at a time; arguments and result as in `outer_product_rows`."""
    model, layers, forward, (inputs, targets) = subject.model, subject.layers, subject.forward, samples
    weights = layers.parameters(model)
    losses = []
    for row in range(len(out)):
        x, y = row_of(inputs, row), row_of(targets, row)
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss = forward.loss(forward.output(model, x, y), x, y)
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        for layer, gradient in zip(layers, gradients, strict=True):
            target = out[row, layer.slice]
            if gradient is None:
                target.zero_()
            else:
                torch.mul(layer.view.flatten(gradient), scale, out=target)
        losses.append(loss.detach())
    return torch.stack(losses)


ENGINES: dict[GradientMethod, Engine] = {
    GradientMethod.OUTER: outer_product_rows,
    GradientMethod.VMAP: vmap_rows,
    GradientMethod.LOOP: loop_rows,
}
NAMES = {engine: method.value for method, engine in ENGINES.items()}
