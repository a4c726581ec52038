"""What an experiment is: a network, a data set, and the settings its paper used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cbs_opt import FisherOptions, StageOptions
from experiments.networks.training import Recipe


@dataclass(frozen=True)
class Phase:
    """Some stages of a table's path with the same options.

    Attributes
    ----------
    levels
        (sparsity, stages at it): the first of these stages removes weights, the others polish.
    regrow
        As in `cbs_opt.StageOptions`.
    """

    levels: tuple[tuple[float, int], ...]
    regrow: float = 0.0

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsity after each stage."""
        return tuple(level for level, count in self.levels for _ in range(count))


@dataclass(frozen=True)
class StagedTable:
    """How ``experiments.tables`` measures a network: one nested path of stages per seed, most sparse last.

    A network on its way to 98 % passes 90 %. So one path gives the whole table: it stops at each sparsity of the table
    for some polishing stages, the state at the end of which is the table's entry, and goes on from there.

    Attributes
    ----------
    phases
        One after the other.
    reported
        Sparsities of the table.
    solver
    bfloat16
        Whether the network runs in bfloat16 for gradients and held-out losses (never for the reported accuracy).
    """

    phases: tuple[Phase, ...]
    reported: tuple[float, ...]
    solver: str = "obs[chunks=2,pool=0]"
    bfloat16: bool = False


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
    sha256
        Of the published file of that name, where there is one; another is loaded, and said to be another.
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
    table
        The path of stages through all sparsities of a table, where there is one.
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
    table: StagedTable | None = None
    reference: bool = False
    stale_batch_norm: bool = False
    sha256: str = ""
