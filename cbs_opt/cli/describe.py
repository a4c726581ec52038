"""``cbs-opt describe NAME``: one solver in full."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from cbs_opt.cli.shell import print_json, wide_console
from solvers import describe


def command(
    name: Annotated[str, typer.Argument(help="As cbs-opt solvers lists it.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Say what a solver does, needs and guarantees, and its options."""
    found = describe(name)
    if json:
        print_json({**asdict(found), "available": found.available})
        return
    wide_console().print(Text(str(found)), soft_wrap=True)
