"""Find, decode and cache a data set by name."""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from experiments.datasets.cache import CacheWarning, cache_dir, try_write
from experiments.datasets.digits import load_digits
from experiments.datasets.hub import download
from experiments.datasets.images import Dataset, ImageSet
from experiments.datasets.parquet import SOURCES, ImageSource, find_files, how_to_get, read_files
from solvers.errors import DataError

DATASETS = ("digits", *SOURCES)


def load_dataset(name: str, data_dir: Path | str | None = None) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    name
        ``digits``, ``mnist``, ``cifar10`` or ``imagenet-sample``.
    data_dir
        Folder with the set's parquet files, or the folder above it. None downloads with the ``datasets``
        library, which keeps its own cache. Digits are embedded and need neither.

    Raises
    ------
    DataError
        Unknown name; files missing, unreadable or damaged; download failed.
    """
    if name == "digits":
        return load_digits()
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    source = SOURCES[name]
    if data_dir is None and not source.repository:
        raise DataError(f"{name}: {how_to_get(source)}")
    if source.held_out and data_dir is not None:
        found = find_files(source, Path(data_dir).expanduser(), "train")
        whole = _image_set(source, *_cached(source, "train", found))
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(whole)))
        train, test = whole.subset(order[source.held_out :]), whole.subset(order[: source.held_out])
        return Dataset(name, train, test, source=str(found[0].parent))
    if data_dir is None:
        train, test = (_image_set(source, *download(source, split)) for split in ("train", "test"))
        return Dataset(name, train, test, source=f"downloaded from {source.repository}")
    data_dir = Path(data_dir).expanduser()
    # Both splits are looked for before either is decoded: a missing file should cost no time.
    files = {split: find_files(source, data_dir, split) for split in ("train", "test")}
    train, test = (_image_set(source, *_cached(source, split, files[split])) for split in ("train", "test"))
    return Dataset(name, train, test, source=str(files["train"][0].parent))


def _image_set(source: ImageSource, images: np.ndarray, labels: np.ndarray) -> ImageSet:
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), source.mean, source.std)


def _cached(source: ImageSource, split: str, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The decoded arrays of some files, from the cache if the files have not changed since."""
    stamp = hashlib.sha256()
    for file in files:
        status = file.stat()
        stamp.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    path = cache_dir() / "datasets" / f"{source.name}-{split}-{stamp.hexdigest()[:16]}.npz"
    try:
        # Members of an npz carry a CRC, so a damaged file is noticed.
        with np.load(path, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
        if images.dtype == np.uint8 and images.shape == (len(labels), *source.shape) and labels.dtype == np.int64:
            return images, labels
        raise ValueError(f"unexpected arrays {images.dtype} {images.shape}")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        what = "cannot be read" if isinstance(error, PermissionError) else "is damaged"
        warnings.warn(f"the cache file {path} {what} ({error}); decoding the images again", CacheWarning, stacklevel=2)
    images, labels = read_files(source, files)
    stream = io.BytesIO()
    np.savez(stream, images=images, labels=labels)
    try_write(path, stream.getvalue())
    return images, labels
