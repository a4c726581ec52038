"""What was asked for, defaults filled in, under the names of `cbs_opt.prune`'s arguments: for reports and folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from cbs_opt.engine.choice import Choice
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import StageOptions
from solvers import Solver


def effective(setup: Setup, choice: Choice, stages: StageOptions | None) -> dict[str, Any]:
    """The settings of a run, ready for JSON; a mask to start from is left out."""
    found = {
        **{entry.name: getattr(choice, entry.name) for entry in fields(choice) if entry.name not in ("start", "seed")},
        **{entry.name: getattr(setup, entry.name) for entry in fields(setup)},
        "stages": 1 if stages is None else stages,
    }
    if choice.seed is not None:
        found["seed"] = choice.seed
    if choice.objective is None:
        found["objective"] = choice.goal(stages is not None)
    if not setup.layerwise and found["fisher"] is None:
        found["fisher"] = setup.options
    return {name: plain(value) for name, value in found.items()}


def plain(value: Any) -> Any:
    """Numbers, text, lists and tables; of a function, its name."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Solver):
        return value.spec
    if is_dataclass(value) and type(value).__str__ is not object.__str__ and "__str__" in type(value).__dict__:
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, Path):
        return [plain(entry) for entry in value]
    return getattr(value, "__qualname__", None) or str(value)
