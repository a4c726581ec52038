"""What all commands share: options which take several values, errors as one line, exit codes.

====  ==================================================================================
0     done
1     something is not as it should be: `doctor` found a solver that does not work
2     bad input, told in one line
130   interrupted
====  ==================================================================================
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from solvers.errors import CBSError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
FILE_WIDTH = 140


def expand_values(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Repeat an option before each of its values: ``--seed 0 1`` becomes ``--seed 0 --seed 1``.

    Click gives an option a fixed number of values; our lists are as long as the user likes. A value ends the
    list where the next option begins; a negative number is a value.

    Parameters
    ----------
    arguments
        As given on the command line.
    options
        Long names of the options which take several values.
    """
    expanded: list[str] = []
    current: str | None = None
    fresh = False
    for i, argument in enumerate(arguments):
        if argument == "--":
            return [*expanded, *arguments[i:]]
        if argument.startswith("-") and not _is_number(argument):
            name, equals, _ = argument.partition("=")
            current = name if name in options else None
            fresh = current is not None and not equals
            expanded.append(argument)
        elif current is not None and not fresh:
            expanded += [current, argument]
        else:
            expanded.append(argument)
            fresh = False
    return expanded


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def wide_console(**options: Any) -> Console:
    """A console which does not cut tables to 80 columns where the output goes to a file."""
    console = Console(**options)
    return console if console.is_terminal else Console(width=max(console.width, FILE_WIDTH), **options)


def print_json(values: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(values, indent=1, allow_nan=False) + "\n")


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run a command and exit: 0 when done, 2 with one line on bad input, 130 when interrupted.

    Parameters
    ----------
    arguments
        Instead of ``sys.argv[1:]``.
    name
        Of the program, in its help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = typer.main.get_command(app)
        several = {option for p in _parameters(command) if getattr(p, "multiple", False) for option in p.opts}
        outcome = command(expand_values(given, several), prog_name=name, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(EXIT_INTERRUPTED)
    except CBSError as error:
        _refuse(error, str(error), "--json" in given)
    except Exception as error:
        # What click raises for options that do not exist; its class is private to typer in some versions.
        if not hasattr(error, "format_message"):
            raise
        _refuse(error, error.format_message(), "--json" in given)
    sys.exit(outcome if isinstance(outcome, int) else 0)


def _refuse(error: Exception, message: str, as_json: bool) -> None:
    line = " ".join(message.split())
    if as_json:
        print_json({"error": line, "type": type(error).__name__})
    Console(stderr=True).print(Text(f"error: {line}", style="red"), soft_wrap=True)
    sys.exit(EXIT_BAD_INPUT)


def _parameters(command: Any) -> Iterator[Any]:
    """Of a command and those under it."""
    yield from command.params
    for part in getattr(command, "commands", {}).values():
        yield from _parameters(part)
