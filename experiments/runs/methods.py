"""The rows of a table of solvers (see `SolverTable`): those of `experiments.run`, on a network that is opened once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.networks import Network
from experiments.networks.experiment import Method, SolverTable
from experiments.networks.load import Source
from experiments.runs.bench import Listener
from experiments.runs.options import ChoiceOptions, CurvatureOptions, NetworkOptions, RunOptions, SweepOptions
from experiments.runs.rows import ResultsFile
from experiments.runs.sweep import Sweep


def method_rows(
    network: Network,
    table: SolverTable,
    source: Source,
    seeds: Sequence[int],
    results: ResultsFile,
    listener: Listener,
    until: float = 1.0,
) -> Iterator[tuple[Method, dict[str, Any]]]:
    """Every row with its method, one seed after the other; those in the file already are not made again."""
    sparsities = tuple(sparsity for sparsity in table.reported if sparsity <= until)
    for seed in seeds if sparsities else ():
        for method in table.methods:
            options = RunOptions(
                network=NetworkOptions(network.experiment.name),
                source=source,
                curvature=CurvatureOptions(table.curvature),
                sweep=SweepOptions((method.solver,), sparsities, seed=(seed,), update=(method.update,)),
                choice=ChoiceOptions(allocation=method.allocation, refit=False),
            )
            for row in Sweep(options, results, listener, network=network).run():
                yield method, row
