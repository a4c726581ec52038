"""The tables: one nested path per seed, resumable, with the literature beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cbs_opt import FisherOptions, StageOptions
from experiments import plans, staged_path, table_report
from experiments.augmentation import CropAndFlip
from experiments.datasets import load_dataset
from experiments.datasets.images import ImageSet, crop_and_flip
from experiments.plans import PLANS, Phase, Plan, get_plan
from solvers.errors import DataError, OutputError, UnknownNameError

TINY = Plan(
    experiment="digits-mlp",
    solver="obs[chunks=2]",
    fisher=FisherOptions(n_rows=30, batch_size=8, damping=1e-3),
    stages=StageOptions(held_out=200, settle=1, max_evaluations=5),
    phases=(Phase(((0.5, 2), (0.7, 1))), Phase(((0.8, 1), (0.9, 2)), regrow=0.2)),
    reported=(0.5, 0.9),
)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).eval()


def _rows(folder: Path, until: float = 0.9, said: list | None = None, plan: Plan = TINY) -> list[dict]:
    path = staged_path.StagedPath(plan, _model(), load_dataset("digits"), ("*",), (), torch.device("cpu"), 0, folder)
    return path.run(until, lambda record, accuracy: said.append((record.stage, accuracy)) if said is not None else None)


def test_a_path_gives_a_row_per_reported_sparsity_and_resumes(tmp_path: Path) -> None:
    said: list[tuple[int, float | None]] = []
    rows = _rows(tmp_path, said=said)
    assert [row["sparsity"] for row in rows] == [0.5, 0.9]
    n = rows[0]["n_weights"]
    assert [row["n_kept"] for row in rows] == [int(n * 0.5), int(n * (1 - 0.9))]
    # Stages are counted from the dense network on.
    assert [row["stages"] for row in rows] == [2, 6]
    assert rows[1]["images"] == 6 * 30 * 8
    assert [stage for stage, accuracy in said if accuracy is None] == [1, 2, 3, 4, 5, 6]
    again: list[tuple[int, float | None]] = []
    assert _rows(tmp_path, said=again) == rows
    assert all(accuracy is not None for _, accuracy in again)


def test_a_path_may_stop_early(tmp_path: Path) -> None:
    assert [row["sparsity"] for row in _rows(tmp_path, until=0.5)] == [0.5]


def test_phases_may_take_fewer_rows_and_bfloat16_changes_little(tmp_path: Path) -> None:
    phases = (Phase(((0.5, 2),), n_rows=10), Phase(((0.9, 2),)))
    rows = _rows(tmp_path / "float32", plan=replace(TINY, phases=phases))
    assert [row["images"] for row in rows] == [2 * 10 * 8, 2 * 10 * 8 + 2 * 30 * 8]
    low = _rows(tmp_path / "bfloat16", plan=replace(TINY, phases=phases, bfloat16=True))
    assert low[0]["n_kept"] == rows[0]["n_kept"]
    assert low[0]["held_out_loss"] != rows[0]["held_out_loss"]
    assert low[0]["held_out_loss"] == pytest.approx(rows[0]["held_out_loss"], rel=0.1)


def test_the_table_shows_the_literature_and_the_seeds(tmp_path: Path) -> None:
    plan = get_plan("mlpnet-mnist")
    rows = [
        {
            "experiment": plan.experiment,
            "sparsity": 0.98,
            "seed": seed,
            "accuracy": 94.0 + seed,
            "stages": 40,
            "seconds_gradients": 10.0,
            "seconds_solve": 5.0,
            "seconds_update": 2.0,
        }
        for seed in (0, 1)
    ]
    others = [{"solver": "magnitude", "update": "none", "sparsity": 0.98, "accuracy": 32.25}]
    table_report.write_table(tmp_path, plan, rows, others, 93.97)
    text = (tmp_path / "table.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 0.98"))
    assert "90.73" in line
    assert "94.50 ± 0.50" in line
    assert "32.25" in line
    assert "python -m experiments.tables" in text
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_plans_are_consistent() -> None:
    for name, plan in PLANS.items():
        assert plan.experiment == name
        path = [level for phase in plan.phases for level in phase.sparsities]
        assert path == sorted(path)
        assert set(plan.reported) <= set(path)
    with pytest.raises(UnknownNameError, match="mlpnet-mnist"):
        get_plan("mlpnet")
    assert plans.get_plan("resnet20-cifar10").augment


def test_rows_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    broken = tmp_path / "rows.jsonl"
    broken.write_text("{\n")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        table_report.read_rows(broken)
    table_report.write_rows(broken, [{"a": 1}])
    assert table_report.read_rows(broken) == [{"a": 1}]
    assert json.loads(broken.read_text()) == {"a": 1}
    with pytest.raises(OutputError):
        table_report.write_rows(broken / "below" / "a-file", [])


def test_augmentation_of_normalised_images_is_that_of_raw_ones() -> None:
    raw = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet(raw, torch.zeros(5, dtype=torch.long), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    expected = images.normalise(crop_and_flip(raw, torch.Generator().manual_seed(3)))
    found = CropAndFlip.of(images)(images.normalise(raw), torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(DataError):
        CropAndFlip.of(images)(torch.zeros(3), torch.Generator())
