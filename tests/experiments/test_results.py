"""results.jsonl: append, resume, damage, unwritable folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.runs.rows import ResultsFile, key_of, row_of
from solvers.errors import OutputError

SETTINGS = {"experiment": "digits-mlp", "solver": "obd", "sparsity": 0.9, "seed": 0, "damping": 1e-3, "extra": {}}
KEY = key_of(SETTINGS)
FIGURES = {"accuracy": 50.0, "refit_objective": float("nan"), "bound": float("-inf"), "repairs": ("a", "b")}

REQUIRED = {
    "experiment",
    "solver",
    "update",
    "sparsity",
    "seed",
    "n_weights",
    "n_kept",
    "accuracy",
    "train_loss",
    "objective",
    "refit_objective",
    "bound",
    "gap",
    "status",
    "seconds_gradients",
    "seconds_solve",
    "seconds_update",
    "device",
    "versions",
}


def test_row_has_every_field_and_no_infinity() -> None:
    row = row_of(SETTINGS, FIGURES)
    assert row["bound"] is None and row["refit_objective"] is None and row["error"] is None
    assert row["repairs"] == ["a", "b"] and row["key"] == KEY
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["versions"]["torch"]


def test_append_then_resume(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "new" / "folder")
    assert results.find(KEY) is None
    results.append(row_of(SETTINGS, FIGURES))
    again = ResultsFile(tmp_path / "new" / "folder")
    found = again.find(KEY)
    assert found is not None and found["accuracy"] == 50.0
    assert again.find(key_of({**SETTINGS, "seed": 1})) is None
    assert again.find(key_of({**SETTINGS, "damping": 1e-4})) is None


def test_the_newest_row_counts(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path)
    results.append(row_of(SETTINGS, FIGURES))
    results.append(row_of(SETTINGS, {**FIGURES, "accuracy": 60.0}))
    found = ResultsFile(tmp_path).find(KEY)
    assert found is not None and found["accuracy"] == 60.0


def test_a_row_that_failed_is_made_again(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path)
    results.append(row_of(SETTINGS, {"error": "BackendError: it died"}))
    assert results.find(KEY) is None
    results.append(row_of(SETTINGS, FIGURES))
    results.append(row_of(SETTINGS, {"error": "BackendError: it died"}))
    found = results.find(KEY)
    assert found is not None and found["accuracy"] == 50.0


def test_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path)
    results.append(row_of(SETTINGS, FIGURES))
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + whole[: len(whole) // 2])
    again = ResultsFile(tmp_path)
    assert again.dropped and len(again.rows) == 1 and results.path.read_bytes() == whole
    again.append(row_of({**SETTINGS, "seed": 1}, FIGURES))
    assert len(ResultsFile(tmp_path).rows) == 2


def test_a_foreign_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(OutputError, match="line 2 of"):
        ResultsFile(tmp_path)


def test_folders_which_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for folder in (blocked, blocked / "below"):
        with pytest.raises(OutputError, match="cannot write in --output-dir"):
            ResultsFile(folder)
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        ResultsFile(tmp_path)
