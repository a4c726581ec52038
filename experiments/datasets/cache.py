"""Where files which can be made again are kept: decoded images, trained checkpoints.

The cache is a convenience, never a requirement: a folder which cannot be written or a damaged file costs
time, not correctness, and is reported through ``warnings``.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import platformdirs

from solvers.files import write_atomically

VARIABLE = "CBS_OPT_CACHE"


class CacheWarning(UserWarning):
    """The cache could not be read or written; the work was done without it."""


def cache_dir() -> Path:
    """Folder for cached files: ``$CBS_OPT_CACHE``, else ``cbs_opt`` in the user's cache folder. Not created."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("cbs_opt", appauthor=False))


def write_file(path: Path, content: bytes) -> None:
    """Write a file, and the folders above it, so that a reader or a crash sees the old one or the new one, whole.

    Raises
    ------
    OSError
        The folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def try_write(path: Path, content: bytes) -> None:
    """`write_file`, but an unwritable cache only warns."""
    try:
        write_file(path, content)
    except OSError as error:
        warnings.warn(
            f"cannot write the cache file {path} ({error}); going on without it. "
            f"Set {VARIABLE} to a folder which can be written.",
            CacheWarning,
            stacklevel=2,
        )
