"""``results.jsonl``: one line of JSON per finished row, appended at once, never rewritten."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from solvers.errors import OutputError
from solvers.files import holding

FILE_NAME = "results.jsonl"


@dataclass(frozen=True)
class RowKeys:
    """Digests of the settings of a row, of the same without what comes after pruning, and of those that shares have."""

    row: str
    undistilled: str
    shares: str


def key_of(settings: Mapping[str, Any]) -> str:
    """Digest of the settings of a row."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def row_of(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row ready for JSON: settings, figures (None for what is not finite), versions and the settings' key.

    Figures of a row that failed are an ``error`` alone; that of the others is None.
    """
    plain = {name: _plain(value) for name, value in figures.items()}
    return {**settings, "error": None, **plain, "versions": versions(), "key": key_of(settings)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("cbs-opt", "torch", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class ResultsFile:
    """The results of an output folder, which belongs to this process as long as the object lives.

    Parameters
    ----------
    folder
        Made if need be, and tried out at once: a run of an hour must not end with "permission denied".

    Raises
    ------
    OutputError
        The folder cannot be made or written, another process writes it, or the file in it is not ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        self.path = self.folder / FILE_NAME
        self._check_writable()
        lock = ExitStack()
        lock.enter_context(holding(self.folder))
        weakref.finalize(self, lock.close)
        self.rows, self.dropped = self._read()

    def _check_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            if self.path.exists() and not os.access(self.path, os.R_OK | os.W_OK):
                raise PermissionError(13, "Permission denied", str(self.path))
            if self.path.is_dir():
                raise IsADirectoryError(21, "Is a directory", str(self.path))
        except OSError as error:
            raise OutputError(
                f"cannot write in --output-dir {self.folder} ({error.strerror or error}); "
                "give a folder which can be written"
            ) from error

    def _read(self) -> tuple[list[dict[str, Any]], bool]:
        """Rows on disk, and whether a last line cut off by a crash was dropped."""
        if not self.path.exists():
            return [], False
        raw = self.path.read_bytes()
        complete, newline, rest = raw.rpartition(b"\n")
        rows = []
        for number, line in enumerate((complete + newline).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise OutputError(
                    f"line {number} of {self.path} is not a row of results ({error}); "
                    "repair it, or give another --output-dir"
                ) from error
            rows.append(row)
        if rest:
            # A row is written with its newline, so what follows the last newline was cut off.
            with self.path.open("r+b") as stream:
                stream.truncate(len(complete) + len(newline))
        return rows, bool(rest)

    def find(self, key: str) -> dict[str, Any] | None:
        """The newest row of that key which did not fail."""
        good = (row for row in reversed(self.rows) if row.get("key") == key and row.get("error") is None)
        return next(good, None)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; when this returns it is on disk.

        Raises
        ------
        OutputError
            The disk is full, or the file has become unwritable.
        """
        line = json.dumps(row, allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as stream:
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(f"cannot append to {self.path} ({error.strerror or error})") from error
        self.rows.append(row)
