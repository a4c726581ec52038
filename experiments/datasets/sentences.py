"""Sentences of WikiText-2: those of the validation text to calibrate on, some of the test text to be judged by.

Lines of text (not headings) are cut behind each full stop that stands alone, as the corpus has it; what has fewer than
`FEWEST_WORDS` words is left out. Those of the test text are taken at even distances, so that they are of many articles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from experiments.datasets.text import WIKITEXT, Corpus
from solvers.errors import DataError

FEWEST_WORDS = 6

#: Sentences → batches (inputs, targets).
Encoder = Callable[[Sequence[str]], list[Any]]


@dataclass(frozen=True, eq=False)
class SentenceSet:
    """Sentences as a data set.

    Attributes
    ----------
    name, source
        What it is called, and in words where it came from.
    train, held_out
        Sentences to calibrate on, and to be judged by.
    encoder
        Makes batches of them.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    source: str
    encoder: Encoder

    @classmethod
    def of(cls, corpus: Corpus, encoder: Encoder, n_test: int) -> SentenceSet:
        """Those of a corpus; raises DataError where there are too few."""
        train, test = sentences(corpus.validation), sentences(corpus.test)
        for text, found, needed in (("validation", train, 1), ("test", test, n_test)):
            if len(found) < needed:
                raise DataError(f"the {text} text of {corpus.source} has {len(found)} sentences; {needed} are used")
        held_out = tuple(test[number * len(test) // n_test] for number in range(n_test))
        return cls(WIKITEXT.name, train, held_out, corpus.source, encoder)

    @cached_property
    def test(self) -> list[Any]:
        """Batches to be judged by."""
        return self.encoder(self.held_out)

    def calibration(self, count: int, seed: int) -> list[Any]:
        """Batches of sentences that are drawn with the seed, none twice; raises DataError where there are fewer."""
        if count > len(self.train):
            raise DataError(
                f"the calibration text has {len(self.train)} sentences, {count} are asked for; ask for fewer"
            )
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.encoder([self.train[number] for number in order[:count].tolist()])


def sentences(lines: Sequence[str]) -> tuple[str, ...]:
    """Sentences of a text that is cut into words, in order, each once."""
    found: dict[str, None] = {}
    for line in lines:
        text = line.strip()
        if text.startswith("= "):
            continue
        for part in text.split(" . "):
            words = part.removesuffix(" .").split()
            if len(words) >= FEWEST_WORDS:
                found[" ".join(words) + "."] = None
    return tuple(found)
