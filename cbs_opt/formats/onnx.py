"""ONNX by ``torch.onnx.export(dynamo=True)``, run by onnxruntime and held against the network. Extra ``[onnx]``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.data.trees import map_tree
from cbs_opt.formats.record import Example
from solvers.errors import BackendError, ModelError, OptionError


def write_onnx(path: Path, model: nn.Module, example: Example, dynamic_batch: bool) -> Callable[..., list[Tensor]]:
    """Write a plain network; what runs the file with onnxruntime.

    Raises
    ------
    OptionError
        If onnx, onnxscript or onnxruntime are not installed.
    ModelError
        If torch cannot export the network.
    BackendError
        If onnxruntime does not take the file.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch imports it, later)
    except ImportError as error:
        raise OptionError(f"ONNX needs {error.name}; pip install 'cbs-opt[onnx]'") from error
    shapes: Any = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        dynamic: Callable[[Tensor], Any] = lambda t: {0: batch}  # noqa: E731
        # By name or by position, as the network is called.
        shapes = (
            {name: map_tree(dynamic, value) for name, value in example.kwargs.items()}
            if example.kwargs
            else tuple(map_tree(dynamic, value) for value in example.args)
        )
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                example.args,
                path,
                kwargs=example.kwargs or None,
                dynamo=True,
                verbose=False,
                dynamic_shapes=shapes,
                external_data=False,
            )
    except Exception as error:
        remedy = "; a batch of any size may be what it does not take: pass dynamic_batch=False" if dynamic_batch else ""
        first = " ".join(str(error).split())[:300]
        raise ModelError(
            f"torch cannot export {type(model).__name__} to ONNX ({type(error).__name__}: {first}){remedy}"
        ) from error
    finally:
        quiet.setLevel(level)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"onnxruntime does not take {path}: {error}") from error
    names = [given.name for given in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = Example(args, kwargs).tensors
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run
