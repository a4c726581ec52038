"""A pruned network with its masks and its report, in memory and in a folder."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cbs_opt.network.finding import find_layers
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.masks import apply_masks, remove_masks
from cbs_opt.network.state_files import write_into
from cbs_opt.network.zeros import check
from cbs_opt.report import folders
from cbs_opt.report.page import fragment
from cbs_opt.report.records import StageRecord
from cbs_opt.report.report import PruneReport
from solvers import Solution
from solvers.arguments import instance
from solvers.errors import ModelError


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned network.

    Attributes
    ----------
    model : nn.Module
        A copy of the network given, with new weights under masks (see `cbs_opt.network.masks`).
    masks : dict of str to bool tensor
        By layer name, in the shape of the weight; True = kept.
    report : PruneReport
    pruned : bool (n,)
        True = removed, in the order of the network.
    layers : PrunableLayers
    solution : Solution or None
        What the solver did, in the order of the blocks; None where it was called in several stages, and after loading.
    stages : tuple of StageRecord
        What each step of the plan did.
    settings : mapping
        What was asked for, defaults filled in, by the names of `cbs_opt.prune`'s arguments; ready for JSON.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: PruneReport
    pruned: npt.NDArray[np.bool_]
    layers: PrunableLayers
    solution: Solution | None
    stages: tuple[StageRecord, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def weights(self) -> npt.NDArray[np.float64]:
        """The prunable weights of `model` when first asked for, float64 (n,), zero where pruned."""
        return self.layers.read(self.model).numpy()

    def _repr_html_(self) -> str:
        return fragment(self.report, self.masks, self.settings, self.stages)

    def save(self, folder: Path | str) -> None:
        """Write network, masks, report and settings to a folder; `cbs_opt.load` reads it.

        All files are safetensors or JSON, see `cbs_opt.report.folders`. A network from transformers can be loaded from
        there by its ``from_pretrained`` as well. The weights are those that `model` has now.

        Parameters
        ----------
        folder : path
            Made if it is not there; files of these names are replaced.

        Raises
        ------
        ModelError
            If removed weights of `model` came back (`cbs_opt.check`), or it holds what is no tensor.
        OutputError
            If the folder cannot be written.
        """
        found = check(self.model, self.masks)
        if found.revived:
            name, number = next(iter(found.revived.items()))
            raise ModelError(
                f"{number} removed weights of layer {name!r} came back; put the masks back first: "
                "cbs_opt.apply_masks(result.model, result.masks)"
            )
        folders.write(folder, self.model, self.masks, self.report, self.settings, self.stages)


def load(folder: Path | str, model: nn.Module) -> PruneResult:
    """Put a pruned network that `PruneResult.save` wrote back, weights and masks.

    Parameters
    ----------
    folder : path
    model : nn.Module
        Of the same architecture, with any weights; changed in place, and only where everything fits. Masks that it
        already has are replaced.

    Returns
    -------
    PruneResult
        Its `model` is the one given.

    Raises
    ------
    CheckpointError
        If the folder is not one, or a file is damaged.
    ModelError
        If names, shapes, dtypes or ties do not fit the network; the message names the first that does not.
    """
    instance("model", model, nn.Module, error=ModelError)
    saved = folders.read(folder)
    tensors = saved.tensors_for(model)
    layers = find_layers(model, include=[glob.escape(row.name) for row in saved.report.layers])
    pruned = layers.pruned_by(saved.masks)
    remove_masks(model)
    write_into(model, tensors, saved.header["network"]["ties"])
    apply_masks(model, saved.masks)
    return PruneResult(model, saved.masks, saved.report, pruned, layers, None, saved.stages, saved.settings)
