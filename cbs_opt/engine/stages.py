"""Staged pruning: gradients anew at the sparse weights, the next problem, its solution, a judged step; no training.

Far from w the quadratic model is wrong, so the way to a high sparsity is cut into stages. Stage k, at weights w:

1. r batches of b fresh training samples give A (batch means, divided by √r) and g. In a network with batch norms they
   are gradients under the statistics of the batch: once the statistics follow the weights, the gradient at resting
   statistics is not that of the loss, and steps along it fail. Since E[ḡḡᵀ] ≈ H/b + ggᵀ, the rows are taken relative to
   their mean and g enters as g/b: both then stand for H/b. (Leaving ggᵀ in damps exactly the direction of descent and
   makes steps far too short.)
2. The weights still there, and the removed ones which promise most if put back (`regrow`), form a
   `SelectionProblem` with λ as it was given; any solver chooses which of them go. Whether g is part of that problem is
   decided by the loss after step 3 (`first_order`).
3. CBS-U with the first-order term gives v(λ) on the chosen support, for any λ from one eigendecomposition
   (`damped_refits`). λ and the length t of the step w_S + t (v_S − w_S) are searched by the loss on training
   samples that no gradient sees, starting from the last λ: as in Levenberg and Marquardt, λ rises where the model is
   bad. This λ is that of the step alone: a network with nothing to gain drives it up, and a choice made with it would
   become magnitude.
   To the best of these steps a share of the last stage's step may be added, where that pays too (`momentum`).
4. Batch-norm statistics are re-estimated, where there are any.

The loss is the one given, or that mixed with the distance from the dense network's outputs (`data.distillation`).

A budget of costs, of groups or of n:m is tightened from stage to stage (`limits`); its masks only grow.

Where the plan says so a stage is followed by training under its mask (`tuning`), which ends in the best state it saw.

A polishing stage is the same at the final sparsity: it refits, and swaps where it pays, and is undone if the loss does
not fall; then λ is raised instead. Whatever is random is drawn from (seed, number of the stage), so a run taken up
again from its journal ends in the same bits.

Sources: Yu et al., ICML 2022 (CBS); Benbaki et al., *Fast as CHITA*, ICML 2023 (stages with batch means); Singh and
Alistarh, NeurIPS 2020 (gradual Fisher pruning); Marquardt, 1963 (damping).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from cbs_opt.data.trees import leaves
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.damped_refits import DampedRefits
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.journal import Journal, StageState
from cbs_opt.engine.limits import Limits
from cbs_opt.engine.plan import Plan, Polish, Prune, Train
from cbs_opt.engine.stage_model import StageModel
from cbs_opt.engine.stage_options import LEAST_BATCH
from cbs_opt.engine.stage_parts import Chosen, Clock, Step
from cbs_opt.engine.stage_samples import SOLVER, StageSamples, derived_seed
from cbs_opt.engine.step_search import DAMPING_RATIO, search_step
from cbs_opt.engine.trained_stage import record_of, rest_of, train_stage
from cbs_opt.engine.training_file import TrainingFile
from cbs_opt.engine.tuning import Tuning
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.blocks import contiguous_partition
from cbs_opt.measure.gradients import Progress
from cbs_opt.network.batch_norm import reestimate, restore_statistics, statistics_of
from cbs_opt.report.records import FineTuneRecord, StageRecord
from cbs_opt.report.warnings import gradient_warnings
from solvers import Budget, Capability, solve
from solvers.arrays import Array, Mask
from solvers.files import holding

StageProgress = Callable[[StageRecord, StageState], None]


@dataclass(frozen=True, eq=False)
class StagedRun:
    """What `run_stages` leaves.

    Attributes
    ----------
    state : StageState
        The last one; the network holds it.
    records : tuple of StageRecord
        One per stage, including those read from the journal.
    n_resumed : int
        Stages that were read and not run.
    finetune : FineTuneRecord, optional
        Of all training between them.
    costs : mapping of str to float
        Under a budget of costs, what stays.
    """

    state: StageState
    records: tuple[StageRecord, ...]
    n_resumed: int
    finetune: FineTuneRecord | None = None
    costs: Mapping[str, float] = field(default_factory=dict)


def run_stages(
    workspace: Workspace,
    choice: Choice,
    plan: Plan,
    *,
    start: StageState | None = None,
    teacher: nn.Module | None = None,
    journal: Path | str | None = None,
    progress: StageProgress | None = None,
    training: Progress | None = None,
) -> StagedRun:
    """Carry out the steps of a plan, each at gradients of its own, on the network of a workspace, in place.

    Parameters
    ----------
    workspace : Workspace
        Its network ends with the weights and statistics of the last state. Its setup has rows, blocks and damping.
    choice : Choice
        Solver, objective and allocation; what goes is said by the plan. See `cbs_opt.engine.checks` for what fits.
    plan : Plan
        As `Plan.staged` makes it.
    start : StageState, optional
        Go on from a state of another run, whose stages have been paid for; the network must be the same.
    teacher : nn.Module, optional
        The dense network, where the plan asks for distillation; None takes a copy of the network as it is given.
    journal : path, optional
        Folder that gets the state after each stage; a run that finds its own journal goes on where that ends.
    progress : callable, optional
        Called with the record and state of each stage once it is done.
    training : callable, optional
        Called with (steps done, steps in all) of the training between stages.

    Returns
    -------
    StagedRun

    Raises
    ------
    CBSError
        From the solver, the journal or the gradients.
    """
    assert plan.stages is not None
    with holding(journal) if journal is not None else nullcontext():
        tuning = None if plan.finetune is None else Tuning(workspace, plan.finetune)
        held = None if tuning is None else tuning.batches.held_index
        samples, limits = StageSamples(workspace, plan.stages, teacher, held), Limits.of(choice, workspace)
        stager = _Stager(choice, samples, tuning is not None, limits)
        state = start if start is not None else stager.initial_state()
        book = None if journal is None else Journal(journal, stager.fingerprint(plan, state))
        records: list[StageRecord] = []
        if book is not None and book.records:
            records = list(book.records)
            last = book.last()
            assert last is not None
            state = last
        resumed = len(records)
        stager.install(state)
        for position, step in list(enumerate(plan.steps))[resumed:]:
            kept = None if book is None else TrainingFile(book.folder, position + 1)
            if isinstance(step, Train):
                assert tuning is not None
                state, record = train_stage(tuning, state, step, kept, training)
            else:
                n_kept = step.n_kept if isinstance(step, Prune) else state.n_kept
                left = sum(not isinstance(other, Train) for other in plan.steps[position + 1 :])
                budget = None
                if limits is not None:
                    budget = limits.among(~state.pruned, limits.n_kept if isinstance(step, Polish) else n_kept)
                state, record = stager.stage(state, n_kept, may_swap=left >= plan.stages.settle, budget=budget)
            records.append(record)
            if book is not None:
                book.append(state, record)
                TrainingFile(book.folder, position + 1).remove()
            if progress is not None:
                progress(record, state)
        trained = None if tuning is None else record_of(tuning, records)
        costs = {} if limits is None else limits.summary(state.pruned)
        return StagedRun(state, tuple(records), resumed, trained, costs)


class _Stager:
    """The parts of a stage; see the module's docstring."""

    def __init__(self, choice: Choice, samples: StageSamples, trains: bool, limits: Limits | None) -> None:
        self.samples, self.choice, self.solver = samples, choice, choice.solver
        self.model, self.layers = samples.model, samples.layers
        self.options, self.fisher = samples.options, samples.fisher
        self.seed = samples.seed if choice.seed is None else choice.seed
        self.objective = choice.goal(staged=True)
        self.floors = Floors.of(choice, self.layers)
        self.limits = limits
        self.partition = contiguous_partition(self.layers, self.fisher.spec)
        # What of the network changes beside the prunable weights.
        self._rest = partial(rest_of, self.layers) if trains else statistics_of

    # -- states -------------------------------------------------------------------------------------------------------

    def initial_state(self) -> StageState:
        """The network as it is: zeros count as removed only once a stage has removed them."""
        weights = self.layers.read(self.model)
        pruned = np.zeros(self.layers.n, dtype=bool)
        damping = self.fisher.ridge if self.options.step_damping is None else self.options.step_damping
        return StageState(0, weights, pruned, damping, self._rest(self.model))

    def install(self, state: StageState) -> None:
        """Put a state into the network."""
        self.layers.write(self.model, state.weights)
        restore_statistics(self.model, state.statistics)

    def fingerprint(self, plan: Plan, state: StageState) -> dict[str, str]:
        """What makes a run the run it is."""
        digest = hashlib.sha256(state.weights.numpy().tobytes() + state.pruned.tobytes())
        inputs = hashlib.sha256()
        inputs.update(str(self.samples.data.n).encode())
        for batch, targets, _ in self.samples.held_out.batches[:1]:
            for _, leaf in leaves((batch,) if targets is None else (batch, targets)):
                inputs.update(leaf.cpu().contiguous().numpy().tobytes())
        counts = [step.n_kept for step in plan.steps if isinstance(step, Prune)]
        trained = {} if plan.finetune is None else {"finetune": plan.finetune.describe()}
        return {
            **trained,
            **({} if self.limits is None else {"budget": str(self.choice.budget)}),
            "n_kept": str(counts[-1] if counts else state.n_kept),
            "solver": self.solver.spec,
            "objective": self.objective.value,
            "allocation": str(self.choice.allocation),
            "floors": hashlib.sha256(np.stack([self.floors.sizes, self.floors.least]).tobytes()).hexdigest()[:32],
            "stages": self.options.describe(),
            "fisher": repr(self.fisher),
            "seed": str(self.seed),
            "start": f"{state.number} {digest.hexdigest()[:32]}",
            "data": inputs.hexdigest()[:32],
        }

    # -- a stage ------------------------------------------------------------------------------------------------------

    def stage(
        self, state: StageState, n_kept: int, *, may_swap: bool, budget: Budget | None = None
    ) -> tuple[StageState, StageRecord]:
        """Advance a state, which the network holds; `budget` is asked of the weights still there, if not a number."""
        number = state.number + 1
        self.samples.evaluations = 0
        clock = Clock()
        sample = self.samples.gradients(number)
        seconds_gradients = clock.lap()
        pruning = n_kept < state.n_kept
        if budget is not None:
            # Masks grow: what is gone stays gone, and nothing is swapped.
            may_swap, pruning = False, bool(budget.violation(np.zeros(state.n_kept, dtype=bool)))
        model = StageModel(self.partition, sample, state.weights.numpy())
        chosen = [Chosen(state.pruned)]
        seconds_solve = 0.0
        if pruning or (self.options.regrow > 0 and may_swap and state.pruned.any()):
            chosen = [self._choose(model, state, n_kept, may_swap, way, budget) for way in self._ways(pruning)]
            seconds_solve = clock.lap()
        loss_before = self.samples.loss(model.weights)
        best, outcome = self._update(model, state, chosen, None if pruning else loss_before)
        self.layers.write(self.model, outcome.weights)
        stored = self.layers.read(self.model)
        seconds_update = clock.lap()
        if self.samples.follows_norms:
            reestimate(self.model, self.samples.forward.output, self.samples.norm_batches(number))
        seconds_norms = clock.lap()
        taken = stored - state.weights if self.options.momentum > 0.0 and outcome.length > 0.0 else None
        new = StageState(number, stored, best.pruned, outcome.damping, self._rest(self.model), taken)
        record = StageRecord(
            stage=number,
            kind="prune" if pruning else "polish",
            n_kept=new.n_kept,
            sparsity=1.0 - new.n_kept / self.layers.n,
            loss_gradients=sample.loss,
            loss_before=loss_before,
            loss_masked=outcome.masked,
            loss_after=outcome.loss,
            damping=outcome.damping,
            step=outcome.length,
            evaluations=self.samples.evaluations,
            n_regrown=int((state.pruned & ~best.pruned).sum()),
            n_images=sample.n_rows * sample.batch_size,
            method=sample.method,
            seconds_gradients=seconds_gradients,
            seconds_solve=seconds_solve,
            seconds_update=seconds_update,
            seconds_batch_norm=seconds_norms,
            momentum=outcome.momentum,
            first_order=best.first_order,
            warnings=gradient_warnings(self.layers, sample.silent(self.layers)) if number == 1 else (),
            repairs=(*sample.notes, *self._repairs(), *(best.solution.repairs if best.solution else ())),
            **StageRecord.of(best.solution),
        )
        return new, record

    def _repairs(self) -> tuple[str, ...]:
        """What is done otherwise than asked for in every stage."""
        if not self.samples.follows_norms or self.samples.norms_by_batch:
            return ()
        return (
            f"rows of {self.fisher.batch_size} samples (fewer than {LEAST_BATCH}): gradients were taken under the "
            "running batch-norm statistics",
        )

    def _ways(self, pruning: bool) -> tuple[bool, ...]:
        """Whether choices see the gradient: one choice for each."""
        if Capability.LINEAR_TERM not in self.solver.capabilities:
            return (False,)
        if self.options.first_order is not None:
            return (self.options.first_order,)
        # Without the gradient no weight that is gone would come back.
        return (True, False) if pruning and not self.fisher.first_order else (True,)

    def _choose(
        self,
        model: StageModel,
        state: StageState,
        n_kept: int,
        regrow: bool,
        first_order: bool,
        asked: Budget | None = None,
    ) -> Chosen:
        """Which weights go."""
        active = ~state.pruned
        if regrow and self.options.regrow > 0:
            active |= model.most_wanted(state.pruned, int(self.options.regrow * n_kept))
        n_prune = int(active.sum()) - n_kept if asked is None else 0
        problem, index = model.problem(active, n_prune, self.fisher.ridge)
        budget = self.floors.among(active).budget(n_prune) if asked is None else asked
        problem = problem.with_objective(self.objective).with_budget(budget)
        if not first_order:
            problem = problem.without_gradient()
        start = None
        if asked is None and n_kept == state.n_kept and Capability.WARM_START in self.solver.capabilities:
            # A state of another run may know no floors.
            start = None if budget.violation(state.pruned[index]) else state.pruned[index]

        def calibration_loss(mask: Mask) -> float:
            trial = model.weights.copy()
            trial[index[mask]] = 0.0
            return self.samples.loss(trial)

        solution = solve(
            problem,
            self.solver,
            seed=derived_seed(self.seed, state.number + 1, SOLVER),
            start=start,
            calibration_loss=calibration_loss,
            allocation=self.choice.shared,
            with_refit=False,
        )
        pruned = np.ones(self.layers.n, dtype=bool)
        pruned[index[~solution.pruned]] = False
        return Chosen(pruned, solution, first_order)

    def _update(
        self, model: StageModel, state: StageState, chosen: list[Chosen], bar: float | None
    ) -> tuple[Chosen, Step]:
        """The best refit of any of the masks; `bar` is the loss that a polishing step must beat."""
        tried = [(choice, self._step(model, choice.pruned, bar, state)) for choice in chosen]
        best, outcome = min(tried, key=lambda pair: pair[1].loss)
        if bar is not None and outcome.length == 0.0 and not np.array_equal(best.pruned, state.pruned):
            # The swaps do not pay: the same refit without them.
            best = replace(best, pruned=state.pruned)
            outcome = self._step(model, best.pruned, bar, state)
        return best, outcome

    def _step(self, model: StageModel, pruned: Mask, loss_now: float | None, state: StageState) -> Step:
        """The refit of a mask, searched; `loss_now` is the loss that a polishing step must beat."""
        damping = state.damping
        # Removed weights that are not zero yet still push the kept ones; all others play no role.
        involved = ~pruned | (model.weights != 0.0)
        problem, index = model.problem(involved, int((pruned & involved).sum()), damping)
        previous = None if state.step is None else np.where(pruned, 0.0, state.step.numpy())
        refits = DampedRefits(problem, pruned[index])
        start = np.where(pruned, 0.0, model.weights)
        same = loss_now is not None and np.array_equal(start, model.weights)
        masked = loss_now if loss_now is not None and same else self.samples.loss(start)

        def step(ratio: float) -> Array:
            full = np.zeros_like(start)
            full[index] = refits.step(ratio)
            return full

        found = search_step(start, step, self.samples.loss, self.options, previous)
        searched = self.options.search_damping or self.options.search_step
        if found.loss < (masked if loss_now is None else loss_now) or not searched:
            return Step(found.weights, damping * found.ratio, found.length, found.loss, masked, found.momentum)
        if loss_now is None:
            # The damage just done leaves the next stage more to gain, so its search starts where this one did.
            return Step(start, damping, 0.0, masked, masked)
        raised = damping * (DAMPING_RATIO if self.options.search_damping else 1.0)
        return Step(model.weights, raised, 0.0, loss_now, masked)
