"""What ``cbs-opt prune --dry-run`` shows."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cbs_opt.engine.outline import Outline
from cbs_opt.engine.setup import Setup


def show(found: Outline, setup: Setup, console: Console) -> None:
    """Print an outline."""
    layers = found.layers
    table = Table()
    for heading in ("layer", "kind", "shape", "weights"):
        table.add_column(heading, justify="right" if heading == "weights" else "left")
    for layer in layers:
        table.add_row(Text(layer.name), layer.kind, " × ".join(map(str, layer.shape)), f"{layer.n:,}")
    console.print(table)
    about = "about " if found.budget else ""
    memory = found.estimate
    blocks = f"{len(found.blocks)}, the largest of {max(found.blocks):,} weights" if found.blocks else "none known yet"
    lines = [
        f"{layers.n:,} prunable weights in {len(layers)} layers; nothing was changed",
        f"budget: {about}{found.n_kept:,} weights stay, {about}{1.0 - found.n_kept / layers.n:.2%} go"
        + (f" ({found.budget})" if found.budget else ""),
        f"whole network: {layers.n_model:,} parameters",
        f"curvature: {setup.curvature}; blocks: {blocks}",
        f"memory on {setup.place}: at least {memory.total / 1e6:,.1f} MB of {memory.available / 1e6:,.0f} MB: "
        + ", ".join(f"{what} {size / 1e6:,.1f} MB" for what, size in memory.memory.items()),
        f"time: about {memory.seconds:,.1f} s for {found.measuring}" if memory.seconds else "time: nothing is measured",
        *([f"fine-tuning: {found.training}, whose time is not counted"] if found.training else []),
        *(f"skipped: {skip.name} {skip.shape}: {skip.reason}" for skip in layers.skipped),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
