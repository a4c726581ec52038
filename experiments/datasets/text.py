"""WikiText-2 as one text per split, and token ids cut into windows.

The text is used as it is stored, its lines joined: no detokenising, no special tokens between articles. Networks are
calibrated on windows of the validation text that start anywhere, and judged by the first windows of the test text,
which lie one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.datasets.hub import fetch
from experiments.datasets.parquet import Source, find_files, how_to_get, read_table
from solvers.errors import DataError

WIKITEXT = Source(
    name="wikitext",
    repository="Salesforce/wikitext",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    config="wikitext-2-raw-v1",
    subfolders=("wikitext-2-raw-v1",),
)

#: Text → ids of its tokens.
Tokenizer = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Corpus:
    """Lines of validation and test text, and in words where they came from."""

    validation: tuple[str, ...]
    test: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Windows:
    """How text is cut: lengths in tokens of calibration and of test windows, and how many of the latter there are."""

    calibration: int = 512
    test: int = 1_024
    n_test: int = 16


@dataclass(frozen=True, eq=False)
class TokenText:
    """A text as a data set of windows of tokens.

    Attributes
    ----------
    name, source
        What it is called, and in words where it came from.
    train
        int64 ``(N,)``: the calibration text.
    test
        int64 ``(windows, length)``.
    length
        Tokens of a calibration window.
    """

    name: str
    train: Tensor
    test: Tensor
    source: str
    length: int

    @classmethod
    def of(cls, corpus: Corpus, tokens: Tokenizer, windows: Windows = Windows()) -> TokenText:
        """The text of a corpus; raises DataError where it is too short."""
        train, test = (torch.tensor(tokens("".join(lines))) for lines in (corpus.validation, corpus.test))
        for text, ids, needed in (
            ("validation", train, windows.calibration + 1),
            ("test", test, windows.n_test * windows.test),
        ):
            if len(ids) < needed:
                raise DataError(f"the {text} text of {corpus.source} has {len(ids)} tokens; at least {needed} are used")
        test = test[: windows.n_test * windows.test].view(windows.n_test, windows.test)
        return cls(WIKITEXT.name, train, test, corpus.source, windows.calibration)

    def calibration(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        """Windows that start at random tokens of the calibration text, drawn with the seed: batches of one."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - self.length, (count,), generator=generator)
        return [{"input_ids": self.train[start : start + self.length][None]} for start in starts.tolist()]


def load_wikitext(data_dir: Path | str | None = None) -> Corpus:
    """Validation and test text of WikiText-2, from a folder or the hub.

    Parameters
    ----------
    data_dir
        Folder with the parquet files, in it or in its folder ``wikitext``; None downloads.

    Raises
    ------
    DataError
        Files are missing, damaged or without text; download failed.
    """
    if data_dir is None:
        validation, test = (_lines(fetch(WIKITEXT, split), WIKITEXT.repository) for split in ("validation", "test"))
        return Corpus(validation, test, f"downloaded from {WIKITEXT.repository}")
    # Both splits are looked for before either is read: a missing file should cost no time.
    files = {split: find_files(WIKITEXT, Path(data_dir).expanduser(), split) for split in ("validation", "test")}
    validation, test = (
        tuple(line for file in files[split] for line in _lines(read_table(WIKITEXT, file, ["text"]), str(file)))
        for split in ("validation", "test")
    )
    return Corpus(validation, test, str(files["test"][0].parent))


def _lines(table: object, origin: str) -> tuple[str, ...]:
    if "text" not in table.column_names:  # type: ignore[attr-defined]
        raise DataError(f"{origin} has no column 'text'; copy it again or {how_to_get(WIKITEXT)}")
    return tuple(line or "" for line in table.column("text").to_pylist())  # type: ignore[attr-defined]
