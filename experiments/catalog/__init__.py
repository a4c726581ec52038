"""The experiments by name."""

from __future__ import annotations

from experiments.catalog.cifarnet import CIFARNET
from experiments.catalog.digits import DIGITS
from experiments.catalog.experiment import Experiment
from experiments.catalog.mlpnet import MLPNET
from experiments.catalog.resnet20 import RESNET20
from solvers.errors import UnknownNameError

EXPERIMENTS: dict[str, Experiment] = {e.name: e for e in (DIGITS, MLPNET, RESNET20, CIFARNET)}
DEFAULT = DIGITS.name

__all__ = ["DEFAULT", "EXPERIMENTS", "Experiment", "get_experiment"]


def get_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises
    ------
    UnknownNameError
        Nobody knows it; the message names the closest.
    """
    try:
        return EXPERIMENTS[name]
    except KeyError:
        raise UnknownNameError.of("experiment", name, EXPERIMENTS) from None
