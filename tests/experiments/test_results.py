"""results.jsonl: append, resume, damage, unwritable folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.runs.rows import Measured, ResultsFile, Settings, row_of
from solvers.errors import OutputError

SETTINGS = Settings(
    experiment="digits-mlp",
    solver="obd",
    update="none",
    update_scale=1.0,
    sparsity=0.9,
    sparsity_rounding="exact",
    seed=0,
    objective_kind="selection",
    fisher_samples=10,
    fisher_batch=1,
    damping=1e-3,
    blocks="one",
    first_order=False,
    stages=1,
    allocation=None,
    time_limit=None,
    weights="abc",
    device="cpu",
)
MEASURED = Measured(
    n_weights=10,
    n_kept=1,
    accuracy=50.0,
    train_loss=1.0,
    dense_accuracy=90.0,
    objective=0.1,
    refit_objective=float("nan"),
    bound=float("-inf"),
    gap=float("inf"),
    status="feasible",
    seconds_gradients=0.1,
    seconds_solve=0.2,
    seconds_update=0.3,
)

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
    row = row_of(SETTINGS, MEASURED)
    assert row.keys() >= REQUIRED
    assert row["bound"] is None and row["gap"] is None and row["refit_objective"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["versions"]["torch"]


def test_append_then_resume(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "new" / "folder")
    assert results.find(SETTINGS) is None
    results.append(row_of(SETTINGS, MEASURED))
    again = ResultsFile(tmp_path / "new" / "folder")
    found = again.find(SETTINGS)
    assert found is not None and found["accuracy"] == 50.0
    assert again.find(replace(SETTINGS, seed=1)) is None
    assert again.find(replace(SETTINGS, damping=1e-4)) is None


def test_the_newest_row_counts(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path)
    results.append(row_of(SETTINGS, MEASURED))
    results.append(row_of(SETTINGS, replace(MEASURED, accuracy=60.0)))
    found = ResultsFile(tmp_path).find(SETTINGS)
    assert found is not None and found["accuracy"] == 60.0


def test_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path)
    results.append(row_of(SETTINGS, MEASURED))
    whole = results.path.read_bytes()
    results.path.write_bytes(whole + whole[: len(whole) // 2])
    again = ResultsFile(tmp_path)
    assert again.dropped and len(again.rows) == 1 and results.path.read_bytes() == whole
    again.append(row_of(replace(SETTINGS, seed=1), MEASURED))
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
