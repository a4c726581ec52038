"""``python -m experiments.rules``: every published rule as one combination of curvature, budget and solver.

Each rule of `experiments.runs.rules` prunes one layer of a network alone, and the network; rows are kept and not made
again, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import cbs_opt
from cbs_opt.cli.shell import wide_console
from experiments.commands.grouping import grouped
from experiments.networks import DEFAULT, get_experiment
from experiments.networks.load import Source, open_network
from experiments.reports.display import RunDisplay
from experiments.reports.rule_table import rule_table
from experiments.reports.staged_table import command, write_text
from experiments.runs.bench import Listener
from experiments.runs.rows import ResultsFile
from experiments.runs.rules import RULES, chosen_rules, rule_rows
from solvers.errors import OptionError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@grouped(app)
def main(
    source: Source,
    experiment: Annotated[str, typer.Option(help="Whose network.")] = DEFAULT,
    layer: Annotated[str | None, typer.Option(help="Pruned alone; default: the largest.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help=f"Only these of: {', '.join(r.name for r in RULES)}.")] = None,
    sparsity: Annotated[float, typer.Option(help="Share of the weights removed.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the calibration sample and the solvers.")] = 0,
    samples: Annotated[int | None, typer.Option(help="Calibration samples; default: the experiment's.")] = None,
    layer_only: Annotated[bool, typer.Option("--layer-only", help="Leave the network as a whole out.")] = False,
    output_dir: Annotated[Path, typer.Option(help="Gets results.jsonl and table.md.")] = Path("rules"),
) -> None:
    """Run every published rule on one layer and on one network, and write a table."""
    chosen, console, rules = get_experiment(experiment), wide_console(), chosen_rules(rule or ())
    results = ResultsFile(output_dir.expanduser())

    def say(message: str) -> None:
        console.print(message, soft_wrap=True, markup=False, highlight=False)

    network = open_network(chosen, source, say)
    layers = cbs_opt.find_layers(network.model, include=chosen.include or ("*",), exclude=chosen.exclude)
    alone = layer or max(layers, key=lambda found: found.n).name
    if alone not in layers.names:
        raise OptionError(f"{experiment} has no layer {alone!r}; give one of {', '.join(layers.names)}")
    scopes = (alone,) if layer_only else (alone, "")
    title = f"{experiment}, {sparsity:.0%} removed: published rules, one combination each"
    path, rows, text = results.folder / "table.md", [], ""
    with RunDisplay(console, len(scopes) * len(rules)) as display:
        listener = Listener(display.say, display.working, display.finished)
        for found in rule_rows(network, scopes, rules, sparsity, seed, samples, source, results, listener):
            rows.append(found)
            text = rule_table(title, chosen.criterion.metric, network.dense, rows, command("rules"))
            write_text(path, text)
    say(text)
    say(f"rows: {results.path}\ntable: {path}")
