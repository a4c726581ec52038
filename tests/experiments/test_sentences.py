"""Encoders of sentences: the sentences, the agreement with the dense network, and the way through the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.cli.shell import run_app
from experiments.commands import run
from experiments.datasets.sentences import SentenceSet, sentences
from experiments.datasets.text import Corpus
from experiments.networks import EXPERIMENTS
from experiments.networks.load import Source, open_network
from experiments.networks.minilm import MINILM, agreement, distance_from_dense, embeddings
from solvers.errors import DataError
from tests.experiments.test_language import write_text

WORDS = 60
TINY = replace(MINILM, n_test=24, sparsities=(0.5,), fisher=replace(MINILM.fisher, n_rows=40), least_samples=40)


def test_sentences_end_at_full_stops_and_headings_are_none() -> None:
    lines = [
        " = A heading that is long enough to count = \n",
        "",
        " It was big , with a length of 6 @.@ 5 m . It is closely related to others . Too short . \n",
        " A line without a full stop at its end\n",
        " It is closely related to others . \n",
    ]
    assert sentences(lines) == (
        "It was big , with a length of 6 @.@ 5 m.",
        "It is closely related to others.",
        "A line without a full stop at its end.",
    )


def test_held_out_sentences_lie_at_even_distances_and_calibration_is_drawn() -> None:
    def line(kind: str, number: int) -> str:
        return f" {kind} sentence of six words {number} . \n"

    lines = {kind: tuple(line(kind, number) for number in range(40)) for kind in ("a", "b")}
    found = SentenceSet.of(Corpus(lines["a"], lines["b"], "made up"), lambda part: [list(part)], 10)
    assert found.held_out == tuple(line("b", number).strip().removesuffix(" .") + "." for number in range(0, 40, 4))
    assert found.test == [list(found.held_out)]
    (one,), (again,), (other,) = (found.calibration(15, seed) for seed in (0, 0, 1))
    assert one == again != other and len(set(one)) == 15 and set(one) <= set(found.train)
    with pytest.raises(DataError, match="40 sentences, 41 are asked for"):
        found.calibration(41, 0)
    with pytest.raises(DataError, match="the test text of made up has 40 sentences; 41 are used"):
        SentenceSet.of(Corpus(lines["a"], lines["b"], "made up"), list, 41)


class Looked(nn.Module):
    """Hidden states by token, from a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def test_agreement_is_that_of_the_ranks_of_similarities() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, changed = (torch.randn(WORDS, 5, generator=generator) for _ in range(2))
    ids = torch.randint(1, WORDS, (7, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 5, 6, 9, 3, 8])[:, None]).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    # By hand, sentence by sentence.
    means = {name: [t[row[keep > 0]].mean(0) for row, keep in zip(ids, mask, strict=True)]
             for name, t in (("dense", dense), ("changed", changed))}  # fmt: skip
    vectors = {name: torch.stack([mean / mean.norm() for mean in found]) for name, found in means.items()}
    assert torch.allclose(embeddings(Looked(dense)(**inputs), mask), vectors["dense"], atol=1e-6)
    pairs = [(a, b) for a in range(7) for b in range(a)]
    ranked = [[float(found[a] @ found[b]) for a, b in pairs] for found in vectors.values()]
    batches = [
        ({name: t[part] for name, t in inputs.items()}, {"attention_mask": mask[part], "dense": vectors["dense"][part]})
        for part in (slice(0, 4), slice(4, 7))
    ]
    cpu = torch.device("cpu")
    expected = 100 * spearmanr(*ranked).statistic
    assert agreement(Looked(changed), batches, cpu) == pytest.approx(expected, abs=1e-3)
    assert agreement(Looked(dense), batches, cpu) == pytest.approx(100.0)
    assert agreement(Looked(torch.ones(WORDS, 5)), batches, cpu) == 0.0
    targets = {"attention_mask": mask, "dense": vectors["dense"]}
    cosines = F.cosine_similarity(vectors["dense"], vectors["changed"])
    assert float(distance_from_dense(Looked(changed)(**inputs), targets)) == pytest.approx(1 - float(cosines.mean()))
    assert float(distance_from_dense(Looked(dense)(**inputs), targets)) == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two blocks with a tokeniser of words, and text of its words: folders ``bert`` and ``data``."""
    transformers = pytest.importorskip("transformers", reason="the extra [llm] is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("sentences")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *(f"w{i}" for i in range(2, WORDS))])}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "bert"
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    generator = torch.Generator().manual_seed(1)

    def sentence() -> str:
        count = int(torch.randint(6, 20, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(2, WORDS, (count,), generator=generator).tolist())

    lines = {split: [f" {sentence()} . {sentence()} . \n" for _ in range(40)] for split in ("validation", "test")}
    write_text(folder / "data" / "wikitext", **lines)
    return folder


def test_an_encoder_is_pruned_and_judged_by_its_similarities(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXPERIMENTS, MINILM.name, TINY)
    asked = ["--experiment", MINILM.name, "--data-dir", place / "data", "--checkpoint", place / "bert"]
    asked += ["--sparsity", "0.5", "--solver", "sweep", "magnitude", "--update", "none", "--output-dir", tmp_path]
    asked += ["--distill", "12", "--distill-lr", "1e-3", "--distill-loss", "given"]
    with pytest.raises(SystemExit) as left:
        run_app(run.app, arguments=[str(a) for a in asked])
    assert left.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    n = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    assert [(row["metric"], row["n_weights"], row["dense_agreement"]) for row in rows] == [
        ("agreement", n, pytest.approx(100.0))
    ] * 2
    for row in rows:
        assert 0.0 < row["agreement_undistilled"] < row["agreement"] < 100.0
        assert row["train_loss"] < row["train_loss_undistilled"]
    assert "agreement %" in capsys.readouterr().out
    # The same by hand; the embedding of each calibration sentence is the dense network's.
    network = open_network(TINY, Source(place / "data", place / "bert"))
    data = network.dataset.calibration(40, 0)
    for inputs, targets in data:
        with torch.no_grad():
            found = embeddings(network.model(**inputs), inputs["attention_mask"])
        assert torch.allclose(found, targets["dense"], atol=1e-6)
    result = cbs_opt.prune(
        network.model,
        data,
        distance_from_dense,
        sparsity=0.5,
        curvature="layer_inputs",
        solver="sweep",
        update="none",
        exclude="pooler*",
        seed=0,
    )
    assert rows[0]["agreement_undistilled"] == pytest.approx(network.score(result.model), rel=1e-5)
    assert rows[0]["train_loss_undistilled"] == pytest.approx(result.report.loss_pruned, rel=1e-5)
