"""From a trained network to pruned ones: gradients once per seed, then any solver, sparsity and update.

`cbs_opt.prune` does all of it in one call. The rows of a run share gradients, and several updates share a mask, so a
run takes the steps of `cbs_opt.Prepared` one by one; only stages, which share nothing, go through the whole engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

import cbs_opt
import solvers
from cbs_opt.engine.checks import check_plan
from cbs_opt.engine.layerwise import check_layerwise
from cbs_opt.engine.run import run
from cbs_opt.engine.setup import LAYERWISE
from cbs_opt.measure.row_sampling import POOL
from cbs_opt.network.batch_norm import restore_statistics, statistics_of
from cbs_opt.prepared import prepare_setup
from experiments.datasets.augmentation import CropAndFlip
from experiments.networks import ImageExperiment
from experiments.networks.load import Network, open_network
from experiments.runs.layer_rows import LayerRows, distil_figures
from experiments.runs.options import RunOptions, Task
from experiments.runs.rows import RowKeys
from experiments.runs.shrunk import shrunk_figures
from solvers import SelectionProblem, Solution
from solvers.verify import certify

#: Images whose gradients a stage may want beyond those of one row each.
STAGE_SAMPLES = 20_000


@dataclass(frozen=True)
class Listener:
    """Who is told of what happens: a line of text, work begun and how far it is, a finished row and if it is new."""

    say: Callable[[str], None] = lambda text: None
    working: Callable[[str, int, int], None] = lambda what, done, total: None
    finished: Callable[[Mapping[str, Any], bool], None] = lambda row, new: None


class Bench:
    """A trained network on which rows are measured, one after the other.

    Parameters
    ----------
    options
    folder
        Gets masks and journals.
    listener
    network
        Of the options' experiment, where it is open already.

    Raises
    ------
    CBSError
        Data, checkpoint or layers are missing or bad, or no row can be made as asked; nothing has been pruned by then.
    """

    def __init__(
        self, options: RunOptions, folder: Path, listener: Listener = Listener(), network: Network | None = None
    ) -> None:
        self.options, self.folder, self.listener = options, folder, listener
        listener.working("loading", 0, 0)
        self.network = network or open_network(options.experiment, options.source, listener.say)
        self.loss, self.metric = options.experiment.criterion.loss, options.experiment.criterion.metric
        setup = options.setup(options.sweep.seed[0])
        self.layers = cbs_opt.find_layers(self.network.model, include=setup.include, exclude=setup.exclude)
        self.tasks = tuple(self._with_sparsity(task) for task in options.tasks)
        self._check(setup)
        listener.working("evaluating the dense network", 0, 0)
        self.dense = self.network.dense
        self._prepared: tuple[int, cbs_opt.Prepared] | None = None
        self._chosen: tuple[Task, SelectionProblem, Solution] | None = None
        self._bounds: dict[tuple[int, int, str, str], float] = {}

    def measure(self, task: Task, keys: RowKeys) -> dict[str, Any]:
        """The figures of a row; `keys` name its files."""
        if self.options.layerwise:
            figures, masks = self.layer_rows.measure(task, keys)
        else:
            result = self.prune(task, keys.row)
            figures, masks = self.figures(result), result.masks
        if self.options.save_masks:
            cbs_opt.save_masks(self.folder / "masks" / f"{keys.row}.safetensors", masks)
        return figures

    def figures(self, result: cbs_opt.PruneResult) -> dict[str, Any]:
        """What a row says of a result."""
        report, model = result.report, result.model.to(self.network.device).eval()
        has = report.curvature in ("fisher", *LAYERWISE)
        return {
            "n_weights": report.n,
            "n_kept": report.n_kept,
            # Readers of other networks' rows look for an accuracy.
            "accuracy": None,
            self.metric.name: self.network.score(model),
            "metric": self.metric.name,
            "train_loss": report.loss_pruned,
            f"dense_{self.metric.name}": self.dense,
            "objective": report.objective if has else None,
            "refit_objective": report.refit_objective if has else None,
            "bound": report.bound if has else None,
            "gap": report.gap if has else None,
            "status": report.status,
            "seconds_gradients": report.seconds_gradients,
            "seconds_solve": report.seconds_solve,
            "seconds_update": report.seconds_update,
            "repairs": report.repairs,
            **report.costs,
            **self._norms(report, model),
            **_distilled(report),
            **_tuned(report),
            **(shrunk_figures(self.network, model) if self.options.choice.shrink else {}),
        }

    def prune(self, task: Task, key: str) -> cbs_opt.PruneResult:
        """The pruned network of a row, not layer by layer; rows in turn which differ only in the update choose once."""
        options, what = self.options, str(task)
        if options.staged:
            return run(
                self.network.model,
                self._data(task.seed),
                self.loss,
                options.setup(task.seed),
                self.choice_of(task, self.layers.n),
                self._stages(),
                journal=self.journal(key),
                progress=self._progress(f"{what}, stages"),
            )
        prepared = self.prepared(task.seed)
        self.listener.working(what, 0, 0)
        choice, mask = self.choice_of(task, prepared.n), replace(task, update="", update_scale=1.0)
        if options.sweep.masks:
            masks = cbs_opt.load_masks(task.solver)
            return prepared.update_masks(
                masks,
                update=task.update,
                scale=task.update_scale,
                objective=choice.goal(),
                judge=options.refit,
                batch_norm=choice.batch_norm,
                distill=options.distill,
                finetune=choice.finetune,
            )
        if self._chosen is None or self._chosen[0] != mask:
            judged = options.refit and task.update != "combinatorial"
            problem, solution = prepared.choose(choice, with_refit=judged)
            if options.choice.bound is not None:
                solution = self._certified(task, problem, solution)
            self._chosen = mask, problem, solution
        _, problem, solution = self._chosen
        result = prepared.one_shot(choice, (problem, solution), judge=options.refit)
        if result.solution is not None:
            # The refit is known from the update now; the next update of this mask need not find out again.
            self._chosen = mask, problem, result.solution
        return result

    def choice_of(self, task: Task, n: int) -> cbs_opt.Choice:
        """The choice of a row; what is trained afterwards sees images as those the network was trained on."""
        choice, augment = self.options.choice_of(task, n), self._augmentation()
        if choice.finetune is None or augment is None:
            return choice
        return replace(choice, finetune=replace(choice.finetune, augment=augment))

    def _augmentation(self) -> CropAndFlip | None:
        """On images as they are, the gradients of a network trained on cropped and flipped ones vanish."""
        experiment = self.options.experiment
        if not isinstance(experiment, ImageExperiment) or not experiment.recipe.augment:
            return None
        return CropAndFlip.of(self.network.dataset.train)

    @cached_property
    def layer_rows(self) -> LayerRows:
        """Makes rows layer by layer."""
        return LayerRows(self.options, self.folder, self.network, self.layers, self._data, self._progress, self.figures)

    def sensitivity(self) -> cbs_opt.Sensitivity:
        """Curves of all layers, by the first seed and, where one is named, the first solver and update."""
        sweep = self.options.sweep
        solver, update = (sweep.solver[0], sweep.update[0]) if sweep.solver else ("sweep", "own")
        return cbs_opt.sensitivity(
            self.network.model,
            self._data(sweep.seed[0]),
            self.loss,
            levels=sorted({task.sparsity for task in self.tasks}),
            solver=solver,
            update=update,
            setup=self.options.setup(sweep.seed[0]),
            progress=self._progress("layers alone"),
        )

    def prepared(self, seed: int) -> cbs_opt.Prepared:
        """The quadratic model of a seed; it can take gigabytes, so it is let go when another is asked for."""
        if self._prepared is not None and self._prepared[0] == seed:
            return self._prepared[1]
        self._prepared = self._chosen = None
        setup, folder, what = self.options.setup(seed), self.options.gradients(seed), f"gradients, seed {seed}"
        model, data = self.network.model, self._data(seed)
        if folder is not None and folder.is_dir():
            prepared = cbs_opt.load_prepared(folder, model, data, self.loss, setup)
            self.listener.say(f"{what}: those in {folder}")
        else:
            prepared = prepare_setup(model, data, self.loss, setup, progress=self._progress(what))
            if setup.curvature != "none":
                fisher, seconds = self.options.fisher, prepared.gradients.seconds
                self.listener.say(
                    f"{what}: {fisher.n_rows:,} of {fisher.batch_size} for {prepared.n:,} weights in {seconds:.1f} s"
                )
            if folder is not None:
                prepared.save(folder)
        self._prepared = seed, prepared
        return prepared

    def journal(self, key: str) -> Path:
        """Where the stages of a row leave their states until it is finished."""
        return self.folder / "journals" / key

    def _with_sparsity(self, task: Task) -> Task:
        """The row of a saved mask with the sparsity that the mask has."""
        if not self.options.sweep.masks:
            return task
        return replace(task, sparsity=float(self.layers.pruned_by(cbs_opt.load_masks(task.solver)).mean()))

    def _check(self, setup: cbs_opt.Setup) -> None:
        """Refuse, before gradients are computed, what cannot be carried out."""
        if self.options.sweep.masks:
            return
        for task in self.tasks:
            choice = self.options.choice_of(task, self.layers.n)
            if self.options.layerwise:
                check_layerwise(self.layers, choice)
                continue
            check_plan(self.network.model, self.layers, setup, choice, self._plan(choice))

    def _plan(self, choice: cbs_opt.Choice) -> cbs_opt.Plan:
        n, n_kept = self.layers.n, choice.kept(self.layers.n)
        if not self.options.staged:
            return cbs_opt.Plan.one_shot(n_kept)
        return cbs_opt.Plan.staged(self._stages(), n=n, n_kept=n_kept, finetune=choice.finetune)

    def _stages(self) -> cbs_opt.StageOptions:
        """The experiment's, as many as asked for."""
        train, experiment = self.network.dataset.train, self.options.experiment
        usual = experiment.staged.options
        return replace(
            usual,
            n_stages=self.options.choice.stages,
            augment=self._augmentation(),
            held_out=min(usual.held_out, len(train) // 5),
        )

    def _data(self, seed: int) -> Any:
        """Calibration data of a seed."""
        fisher, least = self.options.fisher, self.options.experiment.least_samples
        count = max(least, (fisher.n_rows or 0) * fisher.batch_size)
        if fisher.row_sampling == "importance" and fisher.batch_size == 1:
            count = max(count, POOL * (fisher.n_rows or 0))
        if self.options.layerwise:
            count = fisher.n_rows or least
        if self.options.finetune is not None and isinstance(self.options.experiment, ImageExperiment):
            count = count if self.options.layerwise else len(self.network.dataset.train)
        if self.options.staged:
            # Every stage draws rows of its own.
            count = max(count, STAGE_SAMPLES)
        return self.network.dataset.calibration(count, seed)

    def _certified(self, task: Task, problem: SelectionProblem, solution: Solution) -> Solution:
        """The solution with the better of its own bound and that of the options, which serves every solver."""
        key = task.seed, problem.n_prune, task.budget, problem.objective.value
        if key not in self._bounds:
            self._bounds[key] = solvers.bound(problem, method=str(self.options.choice.bound)).value
        best = max(solution.bound, self._bounds[key])
        bound, gap, status = certify(solution.objective, best, solution.solver)
        return replace(solution, bound=bound, gap=gap, status=status)

    def _norms(self, report: cbs_opt.PruneReport, model: nn.Module) -> dict[str, Any]:
        """What re-estimated batch norms did, where there are some."""
        if not report.norms_reestimated:
            return {}
        figures = {"train_loss_old_norms": report.loss_old_norms}
        if report.distill is None:
            renewed = statistics_of(model)
            restore_statistics(model, statistics_of(self.network.model))
            figures[f"{self.metric.name}_old_norms"] = self.network.score(model)
            restore_statistics(model, renewed)
        return figures

    def _progress(self, what: str) -> Callable[[int, int], None]:
        self.listener.working(what, 0, 0)
        return lambda done, total: self.listener.working(what, done, total)


def _tuned(report: cbs_opt.PruneReport) -> dict[str, Any]:
    """What fine-tuning did, where there was some."""
    done = report.finetune
    if done is None:
        return {}
    names = ("loss_before", "loss_after", "steps_kept", "steps_taken", "n_samples", "n_held_out")
    figures = {f"fine_tune_{name}": getattr(done, name) for name in names}
    return {"seconds_fine_tune": done.seconds, **figures, "train_loss_untuned": report.loss_untuned}


def _distilled(report: cbs_opt.PruneReport) -> dict[str, Any]:
    """What a distillation did, where there was one."""
    done = report.distill
    return {} if done is None else {**distil_figures(done), "train_loss_undistilled": report.loss_undistilled}
