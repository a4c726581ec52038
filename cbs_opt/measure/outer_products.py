"""Gradients per row from one forward and one backward pass over many rows at once.

For a Linear layer with input x and loss ℓ the gradient of one sample is the outer product Σ_t (∂ℓ/∂y_t) x_tᵀ over the
positions t, where y = W x + b; for a convolution the x_t are the patches that the filter sees. So one batched backward
pass down to the layers' *outputs*, followed per layer by a batched matrix product, or for a convolution by one
weight-gradient convolution in which every sample is a group, gives the gradients of all rows. Forming the patches, as
unfold does, was measured to be twice as slow on a CPU, ``torch.func.vmap`` of the whole loss three times.

It needs layers that are called as modules with the samples along the first dimension. Whether that holds is not
guessed: `cbs_opt.measure.gradients` compares the first rows with plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight

from cbs_opt.data.forward import Forward
from cbs_opt.data.trees import Tree, leaves, map_tree, row_of, split_rows
from cbs_opt.measure.subject import Rows, Subject
from cbs_opt.network.layers import PrunableLayers


class NotApplicableError(Exception):
    """Internal: this network's gradients cannot be taken this way."""


@dataclass
class _Calls:
    """(input, output) of every call of the layers during one forward pass, by position of the layer."""

    records: list[tuple[int, nn.Module, Tensor, int, Tensor]] = field(default_factory=list)


def outer_product_rows(subject: Subject, samples: Rows, out: Tensor, scale: float) -> Tensor:
    """Write scale · gradient of each row's loss into `out`.

    Parameters
    ----------
    subject : Subject
        Its parameters do not require gradients.
    samples : Rows
    out : (R, n) tensor, overwritten
    scale : float

    Returns
    -------
    Tensor
        The losses (R,).

    Raises
    ------
    NotApplicableError
        If a layer is called in a way this method cannot follow.
    """
    layers, forward, (inputs, targets) = subject.layers, subject.forward, samples
    rows, size = next(iter(_tensors(inputs))).shape[:2]
    flat = map_tree(lambda t: t.flatten(0, 1), inputs)
    flat_targets = None if targets is None else map_tree(lambda t: t.flatten(0, 1), targets)
    with _recording(subject.model, layers) as calls, torch.enable_grad():
        output = forward.output(subject.model, flat, flat_targets)
        losses = row_losses(forward, output, inputs, targets, rows, size)
        found = [record[4] for record in calls.records]
        if not found or not losses.requires_grad:
            raise NotApplicableError("no prunable layer is called as a module")
        gradients = torch.autograd.grad(losses.sum(), found, allow_unused=True)
    written: set[int] = set()
    for (position, module, x, version, _), gradient in zip(calls.records, gradients, strict=True):
        if gradient is None:
            continue
        if x._version != version:
            raise NotApplicableError(f"the input of layer {layers.layers[position].name!r} is modified in place")
        layer = layers.layers[position]
        target = out[:, layer.slice].view(len(out), layer.shape[0], -1)
        _accumulate(module, x, gradient, rows, size, target, scale, first=position not in written)
        written.add(position)
    for position, layer in enumerate(layers):
        if position not in written:
            out[:, layer.slice].zero_()
    return losses.detach()


def row_losses(forward: Forward, output: Any, inputs: Tree, targets: Tree | None, rows: int, size: int) -> Tensor:
    """The loss (R,) of each row from the network's output for all R·b samples."""
    _require_plain(output)
    for _, t in leaves(output):
        if t.ndim == 0 or t.shape[0] != rows * size:
            raise NotApplicableError(f"an output of shape {tuple(t.shape)} is not one entry per sample")
    parts = split_rows(output, rows, size)
    try:
        losses: Tensor = torch.func.vmap(forward.loss, in_dims=(0, 0, None if targets is None else 0))(
            parts, inputs, targets
        )
        return losses
    except (RuntimeError, ValueError, NotImplementedError):
        # A loss with data-dependent control flow cannot be vmapped; row by row is the same sum.
        return torch.stack([forward.loss(row_of(parts, r), row_of(inputs, r), row_of(targets, r)) for r in range(rows)])


def _require_plain(output: Any) -> None:
    """Outputs are taken apart and rebuilt for every row, which would lose what a class of their own carries."""
    if isinstance(output, Tensor):
        return
    if type(output) not in (tuple, list, dict):
        raise NotApplicableError(f"the network returns a {type(output).__name__}, not tensors, tuples, lists or dicts")
    for value in output.values() if isinstance(output, dict) else output:
        _require_plain(value)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for _, tensor in leaves(tree):
        yield tensor


@contextmanager
def _recording(model: nn.Module, layers: PrunableLayers) -> Iterator[_Calls]:
    """Record inputs and outputs of the layers; a weight's sharing modules all count towards it."""
    calls = _Calls()
    handles = []
    position_of: dict[nn.Module, int] = {}
    for position, layer in enumerate(layers):
        for place in layer.places:
            owner, _, attribute = place.rpartition(".")
            module = model.get_submodule(owner)
            if attribute != "weight" or not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                what = f"is the {layer.kind}'s" if place == layer.parameter else f"is also used as {place!r}"
                raise NotApplicableError(f"the weight of layer {layer.name!r} {what}")
            position_of[module] = position

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor:
        if len(arguments) != 1 or not isinstance(arguments[0], Tensor) or not isinstance(output, Tensor):
            raise NotApplicableError(f"a {type(module).__name__} is not called with one tensor")
        if not output.requires_grad:
            output.requires_grad_()
        x = arguments[0].detach()
        calls.records.append((position_of[module], module, x, x._version, output))
        # A clone, so that an in-place activation behind the layer leaves the recorded output alone.
        return output.clone()

    for module in position_of:
        handles.append(module.register_forward_hook(hook))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _accumulate(
    module: nn.Module, x: Tensor, gradient: Tensor, rows: int, size: int, target: Tensor, scale: float, *, first: bool
) -> None:
    """target (R, outputs, inputs) (+)= scale · Σ over samples and positions of gradient ⊗ input."""
    if x.ndim < 2 or x.shape[0] != rows * size:
        raise NotApplicableError(
            f"a {type(module).__name__} is called with shape {tuple(x.shape)}, not with {rows * size} samples first"
        )
    if isinstance(module, nn.Linear):
        left = gradient.reshape(rows, -1, gradient.shape[-1]).transpose(1, 2)
        right = x.reshape(rows, -1, x.shape[-1])
        product = torch.bmm(left, right)
    else:
        product = _convolution(module, x, gradient, rows, size)
    if first:
        torch.mul(product.reshape(target.shape), scale, out=target)
    else:
        target.add_(product.reshape(target.shape), alpha=scale)


def _convolution(module: nn.Module, x: Tensor, gradient: Tensor, rows: int, size: int) -> Tensor:
    """(R, outputs, inputs per group, *kernel) from input and output gradient of a convolution."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    padding = module.padding
    if x.ndim != len(module.kernel_size) + 2:
        raise NotApplicableError(f"a convolution is called with shape {tuple(x.shape)}, without samples")
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(module.kernel_size)
    weight_gradient: Callable[..., Tensor] = conv1d_weight if isinstance(module, nn.Conv1d) else conv2d_weight
    settings = (module.stride, padding, module.dilation)
    shape = module.weight.shape
    if size > 1:
        parts = [slice(start, start + size) for start in range(0, len(x), size)]
        return torch.stack([weight_gradient(x[p], shape, gradient[p], *settings, module.groups) for p in parts])
    # One convolution in which every sample is a group of its own.
    together = weight_gradient(
        x.flatten(0, 1).unsqueeze(0),
        (rows * shape[0], *shape[1:]),
        gradient.flatten(0, 1).unsqueeze(0),
        *settings,
        rows * module.groups,
    )
    return together.reshape(rows, *shape)
