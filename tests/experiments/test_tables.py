"""The tables: one nested path per seed, resumable, with the literature beside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cbs_opt import FisherOptions, StageOptions
from experiments.datasets import load_dataset
from experiments.datasets.augmentation import CropAndFlip
from experiments.datasets.images import ImageSet, crop_and_flip
from experiments.networks import EXPERIMENTS, Experiment, Network, get_experiment
from experiments.networks.experiment import Phase, SolverTable, StageDefaults, StagedTable
from experiments.reports import staged_table
from experiments.runs.stages import StagedPath
from solvers.errors import DataError, OptionError, OutputError

TINY = replace(
    get_experiment("digits-mlp"),
    staged=StageDefaults(
        FisherOptions(n_rows=30, batch_size=8, damping=1e-3), StageOptions(held_out=200, settle=1, max_evaluations=5)
    ),
    table=StagedTable(
        phases=(Phase(((0.5, 2), (0.7, 1))), Phase(((0.8, 1), (0.9, 2)), regrow=0.2)),
        reported=(0.5, 0.9),
        solver="obs[chunks=2]",
    ),
)


def _network(experiment: Experiment) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)).eval()
    return Network(model, "made up", experiment, load_dataset("digits"), torch.device("cpu"))


def _rows(folder: Path, until: float = 0.9, said: list | None = None, experiment: Experiment = TINY) -> list[dict]:
    path = StagedPath(_network(experiment), 0, folder)
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


def test_bfloat16_changes_little(tmp_path: Path) -> None:
    table = replace(TINY.table, phases=(Phase(((0.5, 2), (0.9, 2))),))
    rows = _rows(tmp_path / "float32", experiment=replace(TINY, table=table))
    low = _rows(tmp_path / "bfloat16", experiment=replace(TINY, table=replace(table, bfloat16=True)))
    assert low[0]["n_kept"] == rows[0]["n_kept"]
    assert low[0]["held_out_loss"] != rows[0]["held_out_loss"]
    assert low[0]["held_out_loss"] == pytest.approx(rows[0]["held_out_loss"], rel=0.1)


def test_the_table_shows_the_literature_and_the_seeds(tmp_path: Path) -> None:
    chosen = get_experiment("mlpnet-mnist")
    rows = [
        {
            "experiment": chosen.name,
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
    staged_table.write_table(tmp_path, chosen, rows, others, 93.97)
    text = (tmp_path / "table.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| 0.98"))
    assert "90.73" in line
    assert "94.50 ± 0.50" in line
    assert "32.25" in line
    assert "python -m experiments.tables" in text
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_tables_are_consistent() -> None:
    found = {name: experiment.table for name, experiment in EXPERIMENTS.items()}
    tables = {name: table for name, table in found.items() if isinstance(table, StagedTable)}
    assert set(tables) == {"digits-mlp", "mlpnet-mnist", "resnet20-cifar10", "cifarnet-cifar10"}
    solvers = {name for name, table in found.items() if isinstance(table, SolverTable)}
    assert solvers == {"smollm2-wikitext2", "minilm-sentences"}
    for table in tables.values():
        path = [level for phase in table.phases for level in phase.sparsities]
        assert path == sorted(path)
        assert set(table.reported) <= set(path)
    with pytest.raises(OptionError, match="no table"):
        StagedPath(_network(get_experiment("efficientnet-lite0-imagenet")), 0, Path())


def test_rows_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    broken = tmp_path / "rows.jsonl"
    broken.write_text("{\n")
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        staged_table.read_rows(broken)
    staged_table.write_rows(broken, [{"a": 1}])
    assert staged_table.read_rows(broken) == [{"a": 1}]
    assert json.loads(broken.read_text()) == {"a": 1}
    with pytest.raises(OutputError):
        staged_table.write_rows(broken / "below" / "a-file", [])


def test_augmentation_of_normalised_images_is_that_of_raw_ones() -> None:
    raw = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet(raw, torch.zeros(5, dtype=torch.long), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    expected = images.normalise(crop_and_flip(raw, torch.Generator().manual_seed(3)))
    found = CropAndFlip.of(images)(images.normalise(raw), torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(DataError):
        CropAndFlip.of(images)(torch.zeros(3), torch.Generator())
