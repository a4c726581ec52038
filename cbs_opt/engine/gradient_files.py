"""Gradients on disk, so that they are taken once, on whatever machine, and used many times.

A folder with ``gradients.safetensors`` (A, g, and the weights they were taken at; mapped into memory when read) and
``gradients.json`` (the setup, and the key: what would have to be equal for the same gradients to come out again). The
JSON file is written last, so a folder that has one is whole.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cbs_opt.data.calibration import CalibrationOptions
from cbs_opt.data.trees import digest_of, leaves
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import GradientSample
from solvers.errors import CheckpointError, OptionError, OutputError
from solvers.files import replacing, write_atomically

_VERSION = 1
_HEADER, _TENSORS = "gradients.json", "gradients.safetensors"
#: Fields of `FisherOptions` that other gradients come of.
MEASURED = ("n_rows", "batch_size", "seed", "dtype", "method", "row_sampling")


def save(
    folder: Path | str,
    workspace: Workspace,
    fisher: FisherOptions,
    sample: GradientSample,
    weights: npt.NDArray[np.float64],
) -> None:
    """Write gradients and what they are of; raises OutputError."""
    place, setup = Path(folder), workspace.setup
    about = {name: getattr(sample, name) for name in ("loss", "n_rows", "batch_size", "method", "seconds", "notes")}
    stored = {
        "fisher": asdict(fisher),
        "curvature": setup.curvature,
        "calibration": None if setup.calibration is None else asdict(setup.calibration),
        "include": setup.include,
        "exclude": setup.exclude,
        "seed": setup.seed,
        "loss_samples": setup.loss_samples,
    }
    header = {"version": _VERSION, "key": key_of(workspace, fisher), "sample": about, "setup": stored}
    tensors = {"factor": sample.factor, "mean": sample.mean, "weights": torch.from_numpy(weights)}
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / _HEADER).unlink(missing_ok=True)
        with replacing(place / _TENSORS) as part:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        write_atomically(place / _HEADER, json.dumps(header, indent=1).encode())
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the gradients to {place}: {error}") from error


class Kept:
    """Gradients in a folder; raises CheckpointError if there are none, or damaged ones."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self._header: dict[str, Any] = json.loads((self.folder / _HEADER).read_text())
            if self._header["version"] != _VERSION:
                raise CheckpointError(f"{self.folder} holds gradients of version {self._header['version']}")
            self.key: dict[str, str] = dict(self._header["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder} holds no gradients that can be read ({error})") from error

    def setup(self) -> Setup:
        """The setup they were taken under, on the device there is."""
        stored = dict(self._header["setup"])
        stored["fisher"] = FisherOptions(**stored["fisher"])
        if stored["calibration"] is not None:
            stored["calibration"] = CalibrationOptions(**stored["calibration"])
        return Setup(**stored)

    def load(self, workspace: Workspace) -> tuple[GradientSample, npt.NDArray[np.float64]]:
        """The gradients and the weights they were taken at, if they are those of a workspace.

        Raises
        ------
        OptionError
            If they are not; the message names what differs.
        CheckpointError
            If the file is damaged.
        """
        wanted = key_of(workspace, workspace.setup.options)
        different = [
            f"the {name} is {self.key.get(name)} there and {value} here"
            for name, value in wanted.items()
            if self.key.get(name) != value
        ]
        if different:
            raise OptionError(
                f"the gradients in {self.folder} are not those of this run: {'; '.join(different)}; take them anew in "
                "another folder"
            )
        try:
            with safe_open(self.folder / _TENSORS, framework="pt") as file:
                factor, mean, weights = (file.get_tensor(name) for name in ("factor", "mean", "weights"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the gradients in {self.folder} cannot be read: {error}") from error
        about, n = dict(self._header["sample"]), workspace.layers.n
        if factor.shape != (about["n_rows"], n) or mean.shape != (n,) or weights.shape != (n,):
            raise CheckpointError(f"the gradients in {self.folder} are damaged: A has shape {tuple(factor.shape)}")
        about["notes"] = tuple(about["notes"])
        place = workspace.setup.place
        return GradientSample(factor=factor.to(place), mean=mean.to(place), **about), weights.numpy()


def key_of(workspace: Workspace, fisher: FisherOptions) -> dict[str, str]:
    """What makes gradients those of a network, its data and a setup, by name."""
    data, layers = workspace.data, workspace.layers
    workspace.layers.write(workspace.model, workspace.weights)
    loss = workspace.forward.loss_fn
    return {
        "network": digest_of(workspace.model.state_dict().items()),
        "layers": ", ".join(f"{layer.name} {tuple(layer.shape)}" for layer in layers),
        "data": digest_of(leaves((data.inputs,) if data.targets is None else (data.inputs, data.targets))),
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
        "rows": f"{fisher.rows_for(data)} of {fisher.batch_size} samples",
        "seed": str(workspace.setup.seed if fisher.seed is None else fisher.seed),
        "dtype": fisher.dtype,
        "gradient method": fisher.method,
        "row sampling": fisher.row_sampling,
    }
