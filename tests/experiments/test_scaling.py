"""How time grows, through its command at toy sizes; slopes against a power law."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cbs_opt.cli.shell import run_app
from experiments.commands.scaling import app
from experiments.runs import scaling
from experiments.runs.scaling import VARIED, Size, exponents


def test_the_slopes_are_those_of_a_power_law() -> None:
    rows = []
    for name, values in VARIED.items():
        for value in values:
            size = {**asdict(Size()), name: value}
            seconds = 1e-9 * size["tokens"] * size["width"] ** 2.5 * size["layers"]
            rows.append({**size, "solver": "sweep", "seconds": seconds})
    assert exponents(rows, "sweep") == pytest.approx({"tokens": 1.0, "width": 2.5, "layers": 1.0})


def test_the_command_writes_rows_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "VARIED", {"tokens": (256, 512), "width": (8, 192), "layers": (1, 4)})
    monkeypatch.setattr(scaling, "MIDDLE", Size(256, 8, 1))
    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments=["--repeats", "1", "--output-dir", str(tmp_path)])
    assert caught.value.code == 0
    rows = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert {row["solver"] for row in rows} == {"sweep", "admm"}
    assert all(row["seconds"] > 0.0 for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert "`admm`" in (tmp_path / "scaling.md").read_text()
