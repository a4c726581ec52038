"""``python -m experiments.scaling``: how the time of layer-wise pruning grows with tokens, width and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cbs_opt.cli.shell import wide_console
from experiments.reports.scaling import write_scaling
from experiments.reports.staged_table import write_text
from experiments.runs.scaling import scaling_rows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
#: With their updates.
SOLVERS = {"sweep": "own", "admm": "combinatorial"}


@app.command()
def main(
    sparsity: Annotated[float, typer.Option(help="Share of the weights removed.")] = 0.6,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each size, of which the fastest counts.")] = 2,
    output_dir: Annotated[Path, typer.Option(help="Gets scaling.jsonl, scaling.md and scaling.png.")] = Path("scaling"),
) -> None:
    """Time the pruning of networks of several sizes, layer by layer, and plot how it grows."""
    console, folder = wide_console(), output_dir.expanduser()

    def told(row: dict[str, Any]) -> None:
        console.print(
            f"{row['tokens']:,} tokens, width {row['width']}, {row['layers']} layers, {row['solver']}: "
            f"{row['seconds']:.2f} s, of which choosing {row['seconds_choose']:.2f}",
            soft_wrap=True,
            highlight=False,
        )

    write_text(folder / "scaling.jsonl", "")
    rows = list(scaling_rows(SOLVERS, sparsity, repeats, told))
    write_text(folder / "scaling.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    text = write_scaling(folder, rows)
    write_text(folder / "scaling.md", text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"plot: {folder / 'scaling.png'}", soft_wrap=True, highlight=False)
