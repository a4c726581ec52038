"""The settings of ``cbs-opt prune``: those of `cbs_opt.prune`, read off its signature, under the same names everywhere.

================  =========================  ==============================  ==========================
                  in Python                  in TOML                         as a flag
================  =========================  ==============================  ==========================
a setting         ``time_limit=60``          ``time_limit = 60``             ``--time-limit 60``
one of a group    ``fisher=FisherOptions(    ``[fisher]`` ``n_rows = 500``   ``--fisher-n-rows 500``
                  n_rows=500)``
a group as it is  ``distill=Distill()``      ``distill = true``              ``--distill``
or by a number    ``finetune=3``             ``finetune = 3``                ``--fine-tune 3``
================  =========================  ==============================  ==========================
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from cbs_opt.engine.choice import Choice
from cbs_opt.engine.setup import Setup
from cbs_opt.prune import prune
from solvers.errors import OptionError

#: Arguments of `prune` that are no settings.
_NOT_SETTINGS = ("model", "data", "loss_fn", "journal", "progress")
_SIMPLE = (bool, int, float, str)
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes
    ----------
    name : str
    group : str
        The argument of `prune` that it is a part of, or empty.
    kinds : tuple of types
        What a value may be; bool, int, float or str.
    several : bool
        Whether it takes several values.
    single : bool
        Whether one value goes without a list around it.
    default : object
    help : str
    """

    name: str
    group: str
    kinds: tuple[type, ...]
    several: bool
    single: bool
    default: Any
    help: str

    @property
    def key(self) -> str:
        """As the parameter of a command."""
        return f"{self.group}_{self.name}" if self.group else self.name

    @property
    def flags(self) -> tuple[str, ...]:
        """As flags; one may be written in two ways."""
        name = self.key.replace("_", "-")
        names = (name.replace("finetune", "fine-tune", 1), name) if name.startswith("finetune") else (name,)
        return tuple(f"--{n}/--no-{n}" if self.kinds == (bool,) else f"--{n}" for n in names)

    def parse(self, text: str) -> Any:
        """A value from a flag; raises OptionError."""
        if text.lower() == "none" and str not in self.kinds:
            return None
        for kind in self.kinds:
            with contextlib.suppress(ValueError, KeyError):
                return _BOOLEANS[text.lower()] if kind is bool else kind(text)
        names = " or ".join(kind.__name__ for kind in self.kinds)
        raise OptionError(f"{self.flags[0]} takes {names}, not {text!r}")


@cache
def settings() -> tuple[Setting, ...]:
    """All settings, those of groups after the group's own."""
    hints, found = typing.get_type_hints(prune), []
    texts = {**_help(prune), **_help(Setup), **_help(Choice)}
    for name, parameter in inspect.signature(prune).parameters.items():
        if name in _NOT_SETTINGS:
            continue
        kinds, several, single = _kinds(hints[name])
        group = group_class(name)
        if group is not None and not kinds and name not in {field.name for field in fields(Setup)}:
            # Left out it is off, and its defaults alone are worth a flag.
            kinds = (bool,)
        if kinds:
            found.append(Setting(name, "", kinds, several, single, parameter.default, texts.get(name, "")))
        found += [] if group is None else _of_group(name, group)
    return tuple(found)


@cache
def group_class(name: str) -> type | None:
    """The dataclass behind an argument of `prune` that is a group of settings."""
    members = _members(typing.get_type_hints(prune).get(name))
    if str in members:
        return None
    return next((member for member in members if isinstance(member, type) and is_dataclass(member)), None)


def _of_group(name: str, group: type) -> list[Setting]:
    hints, texts, found = typing.get_type_hints(group), _help(group), []
    for field in fields(group):
        kinds, several, single = _kinds(hints[field.name])
        if kinds:
            text = texts.get(field.name, "")
            found.append(Setting(field.name, name, kinds, several, single, field.default, text))
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _kinds(hint: Any) -> tuple[tuple[type, ...], bool, bool]:
    """Simple types that a hint allows, whether several values, and whether one alone."""
    kinds: list[type] = []
    several = single = False
    for member in _members(hint):
        if typing.get_origin(member) in (tuple, list, Sequence):
            several = True
            kinds += [kind for kind in typing.get_args(member) if kind in _SIMPLE]
        elif member in _SIMPLE:
            kinds.append(member)
            single = True
        elif isinstance(member, type) and issubclass(member, Enum):
            kinds.append(str)
            single = True
    # What is no number may still be text.
    return tuple(sorted(set(kinds), key=_SIMPLE.index)), several, single


def _help(documented: Any) -> dict[str, str]:
    """What a numpydoc docstring says of each name."""
    text = inspect.getdoc(documented) or ""
    found = {}
    for names, body in re.findall(r"^(\w[\w, ]*)(?: : .*)?\n((?:    .*(?:\n|$))+)", text, re.MULTILINE):
        for name in names.split(", "):
            found[name.strip()] = " ".join(body.split())
    return found
