"""Published rules in the words of this package, each run as it was published: on one layer alone, and on a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.networks import Network
from experiments.networks.load import Source
from experiments.runs.bench import Listener
from experiments.runs.options import ChoiceOptions, CurvatureOptions, NetworkOptions, RunOptions, SweepOptions
from experiments.runs.rows import ResultsFile
from experiments.runs.sweep import Sweep
from solvers.errors import UnknownNameError


@dataclass(frozen=True)
class Rule:
    """A pruning rule: what is measured, what shares the budget, what chooses, what becomes of the kept weights.

    Attributes
    ----------
    name, source
    curvature : {"fisher", "layer_inputs", "kfac"}
    solver, update : str
    allocation : str, optional
        Within and between layers; None: one budget over all weights, or, layer by layer, equal shares of the layers
        (`kfac`: one threshold).
    """

    name: str
    source: str
    curvature: str
    solver: str
    update: str
    allocation: str | None = None

    @property
    def budget(self) -> str:
        """How the weights that go are shared out, in words."""
        shared = "all weights" if self.curvature == "fisher" else "each layer"
        named = {"rows": "each row", "magnitude": "layers by magnitude"}
        usual = "layers by loss" if self.curvature == "kfac" else shared
        return usual if self.allocation is None else named[self.allocation]


RULES = (
    Rule("magnitude", "Han et al., 2015", "fisher", "magnitude", "none"),
    Rule("Optimal Brain Damage", "LeCun et al., 1989", "fisher", "obd", "none"),
    Rule("WoodFisher", "Singh and Alistarh, 2020", "fisher", "woodfisher", "single"),
    Rule("CBS", "Yu et al., 2022", "fisher", "greedy_ls", "combinatorial"),
    Rule("CHITA", "Benbaki et al., 2023", "fisher", "iht", "combinatorial"),
    Rule("joint swaps", "this package", "fisher", "joint_ls", "combinatorial"),
    Rule("Wanda", "Sun et al., 2024", "layer_inputs", "obd", "none", "rows"),
    Rule("SparseSwaps", "Zimmer et al., 2025", "layer_inputs", "best_swap", "none", "rows"),
    Rule("SparseGPT", "Frantar and Alistarh, 2023", "layer_inputs", "sweep", "own"),
    Rule("Optimal Brain Compression", "Frantar et al., 2022", "layer_inputs", "obs", "combinatorial"),
    Rule("ALPS", "Meng et al., 2024", "layer_inputs", "admm", "combinatorial"),
    Rule("joint swaps in rows", "this package", "layer_inputs", "joint_ls[start=admm]", "combinatorial"),
    Rule("joint swaps, K-FAC", "this package", "kfac", "joint_ls[start=admm]", "combinatorial"),
)


def rule_rows(
    network: Network,
    scopes: Sequence[str],
    rules: Sequence[Rule],
    sparsity: float,
    seed: int,
    samples: int | None,
    source: Source,
    results: ResultsFile,
    listener: Listener,
) -> Iterator[tuple[str, Rule, dict[str, Any]]]:
    """(layer, rule, row): rules on the network ("") or on one of its layers; rows that are there are not made again."""
    for scope in scopes:
        for rule in rules:
            options = RunOptions(
                network=NetworkOptions(network.experiment.name, include=(scope,) if scope else ()),
                source=source,
                curvature=CurvatureOptions(rule.curvature, fisher_samples=samples),
                sweep=SweepOptions((rule.solver,), (sparsity,), seed=(seed,), update=(rule.update,)),
                choice=ChoiceOptions(allocation=rule.allocation, refit=True),
            )
            for row in Sweep(options, results, listener, network=network).run():
                yield scope, rule, row


def chosen_rules(names: Sequence[str]) -> tuple[Rule, ...]:
    """All rules, or those named; raises UnknownNameError."""
    found = {rule.name: rule for rule in RULES}
    for name in names:
        if name not in found:
            raise UnknownNameError.of("rule", name, tuple(found))
    return tuple(found[name] for name in names) or RULES
