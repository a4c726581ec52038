"""What an experiment is: a network, a data set, and the settings its paper used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cbs_opt import FisherOptions, StageOptions
from experiments.training import Recipe


@dataclass(frozen=True)
class StageDefaults:
    """How a network is pruned in stages, chosen on held-out training images.

    Attributes
    ----------
    fisher
        The quadratic model of each stage: means over batches and more damping than one shot has.
    options
        Everything else, but for the stages themselves.
    """

    fisher: FisherOptions
    options: StageOptions


@dataclass(frozen=True)
class Experiment:
    """A network on a data set.

    Attributes
    ----------
    name, summary
        What it is called on the command line, and one line about it.
    model
        Makes an untrained network.
    dataset
        Name for `experiments.datasets.load_dataset`.
    checkpoint
        File name of the trained weights, beside the data or in the cache.
    recipe
        How the weights are trained where there are none.
    train_on_demand
        Whether ``experiments.run`` trains without being asked; false where that takes hours on a CPU.
    include, exclude
        Patterns of the layers which are pruned.
    sparsities
        Of the paper's table.
    fisher
        The quadratic model of one shot, as in the paper.
    staged
        What replaces it in several stages.
    reference
        Whether magnitude pruning is so quick that it is shown without being asked for.
    stale_batch_norm
        Whether the published checkpoint's statistics must be estimated anew before anything else.
    """

    name: str
    summary: str
    model: Callable[[], nn.Module]
    dataset: str
    checkpoint: str
    recipe: Recipe
    train_on_demand: bool
    sparsities: tuple[float, ...]
    fisher: FisherOptions
    staged: StageDefaults
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    reference: bool = False
    stale_batch_norm: bool = False
