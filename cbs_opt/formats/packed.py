"""Zeros in a bit each: safetensors in which a sparse tensor is a bit mask and the values that are not zero.

A tensor ``fc1.weight`` of shape (R, d) with k values that are not zero becomes

    ``fc1.weight:bits``     uint8 (⌈R·d / 8⌉,)   1 = not zero, row-major, high bits of a byte first (`numpy.packbits`)
    ``fc1.weight:values``   its dtype (k,)       in the same order

where that takes fewer bytes: b·k + n/8 instead of b·n, for b bytes a value. All others are there as they are. The
file's metadata hold ``format``, ``version``, in ``tensors`` the shapes of the packed ones, in ``ties`` other names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cbs_opt.network.state_files import PlainState
from solvers.errors import CheckpointError, OutputError
from solvers.files import replacing

_FORMAT, _VERSION = "cbs_opt packed", "1"
_BITS, _VALUES = ":bits", ":values"


def save_packed(path: Path | str, state: PlainState) -> tuple[str, ...]:
    """Write the state of a network; names of the tensors that were packed. Raises OutputError."""
    found: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.tensors.items():
        flat = tensor.cpu().contiguous().reshape(-1)
        kept = flat != 0
        k, n = int(kept.sum()), flat.numel()
        if tensor.is_floating_point() and k * flat.element_size() + -(-n // 8) < n * flat.element_size():
            found[name + _BITS] = torch.from_numpy(np.packbits(kept.numpy()))
            found[name + _VALUES] = flat[kept]
            shapes[name] = list(tensor.shape)
        else:
            found[name] = tensor.cpu().contiguous()
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "tensors": json.dumps(shapes),
        "ties": json.dumps(state.ties),
    }
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(found, part, about)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    return tuple(shapes)


def load_packed(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a packed file, for ``load_state_dict`` of the plain network; names that are tied share tensors.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or of another format.
    """
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT or about.get("version") != _VERSION:
                raise CheckpointError(f"{path} is not a packed network of version {_VERSION}; see cbs_opt.export")
            shapes = json.loads(about["tensors"])
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if not name.endswith((_BITS, _VALUES)):
                    state[name] = file.get_tensor(name)
            for name, shape in shapes.items():
                values, bits = file.get_tensor(name + _VALUES), file.get_tensor(name + _BITS)
                flat = torch.zeros(int(np.prod(shape)), dtype=values.dtype)
                kept = torch.from_numpy(np.unpackbits(bits.numpy(), count=flat.numel()).astype(bool))
                if int(kept.sum()) != len(values):
                    raise CheckpointError(
                        f"{name!r} in {path} is damaged: {int(kept.sum())} bits, {len(values)} values"
                    )
                flat[kept] = values
                state[name] = flat.reshape(shape)
            for name, first in json.loads(about["ties"]).items():
                state[name] = state[first]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read the packed network {path}: {error}") from error
    return state
