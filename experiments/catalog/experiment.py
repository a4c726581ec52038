"""What an experiment is: a network, a data set, and the settings its paper used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from experiments.training import Recipe


@dataclass(frozen=True)
class StageDefaults:
    """The quadratic model of each stage where ``--stages`` asks for several: means over batches and more damping.

    Attributes
    ----------
    samples, batch, damping
        As ``fisher_samples``, ``fisher_batch`` and ``damping`` of `Experiment`; the stages search the damping from
        there.
    """

    samples: int
    batch: int
    damping: float


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
    fisher_samples, fisher_batch
        Rows of the factor, and images averaged into each.
    damping
        Added to the diagonal of the Fisher matrix.
    blocks
        Partition of the weights into Fisher blocks.
    staged
        What replaces samples, batch and damping in several stages.
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
    fisher_samples: int
    fisher_batch: int
    damping: float
    blocks: str
    staged: StageDefaults
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    reference: bool = False
    stale_batch_norm: bool = False
