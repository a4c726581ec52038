"""Masks in a file: packed bits as safetensors, with names, shapes, counts and digests as JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from solvers.errors import CheckpointError, ModelError, OutputError
from solvers.files import replacing

_VERSION = "1"


def save_masks(path: Path | str, masks: Mapping[str, Tensor]) -> None:
    """Write masks to a file.

    Parameters
    ----------
    path : path
        Its folder is made if it is not there.
    masks : mapping of str to bool tensor
        By layer name, True = kept, as in `PruneResult.masks` or from `read_masks`.

    Raises
    ------
    ModelError
        If there is no mask, or one is not of bool.
    OutputError
        If the file cannot be written.
    """
    if not masks:
        raise ModelError("there are no masks to save")
    packed, about = {}, {}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ModelError(f"mask {name!r} must be a bool tensor, True = kept, not {getattr(mask, 'dtype', mask)}")
        bits = np.packbits(mask.detach().cpu().numpy().reshape(-1))
        packed[name] = torch.from_numpy(bits)
        digest = hashlib.sha256(bits.tobytes()).hexdigest()
        about[name] = {"shape": list(mask.shape), "kept": int(mask.sum()), "sha256": digest}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            save_file(packed, part, {"version": _VERSION, "masks": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the masks to {path}: {error}") from error


def load_masks(path: Path | str) -> dict[str, Tensor]:
    """Masks that `save_masks` wrote, by layer name, True = kept.

    Raises
    ------
    CheckpointError
        If there is no such file, or it is damaged or not one of masks.
    """
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("version") != _VERSION:
                raise CheckpointError(f"{path} is not a file of masks of version {_VERSION}")
            for name, about in json.loads(header["masks"]).items():
                bits, shape = file.get_tensor(name).numpy(), tuple(about["shape"])
                kept = np.unpackbits(bits, count=int(np.prod(shape))).astype(bool)
                if hashlib.sha256(bits.tobytes()).hexdigest() != about["sha256"] or kept.sum() != about["kept"]:
                    raise CheckpointError(f"mask {name!r} in {path} is damaged")
                found[name] = torch.from_numpy(kept).reshape(shape)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read masks from {path}: {error}") from error
    return found
