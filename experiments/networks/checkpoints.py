"""Read and write the weights of a network as safetensors, with a digest of the tensors in the header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from cbs_opt.data.trees import digest_of
from experiments.datasets.cache import write_file
from solvers.errors import CheckpointError

_DIGEST = "sha256"


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file, checked against its digest where it has one.

    Raises
    ------
    CheckpointError
        The file does not exist, cannot be read, is truncated, or its tensors are not those that were written.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; check the path, or leave --checkpoint out")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error}; the file is truncated or not safetensors, copy it again"
        ) from error
    if metadata.get(_DIGEST, _digest(tensors)) != _digest(tensors):
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its tensors do not have the digest in its header; copy it again, or "
            "delete it to have it made anew"
        )
    return tensors, metadata


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors with their digest, atomically; raises OSError."""
    own = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_file(Path(path), save(own, metadata={**metadata, _DIGEST: _digest(own)}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(sorted(tensors.items()))


def load_checkpoint(model: nn.Module, path: Path | str) -> bool:
    """Load a safetensors file into a model, in place; names and shapes must be the model's.

    Only the counts of batches that batch norms have seen may be missing.

    Returns
    -------
    bool
        Whether the file carries a digest, so that damage would have been noticed.

    Raises
    ------
    CheckpointError
        The file is unreadable or damaged, its names or shapes are not the model's, or it holds NaN or infinity.
    """
    tensors, metadata = read_tensors(path)
    own = model.state_dict()
    # How many batches a batch norm has seen: files made elsewhere leave it out, and in eval mode nothing reads it.
    tensors |= {key: own[key] for key in own.keys() - tensors.keys() if key.endswith("num_batches_tracked")}
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
    return _DIGEST in metadata


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
    write_tensors(path, model.state_dict(), {"note": note} if note else {})
