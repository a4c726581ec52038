"""Row scales s of layer-wise curvature in units of the loss; see `cbs_opt.measure.layer_inputs`.

s_r = mean over samples of Σ_p (∂ℓ/∂y_pr)²
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.measure.layer_inputs import Batch, Streamed, watched
from cbs_opt.network.adapters import adapter_of
from cbs_opt.network.layers import Layer
from solvers.errors import ModelError


def row_scales(network: Streamed) -> dict[str, Tensor]:
    """s of every layer, float64 (R,), by its name: one backward pass over the loss.

    Raises
    ------
    ModelError
        For a loss that is no finite scalar that depends on the layers.
    DataError
    """
    layers = network.layers
    sums = {layer.name: torch.zeros(layer.n_rows, dtype=torch.float64, device=network.device) for layer in layers}
    weights = layers.parameters(network.model)
    asked = [weight.requires_grad for weight in weights]
    total = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for number, batch in enumerate(network.batches()):
            for name, squares in _squared_gradients(network, batch, number):
                # Of the mean over B samples each has a share of 1/B.
                sums[name] += squares * batch[2] ** 2
            total += batch[2]
    finally:
        for weight, flag in zip(weights, asked, strict=True):
            weight.requires_grad_(flag)
            weight.grad = None
    return {name: value / total for name, value in sums.items()}


def _squared_gradients(network: Streamed, batch: Batch, number: int) -> Iterator[tuple[str, Tensor]]:
    """(layer, Σ_p (∂L/∂y_pr)² (R,)) of every call of a layer, for the loss L of a batch."""
    seen: list[tuple[nn.Module, list[tuple[Layer, str]], Any, Any, Callable[[], Any]]] = []

    def see(module: nn.Module, uses: list[tuple[Layer, str]], args: Any, kwargs: Any, output: Any) -> None:
        seen.append((module, uses, args, kwargs, _gradient_of(output)))

    weights = network.layers.parameters(network.model)
    with watched(network, network.layers, see), torch.enable_grad():
        output = network.call(batch)
        with typed_failures(batch[0], batch[1]):
            loss = network.forward.loss(output, batch[0], batch[1])
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
            raise ModelError("loss_fn must return a scalar tensor that depends on the output, the mean over the batch")
        if not bool(torch.isfinite(loss)):
            raise ModelError(f"the loss of batch {number} is {float(loss)}; look for samples or targets out of range")
        loss.backward(inputs=[w for w in weights if w.requires_grad])  # type: ignore[no-untyped-call]
    for weight in weights:
        weight.grad = None
    for module, uses, args, kwargs, gradient in seen:
        adapter, found = adapter_of(module), gradient()
        if adapter is None or found is None:
            continue
        rows = adapter.output_gradient_rows(module, args, kwargs, found)
        for layer, attribute in uses:
            if attribute in rows:
                squares = [tensor.double().square().sum(1).reshape(-1) for tensor in rows[attribute]]
                yield layer.name, torch.cat(squares)


def _gradient_of(output: Any) -> Callable[[], Any]:
    """Tells, after the backward pass, the gradient of an output: a tree like it; None where there is none."""
    if isinstance(output, PackedSequence):
        output = output.data
    if isinstance(output, Tensor):
        found: list[Tensor] = []
        if output.requires_grad:
            # A hook sees the output as it is now, also if it is changed in place later on.
            output.register_hook(found.append)  # type: ignore[no-untyped-call]
        return lambda: found[0] if found else None
    if not isinstance(output, (tuple, list)):
        return lambda: None
    parts = [_gradient_of(part) for part in output]

    def collected() -> list[Any] | None:
        values = [part() for part in parts]
        return None if all(value is None for value in values) else values

    return collected
