"""The examples of other training loops: they run, the loss falls, and the zeros are zero afterwards."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest

import cbs_opt

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "fine_tuning"
#: Arguments at which an example is quick, and what it needs.
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain_loop": ({"epochs": 2}, ()),
    "with_lightning": ({"epochs": 1}, ("lightning",)),
    "with_transformers": ({"steps": 10}, ("transformers", "accelerate")),
}


def test_all_examples_are_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_masks_hold_under_loops_of_others(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, needed = EXAMPLES[name]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'cbs-opt[training]'")
    result = runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**arguments)
    found = cbs_opt.check(result.model, result.masks)
    assert found.ok and not found.revived and "all still zero" in capsys.readouterr().out
    before, after = result.report.loss_pruned, capsys.readouterr()
    assert before > 0.0 and after.err == ""
    for name_of_layer, mask in result.masks.items():
        stored = result.model.get_submodule(name_of_layer).parametrizations.weight.original.detach()
        assert not stored[~mask].count_nonzero() and stored[mask].count_nonzero()
