"""Files that are whole or not there, and folders that one process at a time writes.

A file is written under another name beside its own, flushed to the disk, and then moved: whatever happens in between,
a reader finds the old content or the new.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from solvers.errors import OutputError

#: Lock files that this process holds.
_HELD: set[Path] = set()


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once all went well; raises OSError as writing does."""
    final = Path(path)
    part = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        # Some writers make files that their owner alone can read, whatever the umask says.
        os.umask(mask := os.umask(0o022))
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, final)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path | str, content: bytes) -> None:
    """Write a whole file; raises OSError."""
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def holding(folder: Path | str) -> Iterator[None]:
    """Keep a folder, made if it is not there, to this process meanwhile; it may hold it already.

    The lock is the kernel's, so that it ends with the process however that ends.

    Raises
    ------
    OutputError
        If another process holds the folder; the message names it.
    """
    path = Path(folder).resolve() / ".lock"
    if path in _HELD:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        problem = error.strerror or error
        raise OutputError(f"cannot lock {folder} ({problem}); give a folder that can be written") from error
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.remove(path)
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path) -> int:
    """The open lock file; raises OSError, or OutputError where another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
            # The holder before may have removed the file between our opening it and locking it.
            if path.exists() and os.stat(path).st_ino == os.fstat(handle).st_ino:
                return handle
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise OutputError(
                f"{path.parent} is being written by another process ({holder}); wait for it, or give another folder"
            ) from None
        except OSError:
            os.close(handle)
            raise
        os.close(handle)
