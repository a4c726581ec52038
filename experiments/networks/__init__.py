"""The networks of the literature: each with its training, its settings and where its trained weights are."""

from __future__ import annotations

from experiments.networks.cifarnet import CIFARNET, CIFARNet
from experiments.networks.digits import DIGITS, DigitsMLP
from experiments.networks.efficientnet_lite0 import EFFICIENTNET_LITE0, EfficientNetLite0
from experiments.networks.experiment import Experiment, ImageExperiment
from experiments.networks.load import Network, load_network
from experiments.networks.minilm import MINILM
from experiments.networks.mlpnet import MLPNET, MLPNet
from experiments.networks.resnet20 import RESNET20, ResNet20
from experiments.networks.smollm2 import SMOLLM2
from solvers.errors import UnknownNameError

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for e in (DIGITS, MLPNET, RESNET20, CIFARNET, EFFICIENTNET_LITE0, SMOLLM2, MINILM)
}
DEFAULT = DIGITS.name

__all__ = [
    "DEFAULT",
    "EXPERIMENTS",
    "CIFARNet",
    "DigitsMLP",
    "EfficientNetLite0",
    "Experiment",
    "ImageExperiment",
    "MLPNet",
    "Network",
    "ResNet20",
    "get_experiment",
    "load_network",
]


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
