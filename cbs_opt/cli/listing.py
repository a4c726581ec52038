"""``cbs-opt solvers``: all solvers in a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from cbs_opt.cli.shell import print_json, wide_console
from solvers import available_solvers, describe


def command(json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False) -> None:
    """List the solvers: what each does, proves and takes."""
    found = [describe(name) for name in available_solvers()]
    if json:
        print_json([{**asdict(solver), "available": solver.available} for solver in found])
        return
    table = Table()
    for heading in ("solver", "what it does", "can", "budgets", "here"):
        table.add_column(heading)
    for solver in found:
        here = "yes" if solver.available else f"needs {', '.join(solver.missing)}"
        cells = (solver.name, solver.summary, ", ".join(solver.capabilities), ", ".join(solver.budgets), here)
        table.add_row(*(Text(cell) for cell in cells))
    wide_console().print(table)
