"""``python -m experiments.instances``: the instances of the package: listed, exported, cut anew, proven."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from cbs_opt.cli.shell import wide_console
from experiments.commands.grouping import grouped
from experiments.networks.load import Source
from experiments.reports.instances import instances_markdown, instances_table
from experiments.runs.instances import FAMILIES, ProofOptions, cut_instances, export_instances, improve, matching
from solvers import load_instance
from solvers.instances import FOLDER, read_instances

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
console = wide_console()

Folder = Annotated[Path, typer.Option(help="Where the blocks and their records lie; default: in the package.")]


def _say(message: str) -> None:
    console.print(message, soft_wrap=True, highlight=False, markup=False)


@grouped(app, "cut")
def cut(
    source: Source,
    family: Annotated[list[str], typer.Option(help=f"Networks: {', '.join(FAMILIES)}.")] = list(FAMILIES),
    seed: Annotated[int, typer.Option(min=0, help="Of the samples and places.")] = 5,
    folder: Folder = FOLDER,
) -> None:
    """Cut the blocks again, in place of those that are there; what was proven of others is no longer true."""
    cut_instances(family, folder, source=source, seed=seed, say=_say)


@grouped(app, "prove")
def prove(proof: ProofOptions, folder: Folder = FOLDER) -> None:
    """Try to improve what is known of instances: better masks, higher bounds."""
    found = {one.name: one for one in improve(folder, proof, _say)}
    _say(f"{len(found)} instances, {sum(one.proven for one in found.values())} of them proven now")


@app.command("export")
def export(
    directory: Annotated[Path, typer.Argument(help="Gets a file for each, and index.csv with their best values.")],
    pattern: Annotated[list[str], typer.Option("--instances", help="Names, as patterns; default: all.")] = ["*"],
    format: Annotated[str, typer.Option(help="lp, mps or qplib.")] = "lp",
    scaled: Annotated[
        bool,
        typer.Option(
            "--scaled", help="Multiply each objective by the power of two that makes its best value 500 to 1,000."
        ),
    ] = False,
) -> None:
    """Write instances as files for MIQP solvers: see docs/instances.md for what is in them."""
    chosen = [load_instance(name) for name in matching(pattern)]
    index = export_instances(chosen, directory, format, scaled=scaled)
    _say(f"{len(chosen)} files and what is known of them: {index}")


@app.command("list")
def listing(
    pattern: Annotated[str, typer.Argument(help="Names, as file names match: 'mlpnet-*-joint-*'.")] = "*",
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/measured/instances.md has it.")] = False,
    folder: Folder = FOLDER,
) -> None:
    """Show instances with the best value known, the gap, and who proved it."""
    some = [one for one in read_instances(folder).values() if fnmatchcase(one.name, pattern)]
    if markdown:
        _say(instances_markdown(some).rstrip())
        return
    console.print(instances_table(some))
    _say(f"{len(some)} instances, {sum(one.proven for one in some)} of them proven")
