"""Files are whole or not there, are ours or refused, and a folder has one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cbs_opt
import solvers
from cbs_opt.engine.journal import Journal, StageState
from cbs_opt.report.records import StageRecord
from experiments.runs.rows import ResultsFile
from solvers.errors import CBSError, CheckpointError, OutputError, ProblemError
from solvers.files import holding, write_atomically
from tests.conftest import random_block


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", ["masks", "block", "results"])
def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    results = ResultsFile(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError):
        if writer == "masks":
            cbs_opt.save_masks(tmp_path / "masks", {"fc": torch.ones(2, dtype=torch.bool)})
        elif writer == "block":
            solvers.save_block(tmp_path / "block.npz", random_block(0, 4, 3))
        else:
            results.append({"key": "a", "error": None})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


HOLD = """
import sys
from solvers.files import holding
with holding(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_until_it_is_gone(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=str(other.pid)):
        ResultsFile(tmp_path)
    other.kill()
    other.communicate()
    with holding(tmp_path), holding(tmp_path):
        assert ResultsFile(tmp_path).rows == []
    assert not (tmp_path / ".lock").exists()


def _record(number: int) -> StageRecord:
    figures = dict.fromkeys((f.name for f in StageRecord.__dataclass_fields__.values() if f.type == "float"), 0.0)
    counts = dict.fromkeys(("n_kept", "evaluations", "n_regrown", "n_images"), 2)
    return StageRecord(stage=number, kind="prune", solver="", **figures, **counts)


def _journal(folder: Path) -> Path:
    state = StageState(1, torch.zeros(3, dtype=torch.float64), np.zeros(3, dtype=bool), 0.1)
    Journal(folder, {"seed": "0"}).append(state, _record(1))
    return folder / "journal.json"


@pytest.mark.parametrize(
    "name", ["../stage-0001.safetensors", "/etc/passwd", "sub/stage-0001.safetensors", "", None, 3]
)
def test_a_journal_names_files_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    path = _journal(tmp_path / "journal")
    stored = json.loads(path.read_text())
    stored["stages"][0]["file"] = name
    path.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError):
        Journal.open(tmp_path / "journal").last()


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_a_journal_cut_off_at_any_byte_is_refused(tmp_path: Path, kind: str) -> None:
    path = _journal(tmp_path / "journal")
    path = path if kind == "json" else path.parent / "stage-0001.safetensors"
    content = path.read_bytes()
    for cut in range(0, len(content) - 1, max(1, len(content) // 40)):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            Journal.open(tmp_path / "journal").last()


def test_results_cut_off_at_any_byte_lose_the_last_row_only(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path)
    for key in "ab":
        results.append({"key": key, "error": None})
    content = results.path.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(first, len(content)):
        results.path.write_bytes(content[:cut])
        again = ResultsFile(tmp_path)
        assert [row["key"] for row in again.rows] == ["a"]
        again.append({"key": "c", "error": None})
        assert [row["key"] for row in ResultsFile(tmp_path).rows] == ["a", "c"]


def test_blocks_cut_off_or_changed_are_refused_or_whole(tmp_path: Path) -> None:
    path, block = tmp_path / "block.npz", random_block(1, 6, 4)
    solvers.save_block(path, block)
    content, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content[: random.integers(len(content))] if random.random() < 0.5 else content)
        for at in random.integers(len(damaged), size=3) if damaged else ():
            damaged[at] = random.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            assert solvers.load_block(path).n == 6
        except CBSError as error:
            assert str(path) in str(error) or "block" in str(error)


@pytest.mark.parametrize("path", [None, 3, b"x.npz", ".", ""])
def test_blocks_are_read_from_paths(path: object) -> None:
    with pytest.raises(ProblemError):
        solvers.load_block(path)


def test_no_file_can_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    path = tmp_path / "evil.npz"
    np.savez(path, weights=np.array([Evil()], dtype=object), factor=np.ones((1, 1)))
    with pytest.raises(ProblemError):
        solvers.load_block(path)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        cbs_opt.load_masks(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
