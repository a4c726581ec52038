"""Language models: text in windows, perplexity, and the way of a small random Llama through the commands."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.cli.shell import run_app
from cbs_opt.engine import sensitivity
from experiments.commands import run, tables, train
from experiments.datasets.text import Corpus, TokenText, Windows, load_wikitext
from experiments.networks import EXPERIMENTS
from experiments.networks.load import Source, open_network
from experiments.networks.pretrained import load_pretrained
from experiments.networks.smollm2 import SMOLLM2, next_token_loss, perplexity
from experiments.runs import layer_rows
from experiments.runs.bench import Bench
from experiments.runs.options import CurvatureOptions, NetworkOptions, RunOptions
from solvers.errors import CheckpointError, DataError

NAME = SMOLLM2.name
WORDS = 40
TINY = replace(SMOLLM2, windows=Windows(calibration=24, test=16, n_test=4), sparsities=(0.5,))
_SHORT = {m: m if m.distill is None else replace(m, distill=replace(m.distill, steps=4)) for m in SMOLLM2.table.methods}
_PARTS = tuple(replace(part, methods=tuple(_SHORT[method] for method in part.methods)) for part in SMOLLM2.table.parts)
TINY = replace(
    TINY, fisher=replace(TINY.fisher, n_rows=6), table=replace(SMOLLM2.table, parts=_PARTS, reported=(0.5, 0.6))
)


class Successor(nn.Module):
    """Says that token t + 1 follows token t, with so much certainty."""

    def __init__(self, certainty: float, vocabulary: int = 7) -> None:
        super().__init__()
        self.certainty, self.vocabulary = certainty, vocabulary

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.certainty * F.one_hot((input_ids + 1) % self.vocabulary, self.vocabulary))


def test_perplexity_of_known_distributions() -> None:
    cpu = torch.device("cpu")
    windows = torch.stack([torch.arange(10) % 7, (torch.arange(10) + 3) % 7])
    assert perplexity(Successor(0.0), windows, cpu) == pytest.approx(7.0)
    # The softmax of one logit c among seven is e^c / (e^c + 6).
    assert perplexity(Successor(2.0), windows, cpu) == pytest.approx((math.exp(2) + 6) / math.exp(2), rel=1e-6)
    assert perplexity(Successor(2.0), windows.flip(1), cpu) == pytest.approx(math.exp(2) + 6, rel=1e-6)
    assert perplexity(Successor(1e4), windows.flip(1), cpu) == math.inf
    loss = next_token_loss(Successor(2.0)(windows), {"input_ids": windows})
    assert math.exp(loss) == pytest.approx(perplexity(Successor(2.0), windows, cpu), rel=1e-6)


def test_windows_start_anywhere_and_test_windows_at_the_start() -> None:
    corpus = Corpus(("a" * 40, "b" * 60), ("c" * 30, "d" * 50), "made up")
    text = TokenText.of(corpus, lambda line: [ord(c) for c in line], Windows(10, 5, 7))
    assert text.test.shape == (7, 5) and bytes(text.test.flatten().tolist()).decode() == "c" * 30 + "d" * 5
    batches = text.calibration(200, seed=0)
    assert all(batch["input_ids"].shape == (1, 10) for batch in batches)
    joined = "a" * 40 + "b" * 60
    assert all(bytes(batch["input_ids"][0].tolist()).decode() in joined for batch in batches)
    assert len({tuple(batch["input_ids"][0].tolist()) for batch in batches}) > 5
    again, other = text.calibration(200, seed=0), text.calibration(200, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=True))
    for windows, what in ((Windows(100, 5, 7), "validation text"), (Windows(10, 5, 17), "test text")):
        with pytest.raises(DataError, match=what):
            TokenText.of(corpus, lambda line: [ord(c) for c in line], windows)


def write_text(folder: Path, **lines: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in lines.items():
        pq.write_table(pa.table({"text": texts}), folder / f"{split}-00000-of-00001.parquet")


def test_wikitext_is_found_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no validation-\*.parquet of Salesforce/wikitext"):
        load_wikitext(tmp_path)
    folder = tmp_path / "wikitext" / "wikitext-2-raw-v1"
    write_text(folder, validation=["one \n", "", "two \n"], test=["three \n"])
    for place in (tmp_path, tmp_path / "wikitext", folder):
        corpus = load_wikitext(place)
        assert corpus == Corpus(("one \n", "", "two \n"), ("three \n",), str(folder))
    pq.write_table(pa.table({"words": ["one"]}), folder / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no column 'text'"):
        load_wikitext(tmp_path)
    (folder / "test-00000-of-00001.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="damaged or not parquet"):
        load_wikitext(tmp_path)


def test_wikitext_from_the_hub_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def served(repository: str, config: str, split: str, revision: str) -> Any:
        assert (repository, config, len(revision)) == ("Salesforce/wikitext", "wikitext-2-raw-v1", 40)
        return datasets.Dataset.from_dict({"text": [split]})

    monkeypatch.setattr(datasets, "load_dataset", served)
    assert load_wikitext() == Corpus(("validation",), ("test",), "downloaded from Salesforce/wikitext")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with a tokeniser of words, and text of its words: folders ``llama`` and ``data``."""
    transformers = pytest.importorskip("transformers", reason="the extra [llm] is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("language")
    words = {f"w{number}": number for number in range(WORDS)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    generator = torch.Generator().manual_seed(1)
    lines = [" ".join(f"w{i}" for i in torch.randint(0, WORDS, (50,), generator=generator).tolist()) for _ in range(8)]
    write_text(folder / "data" / "wikitext", validation=[f" {line} \n" for line in lines[:5]], test=lines[5:])
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The experiment with windows that fit the text of `place`."""
    monkeypatch.setitem(EXPERIMENTS, NAME, TINY)
    yield


def leaves_with(app: Any, *arguments: str | Path) -> object:
    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments=[str(a) for a in arguments])
    return caught.value.code


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("tiny")
def test_a_llama_is_pruned_and_judged_by_its_perplexity(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--experiment", NAME, "--data-dir", place / "data", "--checkpoint", place / "llama"]
    asked = [*given, "--solver", "sweep", "--update", "own", "--sparsity", "0.6", "--seed", "0", "1"]
    assert leaves_with(run.app, *asked, "--output-dir", tmp_path) == 0
    rows = rows_of(tmp_path)
    n = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert [(row["seed"], row["metric"], row["n_weights"]) for row in rows] == [(s, "perplexity", n) for s in (0, 1)]
    assert all(row["accuracy"] is None and row["extra"]["curvature"] == "layer_inputs" for row in rows)
    assert all(row["n_kept"] == int(n * 0.4) and row["fisher_samples"] == 6 for row in rows)
    assert rows[0]["perplexity"] != rows[1]["perplexity"]
    assert (tmp_path / f"perplexity-{NAME}.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"perplexity {rows[0]['perplexity']:.2f}" in out and "lower is better" in out
    # The same by hand.
    network = open_network(TINY, Source(place / "data", place / "llama"))
    result = cbs_opt.prune(
        network.model,
        network.dataset.calibration(6, 0),
        next_token_loss,
        sparsity=0.6,
        curvature="layer_inputs",
        solver="sweep",
        update="own",
        exclude="lm_head",
        seed=0,
    )
    assert rows[0]["dense_perplexity"] == pytest.approx(network.dense, rel=1e-6)
    assert rows[0]["perplexity"] == pytest.approx(network.score(result.model), rel=1e-5)
    assert rows[0]["train_loss"] == pytest.approx(result.report.loss_pruned, rel=1e-5)
    # What is there is not made again.
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("measured again"))
    assert leaves_with(run.app, *asked, "--output-dir", tmp_path) == 0
    assert rows_of(tmp_path) == rows and "there already" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_the_table_has_a_line_per_method_and_is_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, made = Bench.measure, []

    def stop_after_three(self: Bench, task: Any, keys: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(task)
        return real(self, task, keys)

    asked = [NAME, "--data-dir", place / "data", "--checkpoint", place / "llama", "--seed", "0"]
    monkeypatch.setattr(Bench, "measure", stop_after_three)
    assert leaves_with(tables.app, *asked, "--output-dir", tmp_path) == 130
    monkeypatch.setattr(Bench, "measure", real)
    assert leaves_with(tables.app, *asked, "--output-dir", tmp_path) == 0
    rows = rows_of(tmp_path / NAME)
    found = [
        (row["solver"], row["update"], row["allocation"], "distill" in row["extra"], row["sparsity"]) for row in rows
    ]
    assert found == [
        (method.solver, method.update, method.allocation, method.distill is not None, sparsity)
        for method in TINY.table.methods
        for sparsity in (0.5, 0.6)
    ]
    text = (tmp_path / NAME / "table.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    for method in TINY.table.methods:
        asked_for = (method.solver, method.update, method.allocation, method.distill is not None)
        mine = [r for r in rows if (r["solver"], r["update"], r["allocation"], "distill" in r["extra"]) == asked_for]
        assert len(mine) == 2 and all(f"{row['perplexity']:.2f}" in lines[method.label] for row in mine)
    assert all(f"## {part.title}" in text for part in TINY.table.parts)
    # What distillations went on from has served.
    assert not list((tmp_path / NAME / "networks").iterdir())
    assert "python -m experiments.tables" in text and (tmp_path / NAME / "table.png").stat().st_size > 1000
    capsys.readouterr()
    assert leaves_with(tables.app, *asked, "--until", "0.1", "--output-dir", tmp_path) == 2
    assert "leave none of the table's sparsities, 0.5, 0.6" in capsys.readouterr().err
    # Rows that are there, and no others.
    asked[-1] = "1"
    assert leaves_with(tables.app, *asked, "--found", "--output-dir", tmp_path) == 2
    assert "has no row of this table" in capsys.readouterr().err
    monkeypatch.setattr(Bench, "measure", lambda *_: pytest.fail("measured again"))
    asked += ["--seed", "0", "--sparsity", "0.6", "--found"]
    assert leaves_with(tables.app, *asked, "--output-dir", tmp_path) == 0
    text = (tmp_path / NAME / "table.md").read_text()
    assert "| method | 0.6 | seconds |" in text and all(f"| {method.label} |" in text for method in TINY.table.methods)
    staged = ["digits-mlp", "--found", "--output-dir", tmp_path]
    assert leaves_with(tables.app, *staged) == 2 and "leave --sparsity and --found out" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_distillation_goes_on_from_a_kept_network_and_methods_share_shares(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a large network, where every solver asks by `sweep`.
    monkeypatch.setattr(sensitivity, "SMALL", 1_000)
    found, real = [], layer_rows.find_shares
    monkeypatch.setattr(layer_rows, "find_shares", lambda *a: found.append(real(*a)) or found[-1])
    asked = ["--experiment", NAME, "--data-dir", place / "data", "--checkpoint", place / "llama", "--sparsity", "0.6"]
    asked += ["--allocation", "uniform,measured", "--output-dir", tmp_path]
    distill = ["--distill", "6", "--distill-lr", "1e-3", "--distill-batch", "2"]
    assert leaves_with(run.app, *asked, "--solver", "sweep", "--update", "own", "--save-networks") == 0
    assert leaves_with(run.app, *asked, "--solver", "admm") == 0
    assert len(found) == 1 and len(list((tmp_path / "networks").iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(layer_rows, "prune_layerwise", lambda *_: pytest.fail("pruned again"))
        assert leaves_with(run.app, *asked, "--solver", "sweep", "--update", "own", *distill) == 0
    assert not list((tmp_path / "networks").iterdir())
    plain, other, distilled = rows_of(tmp_path)
    assert plain["shares"] == other["shares"] == distilled["shares"] == found[0].rule
    assert [c.name for c in found[0].candidates][:2] == ["uniform", "measured"]
    assert plain["seconds_shares"] == other["seconds_shares"] > 0.0
    # The same at one go.
    network = open_network(TINY, Source(place / "data", place / "llama"))
    result = cbs_opt.prune(
        network.model,
        network.dataset.calibration(6, 0),
        next_token_loss,
        sparsity=0.6,
        curvature="layer_inputs",
        solver="sweep",
        update="own",
        allocation=("uniform", "measured"),
        distill=cbs_opt.Distill(6, 1e-3, batch_size=2),
        exclude="lm_head",
        seed=0,
    )
    assert result.report.shares == found[0].rule and result.report.distill is not None
    assert distilled["perplexity"] == pytest.approx(network.score(result.model), rel=1e-5)
    assert distilled["perplexity_undistilled"] == plain["perplexity"]
    assert distilled["distill_loss_after"] == pytest.approx(result.report.distill.loss_after, rel=1e-5)
    assert distilled["train_loss"] == pytest.approx(result.report.loss_pruned, rel=1e-5)
    assert distilled["n_kept"] == plain["n_kept"] == result.report.n_kept


@pytest.mark.usefixtures("tiny")
def test_a_damaged_network_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--experiment", NAME, "--data-dir", place / "data", "--checkpoint", place / "llama", "--sparsity", "0.6"]
    asked += ["--solver", "magnitude", "--update", "none", "--output-dir", tmp_path, "--save-networks"]
    assert leaves_with(run.app, *asked) == 0
    kept = next((tmp_path / "networks").glob("*/*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:100])
    assert leaves_with(run.app, *asked, "--distill", "2") == 2
    assert kept.parent.name in capsys.readouterr().err.replace("\n", "")


def test_what_a_language_model_is_not_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for app, arguments, message in (
        (run.app, ["--experiment", NAME, "--stages", "3", "--curvature", "fisher"], "no settings for stages"),
        (run.app, ["--experiment", NAME, "--stages", "3"], "--stages"),
        (run.app, ["--experiment", NAME, "--data-dir", "nowhere"], "nowhere"),
        (train.app, [NAME], "trained by others"),
        (tables.app, ["efficientnet-lite0-imagenet"], "has no table"),
    ):
        output = [] if app is train.app else ["--output-dir", tmp_path]
        assert leaves_with(app, *arguments, *output) == 2
        assert message in capsys.readouterr().err
    assert RunOptions(NetworkOptions(NAME)).layerwise
    assert not RunOptions(NetworkOptions(NAME), curvature=CurvatureOptions("fisher")).layerwise


def test_networks_that_are_not_there(place: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    for where, message in (
        (tmp_path / "nowhere", "no file or folder"),
        (tmp_path / "weights.bin", "not a GGUF file"),
        (tmp_path / "empty", "config.json"),
        (tmp_path / "bad.gguf", "bad.gguf"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(SMOLLM2, where)


def test_where_a_network_comes_from(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda where, **o: asked.append((where, o)))
    network = SimpleNamespace(config=SimpleNamespace(use_cache=True), eval=lambda: network)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: network)
    (tmp_path / "net.gguf").write_bytes(b"")
    for where in (tmp_path, tmp_path / "net.gguf", Path("owner/name"), None):
        load_pretrained(SMOLLM2, where)
    file = {"gguf_file": "net.gguf", "local_files_only": True}
    assert asked == [
        (str(tmp_path), file),
        (str(tmp_path), file),
        ("owner/name", {}),
        (SMOLLM2.repository, {"revision": SMOLLM2.revision}),
    ]
    assert network.config.use_cache is False


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'cbs-opt\[llm\]'"):
        load_pretrained(SMOLLM2, None)
