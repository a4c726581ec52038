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
    found: bool = False,
) -> Iterator[tuple[Method, dict[str, Any]]]:
    """Every row with its method, one seed after the other; those in the file already are not made again.

    `found` makes none.
    """
    followed = {method.undistilled for method in table.methods if method.distill is not None}
    for seed in seeds:
        for method in table.methods:
            options = RunOptions(
                network=NetworkOptions(network.experiment.name),
                source=source,
                curvature=CurvatureOptions(table.curvature),
                sweep=SweepOptions((method.solver,), table.reported, seed=(seed,), update=(method.update,)),
                choice=_choice(method),
                save_networks=method.distill is None and method.undistilled in followed,
            )
            sweep = Sweep(options, results, listener, network=network)
            for row in sweep.found() if found else sweep.run():
                yield method, row


def _choice(method: Method) -> ChoiceOptions:
    done = method.distill
    if done is None:
        return ChoiceOptions(allocation=method.allocation, refit=False)
    return ChoiceOptions(
        allocation=method.allocation,
        refit=False,
        distill=done.steps,
        distill_lr=done.lr,
        distill_loss=done.loss,
        distill_batch=done.batch_size,
        distill_parameters=done.parameters,
    )
