"""Text forms of budgets, for command lines and files.

==================  ========================================================================
``"2:4"``           2 kept of every 4 consecutive weights of a row (`solvers.budget.nm`)
``"sparsity:0.5"``  a share of all weights
==================  ========================================================================
"""

from __future__ import annotations

import re

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
        if kind.strip() == "sparsity":
            return Sparsity(float(value))
    except ValueError:
        pass
    raise ProblemError(
        f"budget {text!r} is none of the known forms: '2:4' (2 kept of every 4 in a row), 'sparsity:0.5'; a number of "
        "weights is an integer, n_prune=20"
    )
