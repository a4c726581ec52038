"""Download a data set, at the commit it is pinned to, with the ``datasets`` library."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.datasets.parquet import ImageSource, Source, decode_table, how_to_get
from solvers.errors import DataError


def download(source: ImageSource, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``(N, C, H, W)`` and labels int64 ``(N,)`` of a split, from the hub or its local cache.

    Raises
    ------
    DataError
        As `fetch`, and for images that are not what they should be.
    """
    return decode_table(source, fetch(source, split), source.repository)


def fetch(source: Source, split: str) -> Any:
    """The ``pyarrow.Table`` of a split, from the hub or its local cache.

    Raises
    ------
    DataError
        The library is missing, or the download failed for whatever reason; the message says what would help.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"downloading {source.repository} needs the `datasets` library ({error}); "
            f"`pip install datasets`, or {how_to_get(source)}"
        ) from error
    which = (source.config,) if source.config else ()
    try:
        with _quiet():
            loaded = datasets.load_dataset(source.repository, *which, split=split, revision=source.revision)
            if isinstance(source, ImageSource):
                # Bytes, not pictures: decoding is ours, the same for files on disk.
                loaded = loaded.cast_column(source.image_column, datasets.Image(decode=False))
            return loaded.data.table
    # The library raises whatever its many layers raise (requests, httpx, fsspec, pyarrow, its own).
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"no --data-dir given, and downloading {source.repository} failed: {reason}; {how_to_get(source)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub's retry messages away from our one-line errors."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
