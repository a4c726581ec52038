"""Sets in parquet files as the Hugging Face hub serves them: where they are, and the images of classification sets.

A row of images holds a struct ``{bytes, path}`` with an encoded image, and an integer label. The same table comes out
of a folder of files and out of the ``datasets`` library, so both go through `decode_table`.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solvers.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is known of a set on the hub.

    Attributes
    ----------
    name
        Our name, and that of its folder below ``--data-dir``.
    repository, revision
        Name on the hub, and the commit that is downloaded: what is published there later changes no figure.
    config
        Which of the repository's sets, where it has several.
    subfolders
        Where the hub keeps the parquet files below the data set's folder.
    """

    name: str
    repository: str
    revision: str
    config: str = ""
    subfolders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ImageSource(Source):
    """A set of labelled images.

    Attributes
    ----------
    image_column
        Column of the encoded images; the labels are in ``label``.
    shape
        Channels, height, width.
    crop
        Whether images are larger, and their centre is taken.
    held_out
        Rows of the training split that are the test set, drawn once and for all; 0 where there is a test split.
    """

    image_column: str
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    n_classes: int = 10
    crop: bool = False
    held_out: int = 0


SOURCES = {
    "mnist": ImageSource(
        name="mnist",
        repository="ylecun/mnist",
        revision="77f3279092a1c1579b2250db8eafed0ad422088c",
        subfolders=("mnist", "data"),
        image_column="image",
        shape=(1, 28, 28),
        mean=(0.1307,),
        std=(0.3081,),
    ),
    "cifar10": ImageSource(
        name="cifar10",
        repository="uoft-cs/cifar10",
        revision="0b2714987fa478483af9968de7c934580d0bb9a2",
        subfolders=("plain_text", "data"),
        image_column="img",
        shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    # One image of each class, the short side 256 pixels; as EfficientNet-Lite wants them, (value - 127) / 128.
    "imagenet-sample": ImageSource(
        name="imagenet-sample",
        repository="",
        revision="",
        subfolders=("data",),
        image_column="image",
        shape=(3, 224, 224),
        mean=(127.0 / 255.0,) * 3,
        std=(128.0 / 255.0,) * 3,
        n_classes=1000,
        crop=True,
        held_out=500,
    ),
}

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.parquet$")


def find_files(source: Source, data_dir: Path, split: str) -> list[Path]:
    """Parquet files of a split below ``data_dir``, which is the set's folder or the folder above it.

    Raises
    ------
    DataError
        The folder does not exist, holds no such files, or some of the split's shards are missing.
    """
    if not data_dir.is_dir():
        raise DataError(
            f"--data-dir {data_dir} is not a folder; give a folder which holds {source.name}/, "
            f"or leave the option out to download {source.repository}"
        )
    folders = [base / sub for base in (data_dir / source.name, data_dir) for sub in (*source.subfolders, ".")]
    for folder in folders:
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            continue
        last = _SHARD.search(files[-1].name)
        if last is not None and len(files) != int(last.group(2)):
            raise DataError(
                f"{folder} holds {len(files)} of the {int(last.group(2))} {split} files "
                f"of {source.repository}; copy the missing ones or {how_to_get(source)}"
            )
        return files
    raise DataError(
        f"no {split}-*.parquet of {source.repository} below {data_dir} (looked in "
        f"{source.name}/{source.subfolders[0]}/, {source.name}/ and the folder itself); "
        f"{how_to_get(source)}"
    )


def how_to_get(source: Source) -> str:
    """The remedy which ends every message about missing data."""
    if not source.repository:
        return f"this set is on no hub: pass --data-dir DIR with the parquet files in DIR/{source.name}/"
    return (
        f"run `hf download {source.repository} --repo-type dataset --revision {source.revision} "
        f"--local-dir DIR/{source.name}` on a machine with a network and pass --data-dir DIR"
    )


def read_table(source: Source, file: Path, columns: list[str]) -> Any:
    """Some columns of a file, as a ``pyarrow.Table``; raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file).read(columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {file}: {_first_line(error)}; the file is damaged or not parquet, "
            f"copy it again or {how_to_get(source)}"
        ) from error


def read_files(source: ImageSource, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``(N, C, H, W)`` and labels int64 ``(N,)`` of the files, in the order given.

    Raises
    ------
    DataError
        A file cannot be read, lacks a column, or holds something which is not an image of the right shape.
    """
    tables = ((read_table(source, file, [source.image_column, "label"]), str(file)) for file in files)
    parts = [decode_table(source, table, origin) for table, origin in tables]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def decode_table(source: ImageSource, table: Any, origin: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode an arrow table of encoded images.

    Parameters
    ----------
    table
        ``pyarrow.Table`` with the source's image column and ``label``.
    origin
        Where the table came from, for error messages.

    Raises
    ------
    DataError
        A column is missing, or a row is not an image of the right shape, or a label is out of range.
    """
    from PIL import Image, UnidentifiedImageError

    missing = [c for c in (source.image_column, "label") if c not in table.column_names]
    if missing:
        raise DataError(
            f"{origin} has columns {table.column_names} but no {missing[0]!r}; "
            f"expected the layout of {source.repository} on the hub"
        )
    channels, height, width = source.shape
    mode = "L" if channels == 1 else "RGB"
    images = np.empty((table.num_rows, height, width, channels), dtype=np.uint8)
    row = 0
    for chunk in table.column(source.image_column).chunks:
        for cell in chunk.field("bytes"):
            try:
                with Image.open(io.BytesIO(cell.as_py())) as picture:
                    pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
            except (UnidentifiedImageError, OSError, SyntaxError, TypeError, ValueError) as error:
                raise DataError(f"row {row} of {origin} is not a readable image: {_first_line(error)}") from error
            if source.crop:
                top, left = ((size - want) // 2 for size, want in zip(pixels.shape, (height, width), strict=False))
                pixels = pixels[max(top, 0) :, max(left, 0) :][:height, :width]
            if pixels.shape[:2] != (height, width):
                raise DataError(
                    f"row {row} of {origin} is an image of {pixels.shape[1]}x{pixels.shape[0]} pixels, "
                    f"expected {width}x{height}"
                )
            images[row] = pixels.reshape(height, width, channels)
            row += 1
    try:
        labels = np.asarray(table.column("label").to_numpy()).astype(np.int64, casting="safe")
    except TypeError as error:
        raise DataError(f"the labels of {origin} are not integers: {_first_line(error)}") from error
    if len(labels) == 0:
        raise DataError(f"{origin} holds no rows")
    if labels.min() < 0 or labels.max() >= source.n_classes:
        raise DataError(
            f"labels of {origin} run from {labels.min()} to {labels.max()}, expected 0 to {source.n_classes - 1}"
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
