"""The state of a training that is under way, in a folder: whatever a killed one needs to go on to the same bits.

``training.json`` (of which training, numbers, the digest of the other file) and ``training-000120.safetensors``. The
tensors are written first and the other file is then moved into its place, so that a training killed at any instant
leaves a whole state, its last one or the one before.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from solvers.errors import CheckpointError, OptionError, OutputError
from solvers.files import write_atomically

_NAME = "training.json"


class TrainingFile:
    """The state of one training in a folder.

    Parameters
    ----------
    folder : Path
        Of a journal, which says what is run.
    number : int
        Of the training in it; a state of another one is none.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self._number = folder, number

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, numbers) as they were last saved; raises CheckpointError."""
        path = self.folder / _NAME
        try:
            about = json.loads(path.read_text())
            if about["number"] != self._number:
                return None
            content = (self.folder / Path(about["file"]).name).read_bytes()
            if hashlib.sha256(content).hexdigest() != about["sha256"]:
                raise ValueError(f"{about['file']} is damaged")
            return load_tensors(content), dict(about["numbers"])
        except FileNotFoundError as error:
            if not path.exists():
                return None
            raise self._unreadable(error) from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(error) from error

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Keep a state instead of the last one; raises OutputError, and OptionError for what no file can hold."""
        content = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        name = f"training-{numbers['done']:06d}.safetensors"
        about = {"number": self._number, "file": name, "sha256": hashlib.sha256(content).hexdigest()}
        try:
            text = json.dumps({**about, "numbers": numbers}, indent=1)
        except TypeError as error:
            raise OptionError(
                f"the optimiser keeps what a journal cannot hold ({error}); use one whose state is tensors and numbers"
            ) from error
        try:
            write_atomically(self.folder / name, content)
            write_atomically(self.folder / _NAME, text.encode())
            self._remove(but=name)
        except OSError as error:
            raise OutputError(f"cannot write the training to {self.folder}: {error}") from error

    def remove(self) -> None:
        """Remove it, once the journal has what came of it."""
        (self.folder / _NAME).unlink(missing_ok=True)
        self._remove()

    def _remove(self, but: str = "") -> None:
        for path in self.folder.glob("training-*.safetensors"):
            if path.name != but:
                path.unlink(missing_ok=True)

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the training in {self.folder} cannot be read ({error}); remove the folder to start anew"
        )
