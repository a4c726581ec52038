"""What an experiment is: a network, a data set, what it is judged by, and the settings its paper used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from cbs_opt import Distill, FisherOptions, StageOptions
from experiments.networks.criterion import Criterion
from experiments.networks.evaluation import ACCURACY
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
    seeds
        A path for each, unless others are asked for.
    """

    phases: tuple[Phase, ...]
    reported: tuple[float, ...]
    solver: str = "obs[chunks=2,pool=0]"
    bfloat16: bool = False
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Method:
    """A line of a table of solvers: what `experiments.run` is asked for, and how it is called in the table.

    Attributes
    ----------
    label
    solver, update, allocation
        As on the command line.
    distill
        What comes after.
    """

    label: str
    solver: str
    update: str
    allocation: str | None = None
    distill: Distill | None = None

    @property
    def undistilled(self) -> Method:
        """What it goes on from, but for its label."""
        return replace(self, label="", distill=None)


@dataclass(frozen=True)
class Comparison:
    """Some methods side by side, and what they show."""

    title: str
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class SolverTable:
    """How ``experiments.tables`` measures a network that is pruned at one go: a line per method.

    Attributes
    ----------
    parts
        A table each; methods may be in several.
    reported
        Sparsities of the tables.
    curvature
    seeds
        Of the calibration samples, unless others are asked for.
    """

    parts: tuple[Comparison, ...]
    reported: tuple[float, ...]
    curvature: str = "layer_inputs"
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Each once; those that are distilled follow those they go on from."""
        found = dict.fromkeys(method for part in self.parts for method in part.methods)
        first = {method.undistilled: number for number, method in reversed(list(enumerate(found)))}
        return tuple(sorted(found, key=lambda method: (first[method.undistilled], method.distill is not None)))


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


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A network on a data set; each kind of network has its own class below or beside.

    Attributes
    ----------
    name, summary
        What it is called on the command line, and one line about it.
    dataset
        Its name.
    checkpoint
        File or folder of the trained weights, beside the data or in the cache.
    criterion
        What the network is judged by.
    include, exclude
        Patterns of the layers which are pruned.
    sparsities
        Of the paper's table.
    fisher
        The quadratic model of one shot, as in the paper; its rows are the samples of layer-wise curvature.
    curvature
        What is measured, unless something else is asked for.
    least_samples
        Fewest calibration samples which the loss and the rows of a Fisher are taken from.
    table
        The path of stages through all sparsities of a table, or its solvers, where there is one.
    reference
        Whether magnitude pruning is so quick that it is shown without being asked for.
    """

    name: str
    summary: str
    dataset: str
    checkpoint: str
    criterion: Criterion
    sparsities: tuple[float, ...]
    fisher: FisherOptions
    curvature: str = "fisher"
    least_samples: int = 5_000
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    table: StagedTable | SolverTable | None = None
    reference: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageExperiment(Experiment):
    """A classifier of images that is written down and trained here.

    Attributes
    ----------
    model
        Makes an untrained network.
    sha256
        Of the published file of that name, where there is one; another is loaded, and said to be another.
    recipe
        How the weights are trained where there are none.
    train_on_demand
        Whether ``experiments.run`` trains without being asked; false where that takes hours on a CPU.
    staged
        What replaces `fisher` in several stages.
    stale_batch_norm
        Whether the published checkpoint's statistics must be estimated anew before anything else.
    """

    model: Callable[[], nn.Module]
    recipe: Recipe
    train_on_demand: bool
    staged: StageDefaults
    criterion: Criterion = ACCURACY
    stale_batch_norm: bool = False
    sha256: str = ""
