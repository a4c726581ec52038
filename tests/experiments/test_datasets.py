"""Data sets: layout on disk, decoding, cache, damage, normalisation, augmentation."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from experiments.datasets import load_dataset
from experiments.datasets.cache import CacheWarning
from experiments.datasets.images import ImageSet, crop_and_flip
from experiments.datasets.load import load_digits
from experiments.datasets.parquet import SOURCES
from solvers.errors import DataError

COLUMN = {"mnist": "image", "cifar10": "img"}


def picture(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def pixels_of(name: str, count: int, seed: int) -> np.ndarray:
    shape = (count, 28, 28) if name == "mnist" else (count, 32, 32, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_split(
    folder: Path, name: str, split: str, pixels: np.ndarray, labels: list[int], shard: int = 0, shards: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture(p), "path": f"{i}.png"} for i, p in enumerate(pixels)]
    path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
    pq.write_table(pa.table({COLUMN[name]: cells, "label": labels}), path)
    return path


@pytest.fixture(params=["mnist", "cifar10"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, np.ndarray]:
    """A data set in the hub's layout: (name, folder above it, training pixels)."""
    name = request.param
    folder = tmp_path / "data" / name / {"mnist": "mnist", "cifar10": "plain_text"}[name]
    train = pixels_of(name, 7, 0)
    # Two shards: their order is that of their numbers.
    write_split(folder, name, "train", train[:4], [0, 1, 2, 3], 0, 2)
    write_split(folder, name, "train", train[4:], [4, 5, 6], 1, 2)
    write_split(folder, name, "test", pixels_of(name, 3, 1), [9, 8, 7])
    return name, tmp_path / "data", train


def test_reads_pixels_and_labels(made: tuple[str, Path, np.ndarray], own_cache: Path) -> None:
    name, folder, pixels = made
    for data_dir in (folder, folder / name):
        dataset = load_dataset(name, data_dir)
        expected = pixels[:, None] if name == "mnist" else pixels.transpose(0, 3, 1, 2)
        assert np.array_equal(dataset.train.images.numpy(), expected)
        assert dataset.train.labels.tolist() == list(range(7))
        assert dataset.test.labels.tolist() == [9, 8, 7]
        assert name in dataset.source


def test_one_split_is_cut_in_two_and_images_are_cropped(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "imagenet-sample" / "data"
    folder.mkdir(parents=True)
    wide = np.zeros((256, 300, 3), dtype=np.uint8)
    wide[16:240, 38:262] = 127
    rows = [{"bytes": picture(wide), "path": f"{i}.png"} for i in range(504)]
    table = pa.table({"image": rows, "label": list(range(504)), "wnid": ["n"] * 504})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    dataset = load_dataset("imagenet-sample", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (4, 500)
    assert sorted([*dataset.train.labels.tolist(), *dataset.test.labels.tolist()]) == list(range(504))
    images, _ = dataset.train.batch(slice(None))
    assert images.shape == (4, 3, 224, 224) and float(images.abs().max()) < 1e-6
    with pytest.raises(DataError, match="on no hub"):
        load_dataset("imagenet-sample")


def test_cache_is_used_and_noticed_when_stale_or_damaged(
    made: tuple[str, Path, np.ndarray], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder, _ = made
    first = load_dataset(name, folder)
    files = sorted((own_cache / "datasets").glob("*.npz"))
    assert len(files) == 2
    import experiments.datasets.load as module

    def refuse(*_: object) -> None:
        raise AssertionError("decoded although the cache was good")

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_files", refuse)
        assert torch.equal(load_dataset(name, folder).train.images, first.train.images)
        files[0].write_bytes(files[0].read_bytes()[:-200])
        with pytest.warns(CacheWarning, match="damaged"), pytest.raises(AssertionError):
            load_dataset(name, folder)
    with pytest.warns(CacheWarning, match="damaged"):
        again = load_dataset(name, folder)
    assert torch.equal(again.test.images, first.test.images)
    # The damaged file was replaced.
    load_dataset(name, folder)
    changed = next((folder / name).rglob("test-*.parquet"))
    write_split(changed.parent, name, "test", pixels_of(name, 3, 5), [1, 1, 1])
    os.utime(changed, (1, 1))
    assert load_dataset(name, folder).test.labels.tolist() == [1, 1, 1]


def test_flipped_byte_in_the_cache_is_noticed(made: tuple[str, Path, np.ndarray], own_cache: Path) -> None:
    name, folder, _ = made
    first = load_dataset(name, folder)
    path = next((own_cache / "datasets").glob(f"{name}-train-*.npz"))
    raw = bytearray(path.read_bytes())
    raw[300] ^= 255
    path.write_bytes(raw)
    with pytest.warns(CacheWarning):
        assert torch.equal(load_dataset(name, folder).train.images, first.train.images)


def test_unwritable_cache_only_warns(
    made: tuple[str, Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder, _ = made
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("CBS_OPT_CACHE", str(blocked))
    with pytest.warns(CacheWarning, match="CBS_OPT_CACHE"):
        assert len(load_dataset(name, folder).train) == 7


def test_damaged_parquet(made: tuple[str, Path, np.ndarray], own_cache: Path) -> None:
    name, folder, _ = made
    path = sorted((folder / name).rglob("train-*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"cannot read .*00000-of-00002.*hf download"):
        load_dataset(name, folder)


def test_missing_shard_folder_and_files(made: tuple[str, Path, np.ndarray], own_cache: Path, tmp_path: Path) -> None:
    name, folder, _ = made
    sorted((folder / name).rglob("train-*.parquet"))[0].unlink()
    with pytest.raises(DataError, match="1 of the 2 train files"):
        load_dataset(name, folder)
    with pytest.raises(DataError, match="not a folder"):
        load_dataset(name, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no train-\*.parquet"):
        load_dataset(name, tmp_path / "empty")


@pytest.mark.parametrize(
    ("cells", "labels", "message"),
    [
        ([{"bytes": b"no picture", "path": "a"}], [0], "row 0 .* not a readable image"),
        ([{"bytes": None, "path": "a"}], [0], "row 0 .* not a readable image"),
        ([{"bytes": picture(np.zeros((5, 5), np.uint8)), "path": "a"}], [0], "5x5 pixels, expected 28x28"),
        ([{"bytes": picture(np.zeros((28, 28), np.uint8)), "path": "a"}], [10], "from 10 to 10"),
        ([{"bytes": picture(np.zeros((28, 28), np.uint8)), "path": "a"}], [0.5], "not integers"),
    ],
)
def test_bad_rows(tmp_path: Path, own_cache: Path, cells: list[dict], labels: list, message: str) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", tmp_path)


def test_wrong_columns(tmp_path: Path, own_cache: Path) -> None:
    for split in ("train", "test"):
        pq.write_table(pa.table({"picture": [1], "label": [0]}), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no 'image'"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(DataError, match="unknown data set 'imagenet'"):
        load_dataset("imagenet", tmp_path)


def test_failed_download_says_what_would_help(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        load_dataset("mnist")
    message = str(caught.value)
    assert "no route" in message and "second line" not in message
    assert "--data-dir" in message and "hf download ylecun/mnist" in message


def test_download_is_decoded_like_files(
    made: tuple[str, Path, np.ndarray], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    name, folder, _ = made
    real = datasets.load_dataset

    def from_disk(repository: str, split: str, revision: str) -> object:
        # A commit, not a branch: what the hub serves under a name may change.
        assert repository == SOURCES[name].repository and re.fullmatch("[0-9a-f]{40}", revision)
        files = [str(f) for f in sorted((folder / name).rglob(f"{split}-*.parquet"))]
        loaded = real("parquet", data_files={split: files}, split=split, cache_dir=str(tmp_path / "hf"))
        return loaded.cast_column(COLUMN[name], datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    downloaded, local = load_dataset(name), load_dataset(name, folder)
    assert torch.equal(downloaded.train.images, local.train.images)
    assert torch.equal(downloaded.test.labels, local.test.labels)


def test_digits_are_split_once_and_normalised() -> None:
    dataset = load_digits()
    assert len(dataset.train) == 1437 and len(dataset.test) == 360
    x, _ = dataset.train.batch(slice(None))
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05
    assert torch.equal(dataset.train.images, load_digits().train.images)


def toy(count: int = 10) -> ImageSet:
    images = torch.arange(count * 2 * 3 * 3, dtype=torch.int64).remainder(256).to(torch.uint8).view(count, 2, 3, 3)
    return ImageSet(images, torch.arange(count), mean=(0.5, 0.25), std=(0.1, 0.2))


def test_normalisation_is_per_channel() -> None:
    x, y = toy().batch(torch.tensor([3]))
    raw = toy().images[3].double() / 255
    expected = torch.stack([(raw[0] - 0.5) / 0.1, (raw[1] - 0.25) / 0.2])
    torch.testing.assert_close(x[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert y.tolist() == [3]


def test_batches_cover_in_order() -> None:
    assert [y.tolist() for _, y in toy().batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_sample_is_without_replacement_and_seeded() -> None:
    drawn = toy().sample(6, 1).labels.tolist()
    assert len(set(drawn)) == 6 and drawn == toy().sample(6, 1).labels.tolist() != toy().sample(6, 2).labels.tolist()
    assert sorted(toy().sample(99, 0).labels.tolist()) == list(range(10))


def test_crop_and_flip_matches_a_loop() -> None:
    images = torch.randint(0, 256, (20, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    out = crop_and_flip(images, torch.Generator().manual_seed(1), padding=2)
    generator = torch.Generator().manual_seed(1)
    top = torch.randint(0, 5, (20, 1), generator=generator).flatten()
    left = torch.randint(0, 5, (20, 1), generator=generator).flatten()
    flip = torch.rand(20, 1, generator=generator).flatten() < 0.5
    assert flip.any() and not flip.all()
    for i in range(20):
        padded = torch.nn.functional.pad(images[i], (2, 2, 2, 2))
        window = padded[:, top[i] : top[i] + 6, left[i] : left[i] + 6]
        assert torch.equal(out[i], window.flip(2) if flip[i] else window)
