"""Read and write the weights of a network as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from experiments.datasets.cache import write_file
from solvers.errors import CheckpointError


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name.

    Raises
    ------
    CheckpointError
        The file does not exist, cannot be read, or is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; check the path, or leave --checkpoint out")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error}; the file is truncated or not safetensors, copy it again"
        ) from error


def load_checkpoint(model: nn.Module, path: Path | str) -> None:
    """Load a safetensors file into a model, in place; names and shapes must be the model's.

    Raises
    ------
    CheckpointError
        The file is unreadable, its names or shapes are not the model's, or it holds NaN or infinity.
    """
    tensors = read_tensors(path)
    own = model.state_dict()
    name = type(model).__name__
    for names, fault in ((own.keys() - tensors.keys(), "lacks"), (tensors.keys() - own.keys(), "has an unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"the checkpoint {path} is not one of {name}: it {fault} {min(names)!r}{more}")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"the checkpoint {path} is not one of {name}: {key!r} has shape "
                f"{tuple(tensor.shape)}, expected {tuple(own[key].shape)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"the checkpoint {path} holds NaN or infinity in {key!r}")
    model.load_state_dict(tensors)


def save_checkpoint(model: nn.Module, path: Path | str, note: str = "") -> None:
    """Write a model's state dict as safetensors, atomically.

    Parameters
    ----------
    note
        Kept in the file's metadata under ``note``: how the weights were made.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    blob = save(tensors, metadata={"note": note} if note else None)
    write_file(Path(path), blob)
