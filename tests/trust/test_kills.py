"""Killed runs that are started again end as if they had not been; at length: ``python -m tests.trust.kills``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.kills import run_killed, tasks


@pytest.mark.parametrize(("name", "kills"), [("staged", 2), ("compare", 1), ("tables", 1)])
def test_killed_runs_end_as_others_do(name: str, kills: int, tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    task = next(task for task in tasks(tmp_path / "blocks") if task.name == name)
    hits, same = run_killed(task, tmp_path, kills)
    assert hits == kills and same
