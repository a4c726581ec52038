"""Settings from a TOML file and from flags, checked, made into arguments of `cbs_opt.prune`, and written again."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cbs_opt.cli.schema import group_class, settings
from solvers.errors import CBSError, DataError, OptionError, OutputError, UnknownNameError
from solvers.files import write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Settings by argument of `prune`; those of a group as a mapping of their own.
Settings = dict[str, Any]


def read_config(path: Path, own: Iterable[str]) -> Settings:
    """A TOML file of settings.

    Parameters
    ----------
    path : Path
    own : names
        Of the command's own options, which may be set as well.

    Raises
    ------
    DataError
        If it cannot be read or is no TOML.
    UnknownNameError
        For a name that is no setting, with the nearest one that is.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}") from error
    plain = {setting.name for setting in settings() if not setting.group}
    groups = {setting.group for setting in settings() if setting.group}
    found: Settings = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in {*own, *plain, *groups}:
            raise UnknownNameError.of(f"setting in {path}", key, {*own, *plain, *groups})
        if isinstance(value, dict):
            if name not in groups:
                raise OptionError(f"{path}: {key} is a single setting and no table")
            found[name] = _checked_group(path, name, value)
        elif name in groups - plain:
            raise OptionError(f"{path}: {key} is a group of settings; write them under [{key}]")
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def merged(config: Settings, flags: Mapping[str, Any]) -> Settings:
    """Settings of a file, those given as flags (by `Setting.key`) in their place."""
    found: Settings = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for setting in settings():
        given = flags.get(setting.key)
        if given is None or (setting.several and not given):
            continue
        if setting.several:
            value: Any = tuple(setting.parse(text) for text in given)
            value = value[0] if setting.single and len(value) == 1 else value
        else:
            value = given if isinstance(given, bool) else setting.parse(given)
        if not setting.group:
            before = found.get(setting.name)
            if isinstance(before, dict) and not isinstance(value, bool):
                # A number stands for a group of which it is the first setting: stages.
                before[_first(setting.name)] = value
            elif not (isinstance(before, dict) and value is True):
                found[setting.name] = value
            continue
        before = found.get(setting.group)
        if not isinstance(before, dict):
            simple = before is not None and not isinstance(before, bool)
            before = found[setting.group] = {_first(setting.group): before} if simple else {}
        before[setting.name] = value
    return found


def arguments(found: Settings) -> dict[str, Any]:
    """Arguments of `cbs_opt.prune`; raises CBSError for values that make no group."""
    made: dict[str, Any] = {}
    for name, value in found.items():
        group = group_class(name)
        if group is None or not (isinstance(value, (dict, bool))):
            made[name] = value
            continue
        if value is False:
            continue
        table = {} if value is True else {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        try:
            made[name] = group(**table)
        except CBSError as error:
            raise type(error)(f"{name}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise OptionError(f"{name}: {error}") from error
    return made


def write_config(path: Path, own: Mapping[str, Any], effective: Mapping[str, Any]) -> None:
    """Write settings, the command's own and those of `PruneResult.settings`, as a file that `read_config` reads."""
    known = {(setting.group, setting.name) for setting in settings()}
    simple = {**own, **{key: value for key, value in effective.items() if ("", key) in known}}
    lines = [f"{key} = {_toml(value)}" for key, value in simple.items() if _storable(value)]
    for group, table in effective.items():
        if isinstance(table, Mapping):
            entries = {k: v for k, v in table.items() if (group, k) in known and _storable(v)}
            lines += ["", f"[{group}]", *(f"{key} = {_toml(value)}" for key, value in entries.items())]
    try:
        write_atomically(path, ("\n".join(lines) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _storable(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping)


def _first(group: str) -> str:
    return next(setting.name for setting in settings() if setting.group == group)


def _checked_group(path: Path, name: str, table: Mapping[str, Any]) -> Settings:
    known = {setting.name for setting in settings() if setting.group == name}
    renamed = {key.replace("-", "_"): value for key, value in table.items()}
    for key in renamed:
        if key not in known:
            raise UnknownNameError.of(f"setting in [{name}] of {path}", key, known)
    return renamed


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(entry) for entry in value)}]"
    return json.dumps(str(value), ensure_ascii=False)
