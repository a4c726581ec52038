"""Instances as a table: the best value known, how far from proven it is, and whose work that was."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.reports.gaps import percent
from solvers.instances import Claim, Instance

_COLUMNS = {
    "instance": lambda one: one.name,
    "best value": lambda one: f"{one.best:.10g}",
    "gap": lambda one: "proven" if one.proven else percent(one.gap),
    "found by": lambda one: _claim(one.found),
    "bound by": lambda one: _claim(one.bounded),
    "seconds": lambda one: "" if one.bounded is None else f"{one.bounded.seconds:.3g}",
}


def _claim(claim: Claim | None) -> str:
    return "" if claim is None else claim.solver.split("[")[0]


def instances_table(instances: Iterable[Instance]) -> Table:
    """For the terminal."""
    table = Table(box=SIMPLE_HEAD)
    for heading in _COLUMNS:
        table.add_column(heading, no_wrap=True)
    for one in instances:
        table.add_row(*(escape(cell(one)) for cell in _COLUMNS.values()))
    return table


def instances_markdown(instances: Iterable[Instance]) -> str:
    """A Markdown table of them, a line for each block and objective."""
    shares: dict[tuple[str, str], list[Instance]] = {}
    for one in instances:
        shares.setdefault((one.block, one.objective), []).append(one)
    most = max(map(len, shares.values()), default=0)
    lines = ["| block | objective |" + " removed: best value, proof |" * most, "|" + " --- |" * (2 + most)]
    for (block, objective), some in shares.items():
        cells = [f"{one.n_prune}: {one.best:.10g}, {_proof(one)}" for one in some]
        lines.append(f"| {' | '.join([block, objective, *cells])} |")
    return "\n".join(lines) + "\n"


def _proof(one: Instance) -> str:
    if one.bounded is None:
        return "no bound"
    return f"{one.bounded.seconds:.3g} s" if one.proven else f"**gap {percent(one.gap)}**"
