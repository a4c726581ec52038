"""``cbs-opt``: the program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import cbs_opt
from cbs_opt.cli import describe, doctor, export, inspect, listing, prune
from cbs_opt.cli.shell import run_app

app = typer.Typer(
    name="cbs-opt",
    help="Prune networks with the combinatorial brain surgeon.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"cbs-opt {cbs_opt.__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def _program(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say it.")] = False,
) -> None:
    pass


for name, module in {
    "prune": prune,
    "inspect": inspect,
    "export": export,
    "solvers": listing,
    "describe": describe,
    "doctor": doctor,
}.items():
    app.command(name, help=module.command.__doc__)(module.command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit; see `cbs_opt.cli.shell` for the codes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run_app(app, given or ["--help"], name="cbs-opt")
