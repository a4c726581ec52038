"""Text forms of budgets, for command lines and files.

==================  ========================================================================
``"2:4"``           2 kept of every 4 consecutive weights of a row (`solvers.budget.nm`)
``"sparsity:0.5"``  a share of all weights goes
``"channels:0.5"``  a share of the rows of layers goes whole: neurons, filters (`solvers.budget.groups`)
``"columns:0.5"``   of the columns: input channels; in layers of networks whole, all places of a kernel
``"4x4:0.5"``       of the tiles of 4 rows × 4 inputs
==================  ========================================================================
"""

from __future__ import annotations

import re

from solvers.budget.groups import Tiles
from solvers.budget.nm import NM
from solvers.budget.pattern import Pattern, Sparsity
from solvers.errors import ProblemError


def parse(text: str) -> Pattern:
    """A budget from its text form; raises ProblemError, with the forms there are."""
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found:
        return NM(int(found[1]), int(found[2]))
    kind, _, value = text.partition(":")
    try:
        kind, tile = kind.strip(), re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", kind)
        if kind == "sparsity":
            return Sparsity(float(value))
        if kind in ("channels", "rows"):
            return Tiles(float(value))
        if kind == "columns":
            return Tiles(float(value), None, 1)
        if tile:
            return Tiles(float(value), int(tile[1]), int(tile[2]))
    except ValueError:
        pass
    raise ProblemError(
        f"budget {text!r} is none of the known forms: '2:4' (2 kept of every 4 in a row), 'sparsity:0.5', "
        "'channels:0.5', 'columns:0.5', '4x4:0.5' (shares that go); a number of weights is an integer, n_prune=20"
    )
