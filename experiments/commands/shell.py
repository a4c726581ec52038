"""What the commands share: options which take several values, errors as one line, where calls are carried out."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import joblib
import typer
from rich.console import Console

from solvers.errors import CBSError, OptionError

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


def wide_console() -> Console:
    """A console which does not cut tables to 80 columns where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, FILE_WIDTH))


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 when done, 2 with one line on bad input, 130 when interrupted.

    Parameters
    ----------
    arguments
        Instead of ``sys.argv[1:]``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        several = {name for p in typer.main.get_command(app).params if p.multiple for name in p.opts}
        app(expand_values(given, several))
    except CBSError as error:
        Console(stderr=True).print(
            f"error: {' '.join(str(error).split())}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(EXIT_INTERRUPTED)


def on_backend(backend: str | None) -> AbstractContextManager[object]:
    """Where the calls of `experiments.runs.parallel.completed` go: None is this process, the rest are joblib's names.

    Parameters
    ----------
    backend
        ``dask`` takes the scheduler in ``DASK_SCHEDULER_ADDRESS``, ``ray`` the cluster in ``RAY_ADDRESS``.

    Raises
    ------
    OptionError
        The backend is unknown, or its library is not installed.
    """
    if backend is None:
        return nullcontext()
    try:
        if backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        host = {"scheduler_host": os.environ.get("DASK_SCHEDULER_ADDRESS")} if backend == "dask" else {}
        return joblib.parallel_config(backend=backend, **host)
    except (ImportError, ValueError) as error:
        raise OptionError(f"--backend {backend}: {error}; leave it out to stay on this machine") from error
