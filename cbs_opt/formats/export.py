"""A pruned network in the format of somebody else, checked against the masked network; see `export`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cbs_opt.formats import onnx
from cbs_opt.formats.packed import load_packed, save_packed
from cbs_opt.formats.record import (
    Example,
    ExportReport,
    compared,
    output_of,
    plain_copy,
    size_of,
    size_on_disk,
    timed,
)
from cbs_opt.formats.semi_structured import to_semi_structured
from cbs_opt.network.state_files import PlainState
from solvers.arguments import instance, one_of
from solvers.errors import ModelError, OptionError, OutputError

FORMATS = ("dense", "packed", "onnx", "torch")
#: Largest difference of outputs, relative, by what computes them.
_TOLERANCE = {"onnx": 1e-3, "torch": 1e-5, "2:4": 5e-2}
_ZEROS = "zeros alone make nothing faster: they are computed with like other values"


def export(
    model: nn.Module,
    path: Path | str,
    format: str = "dense",
    *,
    example: object = None,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Write a pruned network to a file, and check it.

    Parameters
    ----------
    model : nn.Module
        Masked or not; not changed.
    path : path
        Of the file; its folder is made.
    format : {"dense", "packed", "onnx", "torch"}
        ``dense``: safetensors of the plain network's state dict, zeros and all. ``packed``: safetensors with a bit for
        each zero (`cbs_opt.load_packed`). ``onnx``: checked with onnxruntime, extra ``[onnx]``. ``torch``: a
        ``torch.export`` program (``.pt2``).
    example : tensor, tuple or dict, optional
        What the network is called with, a batch of two or more samples; ``onnx`` and ``torch`` take one.
    dynamic_batch : bool
        Whether the exported network takes batches of any size.

    Returns
    -------
    ExportReport
        What got smaller or faster, and what did not.

    Raises
    ------
    OptionError
        If an example is missing, or what a format needs is not installed.
    ModelError
        If the network cannot be exported.
    BackendError
        If what was exported does not compute what the network does.
    OutputError
        If the file cannot be written.
    """
    instance("model", model, nn.Module, error=ModelError)
    one_of("format", format, FORMATS)
    place = Path(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if format in ("dense", "packed"):
            return export_state(PlainState.of(model), place, format)
        if example is None:
            raise OptionError(f"format {format!r} takes example=, a batch that the network is called with")
        return _program(model, place, format, Example.of(example), dynamic_batch)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def semi_structured(model: nn.Module, example: object = None) -> tuple[nn.Module, ExportReport]:
    """A copy of a network whose 2:4 weights are multiplied by sparse tensor cores, on a device that has them.

    Parameters
    ----------
    model : nn.Module
        On the device, in float16 or bfloat16; masked or not; not changed. It stays in memory: save the masked one.
    example : tensor, tuple or dict, optional
        To check and time it on.

    Raises
    ------
    CapabilityError
        If the device has none.
    ModelError
        If no layer is 2:4.
    BackendError
        If outputs differ.
    """
    instance("model", model, nn.Module, error=ModelError)
    plain, sparse = plain_copy(model), plain_copy(model)
    size = size_of(plain)
    found, saved, left = to_semi_structured(sparse)
    notes = (f"{found} linear layers are multiplied by sparse tensor cores", *left)
    difference = before = after = math.nan
    if example is not None:
        given = Example.of(example)
        expected = output_of(plain, given)
        difference = compared("the 2:4 network", expected, output_of(sparse, given), _TOLERANCE["2:4"])
        before, after = timed(lambda: output_of(plain, given), lambda: output_of(sparse, given))
    return sparse, ExportReport("2:4", "", size, size - saved, difference, before, after, notes)


def export_state(state: PlainState, path: Path, format: str) -> ExportReport:
    """Write what a network holds as ``dense`` or ``packed``; the errors are those of `export`."""
    if format == "packed":
        packed = save_packed(path, state)
        read = load_packed(path)
        if any(not torch.equal(read[name], tensor.cpu()) for name, tensor in state.tensors.items()):
            raise ModelError(f"{path} does not give back the weights; they hold nan, or are written meanwhile")
        notes: tuple[str, ...] = (
            f"{len(packed)} tensors packed; read it by cbs_opt.load_packed, which makes them dense again",
            _ZEROS,
        )
    else:
        try:
            state.save(path)
        except SafetensorError as error:
            raise OutputError(f"cannot write {path}: {error}") from error
        notes = ("zeros are stored like other values; format 'packed' stores them as bits", _ZEROS)
        if state.ties:
            tied = ", ".join(f"{name} (as {first})" for name, first in state.ties.items())
            notes = (*notes, f"tied weights are stored once: {tied}")
    plain = sum(t.numel() * t.element_size() for t in state.tensors.values())
    return ExportReport(format, str(path), plain, size_on_disk(path), math.nan, math.nan, math.nan, notes)


def _program(model: nn.Module, path: Path, format: str, example: Example, dynamic_batch: bool) -> ExportReport:
    plain = plain_copy(model)
    expected = output_of(plain, example)
    if not example.tensors:
        raise OptionError("example holds no tensor; pass what the network is called with")
    n = min(len(tensor) if tensor.ndim else 0 for tensor in example.tensors)
    if dynamic_batch and n < 2:
        raise OptionError(
            f"for batches of any size the example must hold two samples or more along the first dimension, not {n}; "
            "or pass dynamic_batch=False"
        )
    if format == "onnx":
        call: Callable[..., Any] = onnx.write_onnx(path, plain, example, dynamic_batch)
        notes: tuple[str, ...] = (_ZEROS, "a change of speed comes from onnxruntime, not from the zeros")
    else:
        call = _torch_program(path, plain, example, dynamic_batch)
        notes = (_ZEROS, "the file holds the example too")
    difference = compared(f"the {format} file", expected, output_of(call, example), _TOLERANCE[format])
    if dynamic_batch:
        part = example.first(n - 1)
        other = compared(f"the {format} file", output_of(plain, part), output_of(call, part), _TOLERANCE[format])
        difference = max(difference, other)
    before, after = timed(lambda: output_of(plain, example), lambda: output_of(call, example))
    return ExportReport(format, str(path), size_of(plain), size_on_disk(path), difference, before, after, notes)


def _torch_program(path: Path, model: nn.Module, example: Example, dynamic_batch: bool) -> Callable[..., Any]:
    shapes: Any = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = [{0: batch} if isinstance(value, Tensor) else None for value in example.args]
        shapes += [{0: batch} if isinstance(value, Tensor) else None for value in example.kwargs.values()]
        shapes = dict(zip(example.kwargs, shapes, strict=True)) if example.kwargs else tuple(shapes)
    try:
        program = torch.export.export(model, example.args, example.kwargs, dynamic_shapes=shapes)
    except Exception as error:
        remedy = "; a batch of any size may be what it does not take: pass dynamic_batch=False" if dynamic_batch else ""
        first = " ".join(str(error).split())[:300]
        raise ModelError(
            f"torch.export cannot follow {type(model).__name__} ({type(error).__name__}: {first}){remedy}"
        ) from error
    # By streams: torch warns of names that end otherwise than in .pt2.
    with open(path, "wb") as stream:
        torch.export.save(program, stream)
    with open(path, "rb") as stream:
        return torch.export.load(stream).module()
