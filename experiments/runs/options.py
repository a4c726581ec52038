"""What a run is asked to do: groups of options, and what `cbs_opt` makes of them.

Each group is a dataclass whose fields carry their help; the command line shows them, and names are the same there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import cbs_opt
from cbs_opt.engine.choice import Extent
from cbs_opt.engine.setup import LAYERWISE
from cbs_opt.measure.costs import budget_of
from cbs_opt.measure.fisher import DEFAULT_ROWS
from experiments.networks import DEFAULT, EXPERIMENTS, Experiment, ImageExperiment, get_experiment
from experiments.networks.load import Source
from solvers.bounds import METHODS
from solvers.errors import OptionError, UnknownNameError

#: Solver of a run that names none.
DEFAULT_SOLVER = "greedy_ls"


class Rounding(str, Enum):
    """How a sparsity becomes a number of weights."""

    EXACT = "exact"
    """n_kept = int(n (1 − sparsity))."""
    PUBLISHED = "published"
    """As many as the published CBS code keeps, see `published_kept`."""

    def n_kept(self, n: int, sparsity: float) -> int:
        """Weights which stay of ``n``."""
        return published_kept(n, sparsity) if self is Rounding.PUBLISHED else int(n * (1.0 - sparsity))


def published_kept(n_weights: int, sparsity: float) -> int:
    """How many weights the published CBS code really keeps.

    It permutes the weights, cuts them into chunks of ``c = ceil(n / min(floor(sqrt n), 1000))``, and keeps
    ``ceil(c (1 − sparsity))`` of each full chunk: 3,382 instead of 3,235 of MLPNet's 32,360 at 90 %, and 712 instead
    of 647 at 98 %.
    """
    chunk = -(-n_weights // min(int(n_weights**0.5), 1000))
    # The subtraction is exact to 1e-16; a product which should be whole must not be rounded up.
    per_chunk = -int(-(chunk * (1.0 - sparsity) - 1e-9) // 1)
    return min(n_weights, (n_weights // chunk) * per_chunk)


def _given(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for of it."""
    return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class NetworkOptions:
    """What is pruned."""

    experiment: Annotated[str, f"One of {', '.join(EXPERIMENTS)}."] = DEFAULT
    include: Annotated[tuple[str, ...], "Patterns of the layers to prune."] = ()
    exclude: Annotated[tuple[str, ...], "Patterns of the layers to leave alone."] = ()


@dataclass(frozen=True)
class CurvatureOptions:
    """The quadratic model of the loss."""

    curvature: Annotated[
        str | None,
        "fisher, or layer by layer from the samples of --fisher-samples: layer_inputs or kfac; default: fisher, but "
        "layer_inputs for language models.",
    ] = None
    fisher_samples: Annotated[int | None, "Gradients, rows of the factor; layer by layer, images or windows."] = None
    fisher_batch: Annotated[int | None, "Samples averaged into each gradient."] = None
    row_sampling: Annotated[
        str | None, "Gradients of single samples: importance (of 20 times as many, weighted) or uniform."
    ] = None
    damping: Annotated[float | None, "Added to the diagonal; layer by layer relative to its mean, usually 0.01."] = None
    blocks: Annotated[
        str | None, "Fisher blocks: one, per_layer, per_row, fixed:SIZE, components[:T], clusters:SIZE."
    ] = None
    first_order: Annotated[bool, "Keep the mean gradient in the model."] = False
    gradients: Annotated[
        Path | None, "Folder which keeps what is measured, a sub-folder per seed; what it holds is used again."
    ] = None
    measure_only: Annotated[bool, "Stop when --gradients has been filled."] = False
    in_order: Annotated[
        bool, "Layer by layer: inside a segment too, measure each layer with those before it already pruned."
    ] = False
    towards_dense: Annotated[
        float | None, "Layer by layer: share of the dense network's outputs, 0 to 1, in what layers are fitted to."
    ] = None
    sensitivity: Annotated[
        bool, "Layer by layer: show what pruning each layer alone to the sparsities does, and stop."
    ] = False


@dataclass(frozen=True)
class SweepOptions:
    """What is tried: a row for every combination."""

    solver: Annotated[tuple[str, ...], "Selection rules, e.g. woodfisher 'rmp[draws=10]'; default: greedy_ls."] = ()
    sparsity: Annotated[tuple[float, ...], "Shares of the weights removed; default: those of the paper's table."] = ()
    budget: Annotated[
        tuple[str, ...],
        "Instead of sparsities, or besides: flops:0.5, bytes:0.5 (what may stay), flops:0.5:coupled (of the smaller "
        "network), 2:4, channels:0.5, 4x4:0.5.",
    ] = ()
    masks: Annotated[tuple[Path, ...], "Saved masks which are updated, instead of solvers and sparsities."] = ()
    seed: Annotated[tuple[int, ...], "Of the calibration sample and the solver."] = (0,)
    update: Annotated[tuple[str, ...], "Of the kept weights: none, own, single, combinatorial or searched."] = (
        "combinatorial",
    )
    update_scale: Annotated[tuple[float, ...], "Multiply the update."] = (1.0,)


@dataclass(frozen=True)
class ChoiceOptions:
    """How weights are chosen, in every row."""

    objective: Annotated[str | None, "What the solver minimises: selection or joint; default: what it can."] = None
    stages: Annotated[
        int, "Prune in as many steps, each from gradients anew, with the experiment's settings; a few more polish."
    ] = 1
    allocation: Annotated[
        str | None,
        "Split the budget over blocks instead of sharing it, e.g. uniform; layer by layer also measured, or, to take "
        "what does best on held-out data, best or several with commas.",
    ] = None
    min_kept: Annotated[int | None, "Weights of each layer that stay at least; default 1, 0 sets no floor."] = None
    time_limit: Annotated[float | None, "Seconds for each call of a solver."] = None
    bound: Annotated[
        str | None,
        "Certify each mask by a bound: auto, frank_wolfe, diagonal, qcr or lagrangian; takes minutes on a network.",
    ] = None
    batch_norm: Annotated[
        str, "Statistics of batch norms under the new weights: keep, or reestimate on the calibration images."
    ] = "keep"
    distill: Annotated[
        int | None,
        "Afterwards so many AdamW steps of the kept weights on the calibration data: 32 images or one window a step.",
    ] = None
    distill_lr: Annotated[float | None, "Length of the first of these steps, default 2e-4; it falls to zero."] = None
    distill_batch: Annotated[int | None, "Samples of each of these steps."] = None
    distill_parameters: Annotated[str | None, "What moves: layers (default), or all, with biases and norms."] = None
    distill_loss: Annotated[
        str | None, "kl or mse towards the dense network's outputs (default: kl), or given: the loss itself."
    ] = None
    fine_tune: Annotated[float | None, "Train so many epochs of training images, masks held, after each stage."] = None
    fine_tune_optimizer: Annotated[str | None, "sgd (default), adamw, adam or rmsprop."] = None
    fine_tune_lr: Annotated[float | None, "Its longest step; default: 0.05 for sgd, else 1e-3."] = None
    fine_tune_schedule: Annotated[str | None, "How it falls: cosine (default), linear or constant."] = None
    fine_tune_batch: Annotated[int | None, "Samples of each step; default: 128."] = None
    fine_tune_distill: Annotated[float | None, "Weight of the dense network's outputs in the loss, up to 1."] = None
    fine_tune_precision: Annotated[str | None, "bf16 or, on a GPU, fp16: multiply in 16 bits."] = None
    sparsity_rounding: Annotated[Rounding, "exact, or as many weights as the published code keeps."] = Rounding.EXACT
    shrink: Annotated[
        bool,
        "Of images: count and time a call of the network without the channels that went whole, beside the dense one.",
    ] = False
    refit: Annotated[
        bool | None,
        "Judge every mask by the joint objective too, whatever the update; costs as much as one. Default: yes, but not "
        "layer by layer.",
    ] = None


@dataclass(frozen=True)
class Task:
    """One row to be made; `solver` is the file of the mask where masks are given."""

    solver: str
    sparsity: float
    seed: int
    update: str
    update_scale: float = 1.0
    budget: str = ""

    def __str__(self) -> str:
        limit = f"budget {self.budget}" if self.budget else f"sparsity {self.sparsity:g}"
        return f"{self.solver}, {limit}, seed {self.seed}"


@dataclass(frozen=True)
class RunOptions:
    """A run: every combination of the sweep, the rest in common.

    Raises
    ------
    CBSError
        From the constructor, for the first value which cannot work.
    """

    network: NetworkOptions = NetworkOptions()
    source: Source = Source()
    curvature: CurvatureOptions = CurvatureOptions()
    sweep: SweepOptions = SweepOptions()
    choice: ChoiceOptions = ChoiceOptions()
    save_masks: bool = False
    save_networks: bool = False

    def __post_init__(self) -> None:
        sweep, choice, curvature = self.sweep, self.choice, self.curvature
        for name in ("solver", "sparsity", "budget", "masks", "seed", "update", "update_scale"):
            values = getattr(sweep, name)
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise OptionError(f"--{name.replace('_', '-')} names {next(iter(twice))!r} twice")
        if sweep.masks and (sweep.solver or sweep.sparsity or sweep.budget or self.staged):
            raise OptionError("--masks are chosen already; leave out --solver, --sparsity, --budget and --stages")
        if sweep.budget and (curvature.sensitivity or self.choice.sparsity_rounding is not Rounding.EXACT):
            raise OptionError("--budget is no number of weights; leave --sensitivity and --sparsity-rounding out")
        if curvature.measure_only and curvature.gradients is None:
            raise OptionError("--measure-only needs a folder for what is measured; give --gradients DIR")
        if curvature.gradients is not None and self.staged:
            raise OptionError("stages measure anew at every step; leave --gradients out")
        if (curvature.in_order or curvature.towards_dense is not None) and not self.layerwise:
            raise OptionError(
                "--in-order and --towards-dense are of --curvature layer_inputs and kfac; add one of them"
            )
        if curvature.sensitivity and not self.layerwise:
            raise OptionError("--sensitivity prunes layer by layer; give --curvature layer_inputs or kfac with it")
        if self.layerwise and (self.staged or sweep.masks or curvature.gradients):
            raise OptionError(f"--curvature {self.measured} knows no --stages, --masks and --gradients; leave them out")
        if self.save_networks and not self.layerwise:
            raise OptionError("--save-networks keeps what was pruned layer by layer; leave it out")
        if choice.shrink and not isinstance(self.experiment, ImageExperiment):
            raise OptionError(f"--shrink runs networks on images, and {self.experiment.name} has none; leave it out")
        if choice.stages < 1:
            raise OptionError(f"--stages must be at least 1, got {choice.stages}")
        if self.staged and not isinstance(self.experiment, ImageExperiment):
            raise OptionError(f"{self.experiment.name} has no settings for stages; leave --stages out")
        if choice.bound is not None and choice.bound not in METHODS:
            raise UnknownNameError.of("bound", choice.bound, METHODS)
        if choice.bound is not None and self.staged:
            raise OptionError("--bound judges one problem, and stages solve a new one each; leave one of them out")
        for seed in sweep.seed:
            if seed >= 2**63:
                raise OptionError(f"--seed must be a whole number from 0 to 2^63 - 1, got {seed}")
            self.setup(seed)
        for task in self.tasks:
            self.choice_of(task)

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment of that name."""
        return get_experiment(self.network.experiment)

    @property
    def measured(self) -> str:
        """The kind of curvature."""
        return self.curvature.curvature or self.experiment.curvature

    @property
    def layerwise(self) -> bool:
        """Whether the curvature is measured layer by layer."""
        return self.measured in LAYERWISE

    @property
    def refit(self) -> bool:
        """Whether masks are judged by the joint objective whatever the update."""
        return not self.layerwise if self.choice.refit is None else self.choice.refit

    @property
    def staged(self) -> bool:
        """Whether weights go in several steps."""
        return self.choice.stages > 1

    @cached_property
    def fisher(self) -> cbs_opt.FisherOptions:
        """The experiment's quadratic model with what is asked for instead."""
        experiment = self.experiment
        staged = self.staged and isinstance(experiment, ImageExperiment)
        usual = experiment.staged.fisher if staged else experiment.fisher
        asked = {
            "n_rows": self.curvature.fisher_samples,
            "batch_size": self.curvature.fisher_batch,
            "row_sampling": self.curvature.row_sampling,
            "damping": self.curvature.damping,
            "blocks": self.curvature.blocks,
            "first_order": self.curvature.first_order,
        }
        return replace(usual, **{"n_rows": usual.n_rows or DEFAULT_ROWS, **_given(asked)})

    @cached_property
    def distill(self) -> cbs_opt.Distill | None:
        """What follows the pruning; raises OptionError for details of what was not asked for."""
        choice = self.choice
        asked: dict[str, Any] = {
            "lr": choice.distill_lr,
            "batch_size": choice.distill_batch,
            "parameters": choice.distill_parameters,
            "loss": choice.distill_loss,
        }
        given = _given(asked)
        if choice.distill is None and given:
            raise OptionError("--distill-lr, -batch, -parameters and -loss are of --distill STEPS; add it")
        return None if choice.distill is None else cbs_opt.Distill(choice.distill, **given)

    @cached_property
    def finetune(self) -> cbs_opt.FineTune | None:
        """The training; raises OptionError for details of what was not asked for."""
        choice = self.choice
        asked: dict[str, Any] = {
            "optimizer": choice.fine_tune_optimizer,
            "lr": choice.fine_tune_lr,
            "schedule": choice.fine_tune_schedule,
            "batch_size": choice.fine_tune_batch,
            "distill": choice.fine_tune_distill,
            "mixed_precision": choice.fine_tune_precision,
        }
        given = _given(asked)
        if choice.fine_tune is None and given:
            raise OptionError("--fine-tune-lr and its like are of --fine-tune EPOCHS; add it")
        return None if choice.fine_tune is None else cbs_opt.FineTune(choice.fine_tune, **given)

    @property
    def allocation(self) -> str | tuple[str, ...] | None:
        """The rule, or those of which the best is taken."""
        asked = self.choice.allocation
        return tuple(asked.split(",")) if asked is not None and "," in asked else asked

    @cached_property
    def layer_inputs(self) -> cbs_opt.LayerInputOptions:
        """How layers are measured one by one."""
        usual, asked = cbs_opt.LayerInputOptions(), self.curvature
        return cbs_opt.LayerInputOptions(
            damping=usual.damping if asked.damping is None else asked.damping,
            in_order=asked.in_order,
            towards_dense=usual.towards_dense if asked.towards_dense is None else asked.towards_dense,
        )

    def gradients(self, seed: int) -> Path | None:
        """Folder of what is measured with a seed; None keeps nothing."""
        return None if self.curvature.gradients is None else self.curvature.gradients.expanduser() / f"seed-{seed}"

    def setup(self, seed: int) -> cbs_opt.Setup:
        """The model side of the rows of a seed; no more is measured than one of them needs."""
        weights = self.measured == "fisher" and self.need is Extent.WEIGHTS
        return cbs_opt.Setup(
            fisher=None if self.layerwise else self.fisher,
            curvature="none" if weights else self.measured,
            layer_inputs=self.layer_inputs if self.layerwise else None,
            include=self.network.include or self.experiment.include or ("*",),
            exclude=self.network.exclude or self.experiment.exclude,
            device=self.source.device,
            seed=seed,
        )

    @cached_property
    def need(self) -> Extent:
        """What the rows need together."""
        if self.refit or self.choice.bound or self.curvature.gradients or self.staged:
            return Extent.CURVATURE
        return max(self.choice_of(task).needs for task in self.tasks)

    def choice_of(self, task: Task, n: int | None = None) -> cbs_opt.Choice:
        """The choice of a row; of ``n`` weights exactly as many stay as the rounding says."""
        choice = cbs_opt.Choice(
            sparsity=None if task.budget else task.sparsity,
            budget=task.budget or None,
            solver="magnitude" if self.sweep.masks else task.solver,
            objective=self.choice.objective,
            update=task.update,
            update_scale=task.update_scale,
            allocation=self.allocation,
            time_limit=self.choice.time_limit,
            min_kept=self.choice.min_kept,
            batch_norm=self.choice.batch_norm,
            distill=self.distill,
            finetune=self.finetune,
        )
        if n is None or choice.budget is not None:
            return choice
        return replace(choice, sparsity=None, n_kept=self.choice.sparsity_rounding.n_kept(n, task.sparsity))

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All rows; those of a mask follow one another, those of a seed too."""
        return tuple(self._tasks())

    def _tasks(self) -> Iterator[Task]:
        sweep = self.sweep
        usual = () if sweep.budget else self.experiment.sparsities
        limits = [(sparsity, "") for sparsity in sweep.sparsity or usual]
        limits += [(round(1.0 - budget_of(text).kept, 6), text) for text in sweep.budget]
        masks: Sequence[tuple[str, float, str]] = [(str(path), 0.0, "") for path in sweep.masks] or [
            (solver, *limit) for solver in sweep.solver or (DEFAULT_SOLVER,) for limit in limits
        ]
        # The combinatorial update yields the refit objective of a mask, which the others of that mask then share.
        updates = sorted(sweep.update, key=lambda update: update != "combinatorial")
        for seed in sweep.seed:
            for solver, sparsity, budget in masks:
                for update in updates:
                    # Without an update there is nothing to scale, and a searched one has its own length.
                    scales = (1.0,) if update in ("none", "searched") and len(sweep.update) > 1 else sweep.update_scale
                    for scale in scales:
                        yield Task(solver, sparsity, seed, update, scale, budget)
