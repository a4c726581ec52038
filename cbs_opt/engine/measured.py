"""A network with what was measured of it, and one shot: one choice of weights, one update.

What is measured is no more than solver and update need (`Extent`): the weights alone, the mean gradient, or the
quadratic model.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from cbs_opt.engine.choice import Choice, Extent
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.limits import costs_of
from cbs_opt.engine.outcome import ModelFigures, Outcome, conclude
from cbs_opt.engine.tuned import fine_tuned
from cbs_opt.engine.update import Update, Updated, own_update, scaled, update_weights
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.costs import CostBudget, Costs, Split
from cbs_opt.measure.fisher import FisherBlocks, FisherOptions, build_blocks, weight_blocks
from cbs_opt.measure.gradients import GradientSample, Progress
from cbs_opt.network.modes import in_plain_state
from cbs_opt.report.norms import contributions
from cbs_opt.report.records import StageRecord
from cbs_opt.report.result import PruneResult
from cbs_opt.report.warnings import (
    curvature_warnings,
    gradient_warnings,
)
from cbs_opt.structured.coupled import CoupledCosts, settled
from solvers import Budget, Capability, Knapsack, Objective, SelectionProblem, Solution, solve
from solvers.arrays import Array, Mask
from solvers.baselines.obd import diagonal_saliency
from solvers.errors import CapabilityError, OptionError
from solvers.refit import refit
from solvers.solver import Need


def take_gradients(workspace: Workspace, need: Extent, progress: Progress | None = None) -> GradientSample | None:
    """Gradients of a network as it was given, as much of them as is needed."""
    if need is Extent.WEIGHTS:
        return None
    keep = need is Extent.CURVATURE
    return workspace.gradients(workspace.weights, workspace.setup.options, keep_rows=keep, progress=progress)


class Measured:
    """A network and its quadratic model, or what of it was measured.

    Parameters
    ----------
    workspace : Workspace
    fisher : FisherOptions
    gradients : GradientSample, optional
        None where only the weights are needed.
    weights : float64 (n,), optional
        The prunable weights the gradients were taken at; None takes those of the network given.

    Attributes
    ----------
    blocks : FisherBlocks
    has : Extent
    """

    def __init__(
        self,
        workspace: Workspace,
        fisher: FisherOptions,
        gradients: GradientSample | None,
        weights: Array | None = None,
    ) -> None:
        fisher = fisher if gradients is None else fisher.resolved(gradients)
        self.workspace, self.layers, self.fisher = workspace, workspace.layers, fisher
        self._gradients, self._weights = gradients, weights
        self._updates: dict[tuple[bytes, Update], Updated] = {}
        self._costs: dict[CostBudget, Costs] = {}
        if gradients is not None and len(gradients.factor):
            self.has = Extent.CURVATURE
            seed = workspace.setup.seed
            self.blocks: FisherBlocks = build_blocks(gradients, self.weights, self.layers, fisher, seed)
        else:
            self.has = Extent.WEIGHTS if gradients is None else Extent.GRADIENT
            self.blocks = weight_blocks(self.layers, workspace.model, gradients)

    @property
    def n(self) -> int:
        """Number of prunable weights."""
        return self.layers.n

    @property
    def weights(self) -> Array:
        """The prunable weights that the model is built at, float64 (n,)."""
        return self.workspace.weights if self._weights is None else self._weights

    @property
    def gradients(self) -> GradientSample:
        """The gradients; raises CapabilityError where none were taken."""
        if self._gradients is None:
            raise CapabilityError("no gradients were taken; prepare the network with curvature='fisher'")
        return self._gradients

    @in_plain_state
    def loss(self, weights: Array) -> float:
        """Mean calibration loss with other prunable weights (n,), in the order of the network."""
        return self.workspace.meter.of_weights(weights)

    def calibration_loss(self, pruned: Mask) -> float:
        """Mean calibration loss under a mask (n,) in the order of the blocks, the kept weights as they are."""
        mask = self.blocks.partition.to_network(pruned)
        return self.loss(np.where(mask, 0.0, self.weights))

    @in_plain_state
    def problem(
        self,
        *,
        sparsity: float | None = None,
        n_kept: int | None = None,
        objective: Objective | str = Objective.SELECTION,
    ) -> SelectionProblem:
        """The selection problem at a sparsity, or for an exact number of weights to keep."""
        choice = Choice(sparsity, n_kept, "magnitude", objective)
        return SelectionProblem(self.blocks.blocks, self.n - choice.kept(self.n), choice.goal())

    @in_plain_state
    def choose(self, choice: Choice, *, with_refit: bool = False) -> tuple[SelectionProblem, Solution]:
        """Choose the weights to remove.

        Parameters
        ----------
        choice : Choice
        with_refit : bool
            Also judge a selection by the joint objective.

        Raises
        ------
        CapabilityError
            If the solver needs what was not measured.
        CBSError
            As `solvers.solve`.
        """
        if choice.selects > self.has:
            raise CapabilityError(
                f"solver {choice.solver.name!r} needs the {choice.selects}, of which no more than the {self.has} was "
                "measured; prepare the network with curvature='fisher', or choose by magnitude"
            )
        plain = self.problem(n_kept=choice.kept(self.n), objective=choice.goal())
        start = None if choice.start is None else self.blocks.partition.to_groups(np.asarray(choice.start))
        judge = Capability.CALIBRATION in choice.solver.capabilities

        def chosen(costs: Costs | None) -> tuple[SelectionProblem, Solution]:
            problem = plain.with_budget(self._budget(choice, plain.n_prune, costs))
            solution = solve(
                problem,
                choice.solver,
                time_limit=choice.time_limit,
                seed=self.workspace.setup.seed if choice.seed is None else choice.seed,
                start=start,
                calibration_loss=self.calibration_loss if judge else None,
                allocation=choice.shared,
                with_refit=with_refit,
            )
            return problem, solution

        costs = self.costs(choice)
        if costs is None:
            return chosen(None)
        return settled(costs, chosen, lambda found: self.blocks.partition.to_network(found[1].pruned))

    def _budget(self, choice: Choice, n_prune: int, costs: Costs | None) -> Budget:
        floors, order = Floors.of(choice, self.layers), self.blocks.partition.order
        if choice.budget is not None and order is not None:
            raise OptionError(
                f"budget={str(choice.budget)!r} takes blocks of consecutive weights, not {self.fisher.spec}"
            )
        if costs is not None:
            return costs.knapsack(floors.sizes, floors.least)
        return floors.budget(n_prune, order) if choice.pattern is None else self.layers.resolve(choice.pattern)

    def costs(self, choice: Choice) -> Costs | None:
        """What the weights cost, under a budget of that."""
        if choice.costs is None:
            return None
        if choice.costs not in self._costs:
            self._costs[choice.costs] = costs_of(self.workspace, choice.costs)
        return self._costs[choice.costs]

    @in_plain_state
    def update(self, problem: SelectionProblem, pruned: Mask, update: Update | str, scale: float = 1.0) -> Updated:
        """New values of the kept weights, in the order of the blocks; a sweep of the scale computes them once."""
        how, key = Update.parse(update), np.packbits(pruned).tobytes()
        if how is Update.SEARCHED and scale != 1.0:
            raise OptionError(f"update 'searched' finds its own length; leave update_scale={scale:g} out")
        if how is not Update.NONE and self.has is not Extent.CURVATURE:
            raise CapabilityError(f"update {how.value!r} needs the curvature; prepare with curvature='fisher'")
        if (key, how) not in self._updates:
            self._updates = {k: v for k, v in self._updates.items() if k[0] == key}
            to_network = self.blocks.partition.to_network
            self._updates[key, how] = update_weights(problem, pruned, how, loss=lambda w: self.loss(to_network(w)))
        return scaled(problem, pruned, self._updates[key, how], scale)

    @in_plain_state
    def one_shot(
        self,
        choice: Choice,
        chosen: tuple[SelectionProblem, Solution] | None = None,
        *,
        own: bool = False,
        judge: bool = True,
        progress: Progress | None = None,
    ) -> PruneResult:
        """Choose, update, and put into the network.

        Parameters
        ----------
        choice : Choice
        chosen : (SelectionProblem, Solution), optional
            What `choose` has found; None chooses.
        own : bool
            Give the network of the workspace away instead of a copy; nothing here can be used afterwards.
        judge : bool
            Refit the mask for the report where the update does not yield its refit objective; it costs as much as one.
        progress : callable, optional
            Called with (steps done, steps in all) of the training afterwards.
        """
        return fine_tuned(
            self.workspace,
            choice,
            lambda plain: self._one_shot(plain, chosen, own=own, judge=judge, progress=progress),
            progress=progress,
        )

    def _one_shot(
        self,
        choice: Choice,
        chosen: tuple[SelectionProblem, Solution] | None,
        *,
        own: bool,
        judge: bool,
        progress: Progress | None,
    ) -> PruneResult:
        """`one_shot` without fine-tuning."""
        workspace, to_network = self.workspace, self.blocks.partition.to_network
        loss_dense = workspace.dense_loss
        calls = workspace.meter.calls
        problem, solution = chosen or self.choose(choice)
        weights: Array | None = None
        terms, repairs, seconds = None, solution.repairs, 0.0
        if self.has is Extent.CURVATURE or choice.update is not Update.NONE:
            if choice.update is Update.OWN:
                updated = own_update(problem, solution, choice.update_scale)
            else:
                updated = self.update(problem, solution.pruned, choice.update, choice.update_scale)
            weights, repairs, seconds = to_network(updated.weights), (*repairs, *updated.repairs), updated.seconds
            solution, more = self._judged(problem, solution, updated, judge)
            repairs = (*repairs, *more)
            terms = to_network(contributions(problem, solution.pruned, solution.refit_weights))
        sample = self._gradients
        notes = () if sample is None else sample.notes
        record = StageRecord(
            stage=1,
            kind="prune",
            n_kept=self.n - solution.n_pruned,
            sparsity=solution.n_pruned / self.n,
            loss_gradients=math.nan if sample is None else sample.loss,
            loss_before=loss_dense,
            loss_masked=math.nan,
            loss_after=math.nan,
            damping=self.fisher.ridge if self.has is Extent.CURVATURE else math.nan,
            step=choice.update_scale if choice.update in (Update.COMBINATORIAL, Update.SINGLE) else math.nan,
            evaluations=workspace.meter.calls - calls,
            n_regrown=0,
            n_images=0 if sample is None else sample.n_rows * sample.batch_size,
            seconds_gradients=0.0 if sample is None else sample.seconds,
            seconds_solve=solution.seconds,
            seconds_update=seconds,
            seconds_batch_norm=0.0,
            repairs=tuple(dict.fromkeys((*notes, *repairs))),
            first_order=problem.has_gradient,
            warnings=self._warnings(),
            method="" if sample is None else sample.method,
            **StageRecord.of(solution),
        )
        model = ModelFigures.of(self.has, self.fisher, workspace.data, len(problem.blocks))
        pruned, costs = to_network(solution.pruned), self.costs(choice)
        spent = {} if costs is None else costs.summary(pruned, _split(problem, choice))
        coupling = costs.coupling if isinstance(costs, CoupledCosts) else None
        if coupling is not None:
            # They see zeros from now on.
            pruned = coupling.whole(pruned, self.layers)
            weights = None if weights is None else np.where(pruned, 0.0, weights)
        outcome = Outcome(
            pruned, weights, (record,), model, terms=terms, solution=solution, costs=spent, coupling=coupling
        )
        if own:
            # Its blocks may be views of the weights, which would keep them alive beside the masked ones.
            del problem, chosen, self.blocks
        return conclude(workspace, choice, outcome, own=own, progress=progress)

    def _warnings(self) -> tuple[str, ...]:
        """What the gradients do not say."""
        if self.has is Extent.CURVATURE:
            diagonal = torch.cat([block.diagonal for block in self.blocks.blocks]).cpu().numpy()
            return curvature_warnings(self.layers, self.blocks.partition.to_network(diagonal), self.fisher.ridge)
        if self.has is Extent.GRADIENT:
            return gradient_warnings(self.layers, self.gradients.silent(self.layers))
        return ()

    def _judged(
        self, problem: SelectionProblem, solution: Solution, updated: Updated, judge: bool
    ) -> tuple[Solution, tuple[str, ...]]:
        """The solution with its refit objective: every mask is judged by the joint objective, whatever the update."""
        if not math.isnan(updated.refit_objective):
            return replace(solution, refit_objective=updated.refit_objective), ()
        if not math.isnan(solution.refit_objective) or not judge:
            return solution, ()
        judged = refit(problem, solution.pruned)
        return replace(solution, refit_objective=judged.value, refit_weights=judged.weights), judged.repairs


def _split(problem: SelectionProblem, choice: Choice) -> Split | None:
    """By the scores that a limit is shared out by: diagonal saliencies, or |w| where the solver looks at no more."""
    assert isinstance(problem.budget, Knapsack)
    if problem.budget.labels is not None:
        return None
    looks = problem.measured and Need.CURVATURE in choice.solver.needs
    scores = diagonal_saliency(problem) if looks else np.abs(problem.weights)
    return Split.of(problem.budget, scores, problem.budget.cheapest_of(scores))
