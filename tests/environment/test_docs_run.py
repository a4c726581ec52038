"""The Python of the documents runs, page by page: blocks of a page in order, as a reader would try them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cbs_opt.network import adapters

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


def _code(page: Path) -> str:
    """The blocks, each at its own line, so that a traceback names the line of the page."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        opens = re.fullmatch(r"\s*```python\b.*", line)
        closes = inside and line.strip() == "```"
        lines.append(line if inside and not closes else "")
        inside = bool(opens) or (inside and not closes)
    return "\n".join(lines)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in re.findall(r"<!-- needs: (\w+) -->", page.read_text()):
        if importlib.util.find_spec(extra) is None:
            pytest.skip(f"{extra} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    # Dataclasses and pickles ask for the module they were made in.
    module = ModuleType("of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    exec(compile(_code(page), page.as_posix(), "exec"), module.__dict__)
    assert len(module.__dict__) > 8
