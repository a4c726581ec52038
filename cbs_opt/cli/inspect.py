"""``cbs-opt inspect DIR``: what is in a folder of a pruned network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cbs_opt.cli.shell import print_json, wide_console
from cbs_opt.report import folders


def command(
    folder: Annotated[Path, typer.Argument(help="That cbs-opt prune, or result.save, wrote.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Show the report of a pruned network, and how it was made; every file is held against its digest."""
    saved = folders.read(folder)
    header = {key: saved.header[key] for key in ("versions", "files")}
    network = saved.header["network"]["class"]
    if json:
        print_json({"network": network, **header, "settings": saved.settings, "report": saved.report.as_dict()})
        return
    console = wide_console()
    console.print(saved.report)
    given = {key: value for key, value in saved.settings.items() if value is not None and key != "command"}
    console.print(
        Text(
            f"network: {network}\n"
            f"settings: {', '.join(f'{key} = {value}' for key, value in given.items())}\n"
            f"made with: {', '.join(f'{name} {number}' for name, number in header['versions'].items())}\n"
            f"files: {', '.join(header['files'])}, all as they were written"
        ),
        soft_wrap=True,
    )
