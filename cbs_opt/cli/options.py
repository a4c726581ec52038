"""What ``cbs-opt prune`` takes: options of its own, those of a run, and the settings of `cbs_opt.prune`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from cbs_opt.cli.schema import Setting, settings
from solvers.errors import OptionError


@dataclass(frozen=True)
class Own:
    """What the command has beside the settings of `cbs_opt.prune`; in files under the same names."""

    model: Annotated[str | None, "package.module:factory, which returns the network, or is it."] = None
    data: Annotated[str | None, "package.module:loader, which returns the data for cbs_opt.prune, or is it."] = None
    loss: Annotated[
        str | None, "cross_entropy, mse_loss, ...; output.loss, the network's own; or package.module:function."
    ] = None
    hf: Annotated[Path | None, "Instead of --model: a folder as save_pretrained of transformers writes it."] = None
    text: Annotated[Path | None, "Instead of --data, with --hf: a text file to calibrate on."] = None
    sequences: Annotated[int, "With --text: windows of tokens, from its beginning."] = 32
    sequence_length: Annotated[int, "With --text: tokens of a window."] = 512
    output_dir: Annotated[Path | None, "Gets the network, masks, report and settings."] = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Own:
        """From a file and flags; raises OptionError."""
        hints, made = get_type_hints(cls), {}
        for name in OWN:
            value = values.get(name)
            kind = next(member for member in (*get_args(hints[name]), hints[name]) if isinstance(member, type))
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (str, Path) if kind in (str, Path) else kind):
                raise OptionError(f"{name} must be {'text' if kind in (str, Path) else 'an integer'}, not {value!r}")
            made[name] = kind(value)
        own = cls(**made)
        for one, other in (("model", "hf"), ("data", "text")):
            if getattr(own, one) is not None and getattr(own, other) is not None:
                raise OptionError(f"give one of --{one} and --{other}, not both")
        if own.model is None and own.hf is None:
            raise OptionError(
                "which network? give --model package.module:factory, or --hf FOLDER of a network from transformers"
            )
        if own.data is None and own.text is None:
            raise OptionError("which data? give --data package.module:loader, or with --hf --text FILE")
        if own.text is not None and own.hf is None:
            raise OptionError(
                "--text takes the tokenizer of --hf FOLDER; give --data package.module:loader with --model"
            )
        for name in ("sequences", "sequence_length"):
            if getattr(own, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(own, name)}")
        return own

    def plain(self) -> dict[str, Any]:
        """What is set, as files keep it."""
        values = {name: getattr(self, name) for name in OWN}
        if self.text is None:
            values = {name: value for name, value in values.items() if not name.startswith("sequence")}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items() if v is not None}


#: Names of the command's own options.
OWN = tuple(field.name for field in fields(Own))
#: Options of a run, which files do not set: type, default, help.
_RUN: dict[str, tuple[Any, Any, str]] = {
    "config": (Path | None, None, "Settings from a TOML file; flags take precedence."),
    "dry_run": (bool, False, "Say what would be done, and what it takes, and change nothing."),
    "resume": (bool, False, "Go on where the folder's run was interrupted; nothing to do if it is finished."),
    "overwrite": (bool, False, "Replace what is in the folder."),
    "json": (bool, False, "One JSON document instead of tables, errors too."),
}


def signature() -> inspect.Signature:
    """The command's own options, those of a run, and the settings, each group in a panel."""
    panel, hints = "Network and data", get_type_hints(Own, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    made = []
    for field in fields(Own):
        kind, text = get_args(hints[field.name])
        kind = kind if field.default is None else kind | None
        shown = "" if field.default is None else f" [default: {field.default}]"
        option = typer.Option(help=(text + shown).replace("[", r"\["), rich_help_panel=panel)
        made.append(inspect.Parameter(field.name, keyword, default=None, annotation=Annotated[kind, option]))
    for name, (kind, default, text) in _RUN.items():
        flag = f"--{name.replace('_', '-')}"
        option = typer.Option(flag, help=text, rich_help_panel="Run")
        made.append(inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option]))
    return inspect.Signature([*made, *(_parameter(setting, keyword) for setting in settings())])


def _parameter(setting: Setting, keyword: Any) -> inspect.Parameter:
    kind: Any = bool | None if setting.kinds == (bool,) else list[str] | None if setting.several else str | None
    metavar = None if setting.kinds == (bool,) else "|".join(k.__name__.upper() for k in setting.kinds)
    default = setting.default if setting.kinds and isinstance(setting.default, (bool, int, float, str)) else None
    shown = "" if default is None or default == "" else f" [default: {getattr(default, 'value', default)}]"
    option = typer.Option(
        *setting.flags,
        help=(setting.help.replace("``", "").replace("`", "") + shown).replace("[", r"\["),
        metavar=metavar,
        rich_help_panel=f"{setting.group}" if setting.group else "Settings of cbs_opt.prune",
    )
    return inspect.Parameter(setting.key, keyword, default=None, annotation=Annotated[kind, option])
