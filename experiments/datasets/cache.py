"""Where files which can be made again are kept: decoded images, trained checkpoints.

The cache is a convenience, never a requirement: a folder which cannot be written or a damaged file costs
time, not correctness, and is reported through ``warnings``.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import platformdirs

VARIABLE = "CBS_OPT_CACHE"


class CacheWarning(UserWarning):
    """The cache could not be read or written; the work was done without it."""


def cache_dir() -> Path:
    """Folder for cached files: ``$CBS_OPT_CACHE``, else ``cbs_opt`` in the user's cache folder. Not created."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("cbs_opt", appauthor=False))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between.

    Raises
    ------
    OSError
        The folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; a cache folder shared by a group should stay readable.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def try_write(path: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Like `write_atomically`, but an unwritable cache only warns. Returns whether the file was written."""
    try:
        write_atomically(path, write)
    except OSError as error:
        warnings.warn(
            f"cannot write the cache file {path} ({error}); going on without it. "
            f"Set {VARIABLE} to a folder which can be written.",
            CacheWarning,
            stacklevel=2,
        )
        return False
    return True
