"""The state of a network in one safetensors file: every tensor once, ties by name, masked weights as zeros."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cbs_opt.network.finding import check_tensors
from cbs_opt.network.identity import key_of, places_of
from solvers.errors import CheckpointError, ModelError
from solvers.files import replacing


@dataclass(frozen=True, eq=False)
class PlainState:
    """What a network holds, under the names of a network without masks.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Each piece of memory under its first name.
    ties : dict of str to str
        Every other name of it, and that first name.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> PlainState:
        """The state of a network, masked or not; raises ModelError for what no safetensors file holds."""
        check_tensors(model)
        keys = {name: key for key, places in places_of(model).items() for name in places}
        tensors: dict[str, Tensor] = {}
        ties: dict[str, str] = {}
        first: dict[Hashable, str] = {}
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"the state dict holds {name!r}, a {type(value).__name__} and no tensor; keep it outside the "
                    "network (its get_extra_state cannot be saved without pickle)"
                )
            key = keys.get(name, key_of(value))
            if key in first:
                ties[name] = first[key]
            else:
                first[key] = name
                tensors[name] = value.detach()
        return cls(tensors, ties)

    def describe(self) -> dict[str, Any]:
        """Names, shapes and dtypes, for JSON."""
        about = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in self.tensors.items()}
        return {"tensors": about, "ties": dict(self.ties)}

    def save(self, path: Path) -> None:
        """Write the tensors; raises OSError, SafetensorError."""
        # Parts of larger memory are cut out; what is whole is not copied.
        whole = {name: t.cpu().contiguous() for name, t in self.tensors.items()}
        with replacing(path) as part:
            save_file(whole, part, {"format": "pt"})


def mismatch(saved: Mapping[str, Any], model: nn.Module) -> str:
    """What keeps a saved state, as `PlainState.describe` says, from fitting a network; empty if nothing does."""
    here = PlainState.of(model).describe()
    stored: Mapping[str, list[Any]] = saved["tensors"]
    ties: Mapping[str, str] = saved["ties"]
    ours, others = {*here["tensors"], *here["ties"]}, {*stored, *ties}
    for name in sorted(others - ours):
        return f"the network has no {name!r}, which was saved ({_listed(others - ours)})"
    for name in sorted(ours - others):
        return f"the network's {name!r} was not saved ({_listed(ours - others)})"
    # Which of the names comes first depends on the order of the modules alone, so equal ties read equal.
    for name in sorted({*ties, *here["ties"]}):
        before, now = (f"tied to {side[name]!r}" if name in side else "untied" for side in (ties, here["ties"]))
        if before != now:
            return f"{name!r} was saved {before}, and the network's is {now}"
    for name, (dtype, *shape) in stored.items():
        found_dtype, *found = here["tensors"][name]
        if shape != found:
            return f"{name!r} was saved with shape {tuple(shape)}, and the network's has shape {tuple(found)}"
        if dtype != found_dtype:
            return (
                f"{name!r} was saved as {dtype}, and the network's is {found_dtype}; call "
                f"model.to(torch.{dtype}) before loading"
            )
    return ""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights from {path}: {error}") from error


@torch.no_grad()
def write_into(model: nn.Module, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    """Load a state that fits, see `mismatch`, into a network without masks, in place."""
    model.load_state_dict({**tensors, **{name: tensors[first] for name, first in ties.items()}})


def _listed(names: set[str]) -> str:
    few = ", ".join(sorted(names)[:3])
    return f"{len(names)} such: {few}{', …' if len(names) > 3 else ''}"
