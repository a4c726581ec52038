"""Calls with anything in any argument return something valid or raise an error of ours; see `fuzzing`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.trust.fuzzing import TARGETS, file_anything, survives

#: Calls of each target: a short run, and one of 10,000 in all.
SHORT = {"solve": 60, "bound": 25, "curvature": 60, "spec": 60, "prune": 30, "layers": 40, "file": 40}
LONG = {"solve": 3000, "bound": 800, "curvature": 1500, "spec": 1200, "prune": 2000, "layers": 800, "file": 700}
_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


def _run(name: str, count: int, folder: Path, phases: tuple[Phase, ...] = (Phase.generate,)) -> dict[str, int]:
    ended: dict[str, int] = {}

    @settings(max_examples=count, phases=phases, **_QUIET)
    @given(st.data())
    def call(data: st.DataObject) -> None:
        target = (lambda: file_anything(data.draw, folder)) if name == "file" else (lambda: TARGETS[name](data.draw))
        how = survives(target)
        ended[how] = ended.get(how, 0) + 1

    call()
    return ended


@pytest.mark.parametrize("name", SHORT)
def test_calls_end_well(name: str, tmp_path: Path) -> None:
    ended = _run(name, SHORT[name], tmp_path)
    assert sum(ended.values()) >= SHORT[name] // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_many_calls_end_well(name: str, tmp_path: Path) -> None:
    ended = _run(name, LONG[name], tmp_path)
    print(f"{name}: {sum(ended.values())} calls: {dict(sorted(ended.items()))}")
    assert sum(ended.values()) >= LONG[name] // 2
