"""Options of a command in groups: a parameter whose type is a dataclass becomes an option for each of its fields.

So a group is written once, as a dataclass, and its names are the same in Python, on the command line and in files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

Parameter = inspect.Parameter


def grouped(app: typer.Typer, called: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of an app, its groups of options spread out; returns it unchanged.

    A field is annotated with its help, ``Annotated[int, "Rows of the factor."]``, and with its name where that is not
    its own; a field of type ``tuple[T, ...]`` takes several values. Other parameters are what typer makes of them.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        flat: list[Parameter] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if name in groups:
                flat += _options(groups[name])
            else:
                flat.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

        def command(**given: Any) -> None:
            made = {
                name: group(**{f.name: _tuple(given.pop(f.name)) for f in fields(group)})
                for name, group in groups.items()
            }
            function(**made, **given)

        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
        app.command(called, help=function.__doc__)(command)
        return function

    return register


def _options(group: Any) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    panel = (group.__doc__ or "").split("\n")[0].rstrip(".")
    for field in fields(group):
        kind, text, *name = get_args(hints[field.name])
        if get_origin(kind) is tuple:
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=list(default) if isinstance(default, tuple) else default,
            annotation=Annotated[kind, typer.Option(*name, help=text.replace("[", r"\["), rich_help_panel=panel)],
        )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
