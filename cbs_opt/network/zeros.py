"""Whether removed weights are still zero: after fine-tuning, after merging, after anybody else had the network."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from cbs_opt.network.mask_files import load_masks
from cbs_opt.network.masks import read_masks, stored_weight
from solvers.arguments import instance
from solvers.errors import CheckpointError, ModelError


@dataclass(frozen=True)
class LayerZeros:
    """The zeros of one layer.

    Attributes
    ----------
    name : str
    n, n_kept : int
        Weights, and those that the mask keeps.
    masked : bool
        Whether the network holds that very mask; without one an optimiser may bring weights back.
    n_revived : int
        Weights that the mask has removed and that the network now computes with.
    n_hidden : int
        Weights that are not zero where they are stored, behind a mask that hides them.
    n_not_finite : int
        Kept weights that are nan or infinite.
    """

    name: str
    n: int
    n_kept: int
    masked: bool
    n_revived: int
    n_hidden: int
    n_not_finite: int


@dataclass(frozen=True)
class ZeroCheck:
    """What `check` found, true where all zeros are still zero; ``print`` it.

    Attributes
    ----------
    layers : tuple of LayerZeros
    """

    layers: tuple[LayerZeros, ...]

    @property
    def ok(self) -> bool:
        """Whether no removed weight came back and every weight is finite."""
        return not any(row.n_revived or row.n_hidden or row.n_not_finite for row in self.layers)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def revived(self) -> dict[str, int]:
        """Removed weights that came back, by layer, where there are any."""
        return {row.name: row.n_revived for row in self.layers if row.n_revived}

    def __rich__(self) -> Table:
        revived, hidden = (sum(getattr(row, key) for row in self.layers) for key in ("n_revived", "n_hidden"))
        bad = sum(row.n_not_finite for row in self.layers)
        found = [f"{revived:,} came back"] if revived else []
        found += [f"{hidden:,} are stored behind a mask and not zero"] if hidden else []
        found += [f"{bad:,} kept weights are not finite"] if bad else []
        removed = sum(row.n - row.n_kept for row in self.layers)
        remedy = "; cbs_opt.apply_masks(model, masks) puts zeros and masks back" if revived or hidden else ""
        loose = sum(not row.masked for row in self.layers)
        table = Table(
            title=f"{removed:,} removed weights: {', '.join(found) or 'all still zero'}{remedy}",
            caption=f"{loose} layers hold no mask: training may bring their weights back" if loose else None,
        )
        for heading in ("layer", "weights", "kept", "mask", "came back", "hidden", "not finite"):
            table.add_column(heading, justify="left" if heading in ("layer", "mask") else "right")
        for row in self.layers:
            cells = (f"{v:,}" for v in (row.n_revived, row.n_hidden, row.n_not_finite))
            table.add_row(Text(row.name), f"{row.n:,}", f"{row.n_kept:,}", "held" if row.masked else "none", *cells)
        return table

    def __str__(self) -> str:
        file = io.StringIO()
        Console(file=file, width=120, color_system=None).print(self)
        return file.getvalue().rstrip()


@torch.no_grad()
def check(model: nn.Module, masks: Mapping[str, Tensor] | Path | str | None = None) -> ZeroCheck:
    """Whether removed weights are still zero.

    Parameters
    ----------
    model : nn.Module
        With masks, or without: after merging, from a checkpoint of somebody else.
    masks : mapping of str to bool tensor, or path, optional
        By layer name, True = kept, as `PruneResult.masks` are; a file of `save_masks`, or a folder of
        `PruneResult.save`. None takes those that the network holds.

    Returns
    -------
    ZeroCheck
        True where all is well.

    Raises
    ------
    ModelError
        If there is no mask, or one does not fit.
    CheckpointError
        If the path has no masks.
    """
    instance("model", model, nn.Module, error=ModelError)
    held = read_masks(model)
    if isinstance(masks, (str, Path)):
        path = Path(masks)
        wanted: Mapping[str, Tensor] = load_masks(path / "masks.safetensors" if path.is_dir() else path)
        if not wanted:
            raise CheckpointError(f"{path} holds no mask")
    else:
        wanted = held if masks is None else masks
    instance("masks", wanted, Mapping, error=ModelError)  # type: ignore[type-abstract]
    if not wanted:
        raise ModelError(
            f"{type(model).__name__} holds no mask; pass those it was pruned by, result.masks, or the folder of "
            "result.save"
        )
    rows = []
    for name, mask in wanted.items():
        weight, stored = stored_weight(model, name)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelError(f"the mask of {name!r} must be bool of shape {tuple(weight.shape)}, not {found}")
        removed = ~mask.to(weight.device)
        revived = removed & (weight != 0)
        own = held.get(name)
        rows.append(
            LayerZeros(
                name=name,
                n=mask.numel(),
                n_kept=int(mask.sum()),
                masked=own is not None and bool((own.to(mask.device) == mask).all()),
                n_revived=int(revived.sum()),
                n_hidden=int((removed & ~revived & (stored != 0)).sum()),
                n_not_finite=int((~removed & ~torch.isfinite(weight)).sum()),
            )
        )
    return ZeroCheck(tuple(rows))
