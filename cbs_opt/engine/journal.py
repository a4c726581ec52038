"""The journal of a staged pruning: whatever a killed run needs to go on as if it had not been.

A folder with ``journal.json`` (what is being run, a record per finished stage) and ``stage-0007.safetensors`` (weights,
mask, damping, last step and batch-norm statistics after stage 7). A stage counts once ``journal.json`` names it. Both
files are written under another name and then moved, the state first, so a run killed at any instant leaves a whole
journal. Random numbers are no part of it: they are derived from the seed and the number of the stage.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cbs_opt.report.records import StageRecord
from solvers.errors import CheckpointError, OutputError
from solvers.files import write_atomically

_VERSION = 1
_NAME = "journal.json"
_STATISTICS = "statistics/"
#: What a stage may be kept in; never a path that leads elsewhere.
_FILE = re.compile(r"stage-\d{4,}\.safetensors")


@dataclass(frozen=True, eq=False)
class StageState:
    """A network between two stages.

    Attributes
    ----------
    number : int
        Stages done.
    weights : float64 (n,)
        Prunable weights, zero where removed.
    pruned : numpy bool (n,)
    damping : float
        λ of the last step, where the next search starts.
    statistics : dict
        Running statistics of batch norms by qualified name.
    step : float64 (n,), optional
        The last change of the weights, where the next stage may want it.
    """

    number: int
    weights: Tensor
    pruned: npt.NDArray[np.bool_]
    damping: float
    statistics: dict[str, Tensor] = field(default_factory=dict)
    step: Tensor | None = None

    @property
    def n_kept(self) -> int:
        """Weights that stay."""
        return int((~self.pruned).sum())


class Journal:
    """The journal of one run in a folder.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    run : dict of str
        What is being run; a journal of anything else is refused.

    Raises
    ------
    OutputError
        If the folder cannot be written, or holds the journal of another run.
    CheckpointError
        If the journal is damaged.
    """

    def __init__(self, folder: Path | str, run: dict[str, str]) -> None:
        self.folder = Path(folder)
        self._run = run
        self._stages: list[dict[str, Any]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the journal folder {self.folder}: {error}") from error
        path = self.folder / _NAME
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text())
            found, self._stages = dict(stored["run"]), list(stored["stages"])
            for entry in self._stages:
                if not _FILE.fullmatch(entry["file"]):
                    raise ValueError(f"it names {entry['file']!r}, which is no file of a stage in this folder")
                _ = entry["sha256"], StageRecord.from_json(entry["record"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"the journal {path} cannot be read ({error}); remove the folder to start anew"
            ) from error
        for key in dict.fromkeys((*run, *found)):
            if found.get(key) != run.get(key):
                raise OutputError(
                    f"the journal in {self.folder} belongs to another run: {key} is {found.get(key)!r} there and "
                    f"{run.get(key)!r} here; choose another folder or remove this one"
                )

    def begin(self) -> None:
        """Write down what is run, where no stage does; raises OutputError."""
        self._write(self._stages)

    def _write(self, stages: list[dict[str, Any]]) -> None:
        text = json.dumps({"version": _VERSION, "run": self._run, "stages": stages}, indent=1)
        try:
            write_atomically(self.folder / _NAME, text.encode())
        except OSError as error:
            raise OutputError(f"cannot write the journal in {self.folder}: {error}") from error

    @classmethod
    def open(cls, folder: Path | str) -> Journal:
        """The journal in a folder, whatever run it belongs to; raises OutputError if there is none."""
        path = Path(folder) / _NAME
        if not path.exists():
            raise OutputError(f"there is no journal in {folder}")
        try:
            run = dict(json.loads(path.read_text())["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the journal {path} cannot be read: {error}") from error
        return cls(folder, run)

    @property
    def records(self) -> tuple[StageRecord, ...]:
        """Of the stages done."""
        return tuple(StageRecord.from_json(entry["record"]) for entry in self._stages)

    def last(self) -> StageState | None:
        """The state after the last stage that was finished; None where there is none."""
        return self.state(len(self._stages) - 1) if self._stages else None

    def state(self, position: int) -> StageState:
        """The state after the stage at a position of `records`; raises CheckpointError."""
        entry = self._stages[position]
        path = self.folder / str(entry["file"])
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"the journal file {path} is damaged; remove the folder to start anew")
            tensors = load_tensors(content)
            statistics = {k[len(_STATISTICS) :]: v for k, v in tensors.items() if k.startswith(_STATISTICS)}
            return StageState(
                number=int(entry["record"]["stage"]),
                weights=tensors["weights"],
                pruned=tensors["pruned"].numpy(),
                damping=float(tensors["damping"]),
                statistics=statistics,
                step=tensors.get("step"),
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"the journal file {path} cannot be read ({error}); remove the folder to start anew"
            ) from error

    def append(self, state: StageState, record: StageRecord) -> None:
        """Write down a finished stage; raises OutputError."""
        tensors = {f"{_STATISTICS}{name}": value.contiguous() for name, value in state.statistics.items()}
        tensors["weights"] = state.weights.contiguous()
        tensors["pruned"] = torch.from_numpy(np.ascontiguousarray(state.pruned))
        tensors["damping"] = torch.tensor(state.damping, dtype=torch.float64)
        if state.step is not None:
            tensors["step"] = state.step.contiguous()
        content = save_tensors(tensors)
        name = f"stage-{state.number:04d}.safetensors"
        entry = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "record": record.as_json()}
        stages = [*self._stages, entry]
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            raise OutputError(f"cannot write the journal in {self.folder}: {error}") from error
        self._write(stages)
        self._stages = stages
