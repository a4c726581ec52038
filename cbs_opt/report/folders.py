"""A pruned network in a folder, with nothing executable in it.

=====================  =======================================================================================
``cbs_opt.json``       format, versions, names, shapes, dtypes and ties of the tensors, digests of the other files
``model.safetensors``  all parameters and buffers, removed weights as zeros
``masks.safetensors``  packed bits (`cbs_opt.network.mask_files`)
``report.json``        the report; ``settings.json`` what was asked for; ``stages.json`` what each step did
``report.html``        all of that as a page
``config.json``        and ``generation_config.json``, of networks from transformers, for ``from_pretrained(folder)``
=====================  =======================================================================================

``cbs_opt.json`` is written last: a folder that has one is whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from cbs_opt.network.mask_files import load_masks, save_masks
from cbs_opt.network.state_files import PlainState, mismatch, read_tensors
from cbs_opt.report.page import page
from cbs_opt.report.records import StageRecord
from cbs_opt.report.report import PruneReport
from solvers.errors import CheckpointError, ModelError, OutputError
from solvers.files import holding, write_atomically

HEADER, WEIGHTS, MASKS = "cbs_opt.json", "model.safetensors", "masks.safetensors"
REPORT, PAGE = "report.json", "report.html"
SETTINGS, STAGES = "settings.json", "stages.json"
_FILES = (WEIGHTS, MASKS, REPORT, SETTINGS, STAGES)
_FORMAT, _VERSION = "cbs_opt pruned network", 1
_PACKAGES = ("cbs-opt", "torch", "numpy", "safetensors")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """What a folder says, but for the weights.

    Attributes
    ----------
    folder : Path
    header : dict
        Of ``cbs_opt.json``.
    masks : dict of str to bool tensor
    report : PruneReport
    settings : dict
    stages : tuple of StageRecord
    """

    folder: Path
    header: dict[str, Any]
    masks: dict[str, Tensor]
    report: PruneReport
    settings: dict[str, Any]
    stages: tuple[StageRecord, ...]

    def tensors_for(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights, which fit a network.

        Raises
        ------
        ModelError
            If they do not: the message names the first thing that differs.
        CheckpointError
        """
        if wrong := mismatch(self.header["network"], model):
            raise ModelError(f"{self.folder} does not fit this {type(model).__name__}: {wrong}")
        return read_tensors(self.folder / WEIGHTS)


def write(
    folder: Path | str,
    model: nn.Module,
    masks: Mapping[str, Tensor],
    report: PruneReport,
    settings: Mapping[str, Any],
    stages: Sequence[StageRecord],
) -> None:
    """Write a pruned network; raises ModelError for what no such folder can hold, and OutputError."""
    place, state = Path(folder), PlainState.of(model)
    try:
        with holding(place):
            (place / HEADER).unlink(missing_ok=True)
            state.save(place / WEIGHTS)
            save_masks(place / MASKS, masks)
            report.save(place / REPORT)
            _write_json(place / SETTINGS, settings)
            _write_json(place / STAGES, [record.as_json() for record in stages])
            write_atomically(place / PAGE, page(report, masks, settings, stages).encode())
            _save_config(place, model)
            header = {
                "format": _FORMAT,
                "version": _VERSION,
                "versions": {"python": platform.python_version(), **_versions()},
                "network": {"class": f"{_own_class(model)}", **state.describe()},
                "files": {name: digest_of(place / name) for name in _FILES},
            }
            _write_json(place / HEADER, header)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write the network to {folder}: {error}") from error


def read(folder: Path | str) -> SavedRun:
    """What is in a folder, every file held against its digest.

    Raises
    ------
    CheckpointError
        If there is no such folder, or a file is damaged or missing.
    """
    place = Path(folder)
    if not (place / HEADER).is_file():
        raise CheckpointError(f"{folder} is not a folder that PruneResult.save wrote: there is no {HEADER} in it")
    header = _read_json(place / HEADER)
    try:
        if header["format"] != _FORMAT or header["version"] != _VERSION:
            raise CheckpointError(
                f"{place / HEADER} is of version {header['version']!r}, and this package reads version {_VERSION}"
            )
        for name in _FILES:
            if digest_of(place / name) != header["files"][name]:
                raise CheckpointError(f"{place / name} is damaged or was changed: its digest is not that of {HEADER}")
        _ = header["network"]["tensors"], header["network"]["ties"]
        return SavedRun(
            folder=place,
            header=header,
            masks=load_masks(place / MASKS),
            report=PruneReport.load(place / REPORT),
            settings=_read_json(place / SETTINGS),
            stages=tuple(StageRecord.from_json(entry) for entry in _read_json(place / STAGES)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place / HEADER} is damaged: {type(error).__name__}: {error}") from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file; raises CheckpointError."""
    try:
        with open(path, "rb") as stream:
            found = hashlib.sha256()
            while piece := stream.read(1 << 22):
                found.update(piece)
            return found.hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _save_config(place: Path, model: nn.Module) -> None:
    """What transformers needs beside the weights; nothing for other networks."""
    config: Any = getattr(model, "config", None)
    if not (hasattr(config, "save_pretrained") and hasattr(model, "save_pretrained")):
        return
    own = copy.deepcopy(config)
    own.architectures = [_own_class(model).rpartition(".")[2]]
    own.save_pretrained(place)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(place)  # type: ignore[union-attr, operator]


def _own_class(model: nn.Module) -> str:
    """Of the network, not of what a parametrization makes of it."""
    kind = nn.utils.parametrize.type_before_parametrizations(model)
    return f"{kind.__module__}.{kind.__qualname__}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Used from its source tree.
            found[name] = "not installed"
    return found


def _write_json(path: Path, values: object) -> None:
    write_atomically(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
