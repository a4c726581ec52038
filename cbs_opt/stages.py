"""Staged pruning: gradients anew at the sparse weights, the next problem, its solution, a judged step; no training.

Far from w the quadratic model is wrong, so the way to a high sparsity is cut into stages. Stage k, at weights w:

1. r batches of b fresh training samples give A (batch means, divided by √r) and g. Since E[ḡḡᵀ] ≈ H/b + ggᵀ, the rows
   are taken relative to their mean and g enters as g/b: both then stand for H/b. (Leaving ggᵀ in damps exactly the
   direction of descent and makes steps far too short.)
2. The weights still there, and the removed ones which promise most if put back (`regrow`), form a
   `SelectionProblem` with λ as it was given; any solver chooses which of them go.
3. CBS-U with the first-order term gives v(λ) on the chosen support, for any λ from one eigendecomposition
   (`cbs_opt.damped_refits`). λ and the length t of the step w_S + t (v_S − w_S) are searched by the loss on training
   samples that no gradient sees, starting from the last λ: as in Levenberg and Marquardt, λ rises where the model is
   bad. This λ is that of the step alone: a network with nothing to gain drives it up, and a choice made with it would
   become magnitude.
4. Batch-norm statistics are re-estimated, where there are any.

A polishing stage is the same at the final sparsity: it refits, and swaps where it pays, and is undone if the loss does
not fall; then λ is raised instead. Whatever is random is drawn from (seed, number of the stage), so a run taken up
again from its journal ends in the same bits.

Sources: Yu et al., ICML 2022 (CBS); Benbaki et al., *Fast as CHITA*, ICML 2023 (stages with batch means); Singh and
Alistarh, NeurIPS 2020 (gradual Fisher pruning); Marquardt, 1963 (damping).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cbs_opt.batch_norm import batch_statistics, reestimate, restore_statistics, statistics_of, tracked_norms
from cbs_opt.blocks import contiguous_partition
from cbs_opt.calibration import CalibrationData, Forward, Index, Tree
from cbs_opt.damped_refits import DampedRefits
from cbs_opt.fisher import FisherOptions
from cbs_opt.gradients import evaluation_mode, sample_gradients
from cbs_opt.journal import Journal, StageState
from cbs_opt.layers import PrunableLayers
from cbs_opt.schedules import kept_after_stages
from cbs_opt.stage_model import StageModel
from cbs_opt.stage_options import StageOptions, StageRecord
from cbs_opt.step_search import DAMPING_FACTOR, search_step
from solvers import Capability, Objective, Solver, make_solver, solve
from solvers.errors import DataError, OptionError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
StageProgress = Callable[[StageRecord, StageState], None]

#: Samples whose gradients are taken together; bounds the memory that augmented copies take.
_SAMPLES_AT_ONCE = 4096
_EVALUATION_BATCH = {"cpu": 500, "cuda": 2000}
#: Uses of random numbers within a stage.
_ROWS, _AUGMENT, _NORMS, _HELD_OUT, _SOLVER = range(5)


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
    """

    state: StageState
    records: tuple[StageRecord, ...]
    n_resumed: int


def run_stages(
    model: nn.Module,
    layers: PrunableLayers,
    data: CalibrationData,
    forward: Forward,
    *,
    n_kept: int,
    solver: str | Solver = "obs",
    options: StageOptions | None = None,
    fisher: FisherOptions | None = None,
    objective: Objective | str | None = None,
    allocation: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    start: StageState | None = None,
    journal: Path | str | None = None,
    progress: StageProgress | None = None,
) -> StagedRun:
    """Prune a network in stages, in place.

    Parameters
    ----------
    model : nn.Module
        On `device`, without masks, in eval mode; it ends with the weights and statistics of the last state.
    layers : PrunableLayers
    data : CalibrationData
        Training data.
    forward : Forward
    n_kept : int
        Weights that stay.
    solver : str or Solver
    options : StageOptions, optional
    fisher : FisherOptions, optional
        Rows, batch size, blocks and damping; its `first_order` plays no role, stages always have the gradient.
    objective : optional
        What the solver minimises; None takes the joint one where the solver supports it.
    allocation : str, optional
        For solvers that cannot share a budget over blocks.
    seed : int
    start : StageState, optional
        Go on from a state of another run, whose stages have been paid for; the network must be the same.
    journal : path, optional
        Folder that gets the state after each stage; a run that finds its own journal goes on where that ends.
    progress : callable, optional
        Called with the record and state of each stage once it is done.

    Returns
    -------
    StagedRun

    Raises
    ------
    OptionError
        For options that do not fit the network or one another.
    CBSError
        From the solver, the journal or the gradients.
    """
    stager = _Stager(
        model,
        layers,
        data,
        forward,
        options or StageOptions(),
        fisher or FisherOptions(),
        make_solver(solver),
        objective,
        allocation,
        torch.device(device),
        seed,
    )
    state = start if start is not None else stager.initial_state()
    plan = stager.plan(n_kept, state.n_kept)
    book = None if journal is None else Journal(journal, stager.fingerprint(n_kept, state))
    records: list[StageRecord] = []
    if book is not None and book.records:
        records = list(book.records)
        last = book.last()
        assert last is not None
        state = last
    resumed = len(records)
    stager.install(state)
    for position in range(resumed, len(plan)):
        left = len(plan) - position - 1
        state, record = stager.stage(state, plan[position], may_swap=left >= stager.options.settle)
        records.append(record)
        if book is not None:
            book.append(state, record)
        if progress is not None:
            progress(record, state)
    return StagedRun(state, tuple(records), resumed)


class _Stager:
    """The parts of a stage; see the module's docstring."""

    def __init__(
        self,
        model: nn.Module,
        layers: PrunableLayers,
        data: CalibrationData,
        forward: Forward,
        options: StageOptions,
        fisher: FisherOptions,
        solver: Solver,
        objective: Objective | str | None,
        allocation: str | None,
        device: torch.device,
        seed: int,
    ) -> None:
        if not fisher.spec.contiguous:
            raise OptionError(
                f"stages rebuild the blocks as weights go, which {str(fisher.spec)!r} does not support; use 'one', "
                "'per_layer', 'per_row' or 'fixed:SIZE'"
            )
        if fisher.damping <= 0.0:
            raise OptionError("stages need a damping > 0 to start from; pass FisherOptions(damping=1e-4), for example")
        self.model, self.layers, self.data, self.forward = model, layers, data, forward
        self.options, self.fisher, self.solver = options, fisher, solver
        self.allocation, self.device = allocation, device
        self.seed = fisher.seed if fisher.seed is not None else seed
        joint = Capability.JOINT in solver.capabilities
        self.objective = (
            Objective.parse(objective) if objective is not None else (Objective.JOINT if joint else Objective.SELECTION)
        )
        self.partition = contiguous_partition(layers, fisher.spec)
        self.norms = options.batch_norm and bool(tracked_norms(model))
        order = _generator(self.seed, 0, _HELD_OUT).permutation(data.n)
        n_held = min(options.held_out, data.n // 5)
        if n_held < 1:
            raise DataError(f"stages keep a fifth of the training samples for their searches; {data.n} are too few")
        self.held_index, self.fit_index = np.sort(order[:n_held]), np.sort(order[n_held:])
        self.held_out = self._held_out_batches()
        self.factor: Tensor | None = None
        self.evaluations = 0

    # -- data ---------------------------------------------------------------------------------------------------------

    def _batch(self, index: Index, generator: torch.Generator | None) -> tuple[Tree, Tree | None]:
        """(inputs, targets), augmented if there is an augmentation, on the device."""
        inputs, targets = self.data.batch(index, "cpu")
        if self.options.augment is not None and generator is not None:
            inputs = self.options.augment(inputs, generator)
        whole = CalibrationData(inputs, targets, len(index))
        return whole.batch(slice(None), self.device)

    def _held_out_batches(self) -> list[tuple[Tree, Tree | None, int]]:
        generator = torch.Generator().manual_seed(_number(self.seed, 0, _AUGMENT))
        size = _EVALUATION_BATCH.get(self.device.type, 500)
        pieces = [self.held_index[i : i + size] for i in range(0, len(self.held_index), size)]
        return [(*self._batch(piece, generator), len(piece)) for piece in pieces]

    def loss(self, weights: Array | Tensor) -> float:
        """Mean loss on the held-out samples; the weights stay in the network. inf where it is not finite."""
        self.evaluations += 1
        self.layers.write(self.model, weights)
        total = 0.0
        mode = batch_statistics(self.model) if self.norms else evaluation_mode(self.model)
        with mode, torch.no_grad():
            for inputs, targets, count in self.held_out:
                loss = self.forward.loss(self.forward.output(self.model, inputs, targets), inputs, targets)
                total += float(loss) * count
        return total / len(self.held_index) if math.isfinite(total) else math.inf

    # -- states -------------------------------------------------------------------------------------------------------

    def initial_state(self) -> StageState:
        """The network as it is: zeros count as removed only once a stage has removed them."""
        weights = self.layers.read(self.model)
        pruned = np.zeros(self.layers.n, dtype=bool)
        damping = self.fisher.damping if self.options.step_damping is None else self.options.step_damping
        return StageState(0, weights, pruned, damping, statistics_of(self.model))

    def install(self, state: StageState) -> None:
        """Put a state into the network."""
        self.layers.write(self.model, state.weights)
        restore_statistics(self.model, state.statistics)

    def plan(self, n_kept: int, n_start: int) -> tuple[int, ...]:
        """Weights that stay after each stage."""
        options, n = self.options, self.layers.n
        if not 0 <= n_kept <= n_start:
            raise OptionError(f"n_kept must lie in [0, {n_start}], the weights still there, not {n_kept}")
        polish = (n_kept,) * options.n_polish
        if options.levels is not None:
            levels = [self.layers.n_kept(level) for level in options.levels]
            return (*(k for k in levels if n_kept < k <= n_start), n_kept, *polish)
        if options.n_stages == 0:
            if n_kept != n_start:
                raise OptionError(f"n_stages=0 only polishes, but {n_start - n_kept} weights are still to be removed")
            return polish
        first = None if options.first_sparsity is None else int(n * (1.0 - options.first_sparsity))
        return (*kept_after_stages(options.schedule, n_start, n_kept, options.n_stages, n_first=first), *polish)

    def fingerprint(self, n_kept: int, state: StageState) -> dict[str, str]:
        """What makes a run the run it is."""
        digest = hashlib.sha256(state.weights.numpy().tobytes() + state.pruned.tobytes())
        inputs = hashlib.sha256()
        for leaf, _, count in self.held_out[:1]:
            inputs.update(f"{self.data.n} {count} {leaf if not isinstance(leaf, Tensor) else ''}".encode())
            if isinstance(leaf, Tensor):
                inputs.update(leaf.cpu().contiguous().numpy().tobytes())
        return {
            "n_kept": str(n_kept),
            "solver": self.solver.spec,
            "objective": self.objective.value,
            "allocation": str(self.allocation),
            "stages": self.options.describe(),
            "fisher": repr(self.fisher),
            "seed": str(self.seed),
            "start": f"{state.number} {digest.hexdigest()[:32]}",
            "data": inputs.hexdigest()[:32],
        }

    # -- a stage ------------------------------------------------------------------------------------------------------

    def stage(self, state: StageState, n_kept: int, *, may_swap: bool) -> tuple[StageState, StageRecord]:
        """Advance a state, which the network holds."""
        number = state.number + 1
        self.evaluations = 0
        clock = _Clock()
        factor, gradient, loss_gradients = self._gradients(number)
        seconds_gradients = clock.lap()
        weights = state.weights.numpy()
        pruning = n_kept < state.n_kept
        model = StageModel(self.partition, factor, gradient, weights)
        pruned, objective, spec, seconds_solve = state.pruned, math.nan, "", 0.0
        repairs: tuple[str, ...] = ()
        if pruning or (self.options.regrow > 0 and may_swap and state.pruned.any()):
            pruned, objective, repairs = self._choose(model, state, n_kept, number, regrow=may_swap)
            spec, seconds_solve = self.solver.spec, clock.lap()
        loss_before = self.loss(weights)
        outcome = self._step(model, pruned, None if pruning else loss_before, state.damping)
        if not pruning and outcome.length == 0.0 and not np.array_equal(pruned, state.pruned):
            # The swaps do not pay: the same refit without them.
            pruned = state.pruned
            outcome = self._step(model, pruned, loss_before, state.damping)
        self.layers.write(self.model, outcome.weights)
        stored = self.layers.read(self.model)
        seconds_update = clock.lap()
        if self.norms:
            self._reestimate(number)
        seconds_norms = clock.lap()
        new = StageState(number, stored, pruned, outcome.damping, statistics_of(self.model))
        record = StageRecord(
            stage=number,
            kind="prune" if pruning else "polish",
            n_kept=n_kept,
            sparsity=1.0 - n_kept / self.layers.n,
            loss_gradients=loss_gradients,
            loss_before=loss_before,
            loss_masked=outcome.masked,
            loss_after=outcome.loss,
            damping=outcome.damping,
            step=outcome.length,
            evaluations=self.evaluations,
            n_regrown=int((state.pruned & ~pruned).sum()),
            n_images=len(factor) * self.fisher.batch_size,
            solver=spec,
            objective=objective,
            seconds_gradients=seconds_gradients,
            seconds_solve=seconds_solve,
            seconds_update=seconds_update,
            seconds_batch_norm=seconds_norms,
            repairs=repairs,
        )
        return new, record

    def _gradients(self, number: int) -> tuple[Tensor, Tensor, float]:
        """(A (r, n), g / b float64 (n,), mean loss) over fresh samples."""
        fisher = self.fisher
        rows, size = fisher.rows_for(self.data), fisher.batch_size
        index = _draw(self.fit_index, rows, size, _generator(self.seed, number, _ROWS))
        if self.factor is None:
            self.factor = torch.empty(rows, self.layers.n, dtype=fisher.torch_dtype, device=self.device)
        factor = self.factor
        mean = torch.zeros(self.layers.n, dtype=torch.float64, device=self.device)
        generator = torch.Generator().manual_seed(_number(self.seed, number, _AUGMENT))
        loss = 0.0
        together = rows if self.options.augment is None else max(1, _SAMPLES_AT_ONCE // size)
        for start in range(0, rows, together):
            part = index[start : start + together]
            data = self.data
            if self.options.augment is not None:
                inputs, targets = self._batch(part.reshape(-1), generator)
                data = CalibrationData(inputs, targets, part.size)
                part = np.arange(part.size, dtype=np.int64).reshape(part.shape)
            target = factor[start : start + together]
            sample = sample_gradients(
                self.model,
                self.layers,
                data,
                self.forward,
                part,
                device=self.device,
                dtype=fisher.torch_dtype,
                method=fisher.gradient_method,
                memory_budget=fisher.memory_budget,
                out=target,
            )
            share = len(part) / rows
            if share < 1.0:
                target.mul_(math.sqrt(share))
            mean += share * sample.mean
            loss += share * sample.loss
        if self.options.centred and rows > 1:
            factor -= (mean / math.sqrt(rows)).to(factor.dtype)
        return factor, mean / size, loss

    def _choose(
        self, model: StageModel, state: StageState, n_kept: int, number: int, *, regrow: bool
    ) -> tuple[Mask, float, tuple[str, ...]]:
        """(mask (n,), objective, repairs): which weights go."""
        active = ~state.pruned
        if regrow and self.options.regrow > 0:
            active |= model.most_wanted(state.pruned, int(self.options.regrow * n_kept))
        problem, index = model.problem(active, int(active.sum()) - n_kept, self.fisher.damping)
        problem = problem.with_objective(self.objective)
        if Capability.LINEAR_TERM not in self.solver.capabilities:
            problem = problem.without_gradient()
        start = None
        if n_kept == state.n_kept and Capability.WARM_START in self.solver.capabilities:
            start = state.pruned[index]

        def calibration_loss(mask: Mask) -> float:
            trial = model.weights.copy()
            trial[index[mask]] = 0.0
            return self.loss(trial)

        solution = solve(
            problem,
            self.solver,
            seed=_number(self.seed, number, _SOLVER),
            start=start,
            calibration_loss=calibration_loss,
            allocation=self.allocation,
            with_refit=False,
        )
        pruned = np.ones(self.layers.n, dtype=bool)
        pruned[index[~solution.pruned]] = False
        return pruned, solution.objective, solution.repairs

    def _step(self, model: StageModel, pruned: Mask, loss_now: float | None, damping: float) -> _Step:
        """The refit of a mask, searched; `loss_now` is the loss that a polishing step must beat."""
        # Removed weights that are not zero yet still push the kept ones; all others play no role.
        involved = ~pruned | (model.weights != 0.0)
        problem, index = model.problem(involved, int((pruned & involved).sum()), damping)
        refits = DampedRefits(problem, pruned[index])
        start = np.where(pruned, 0.0, model.weights)
        same = loss_now is not None and np.array_equal(start, model.weights)
        masked = loss_now if loss_now is not None and same else self.loss(start)

        def step(factor: float) -> Array:
            full = np.zeros_like(start)
            full[index] = refits.step(factor)
            return full

        found = search_step(start, step, self.loss, self.options)
        searched = self.options.search_damping or self.options.search_step
        if found.loss < (masked if loss_now is None else loss_now) or not searched:
            return _Step(found.weights, damping * found.factor, found.length, found.loss, masked)
        if loss_now is None:
            # The damage just done leaves the next stage more to gain, so its search starts where this one did.
            return _Step(start, damping, 0.0, masked, masked)
        raised = damping * (DAMPING_FACTOR if self.options.search_damping else 1.0)
        return _Step(model.weights, raised, 0.0, loss_now, masked)

    def _reestimate(self, number: int) -> None:
        """Batch-norm statistics over fresh samples."""
        generator = _generator(self.seed, number, _NORMS)
        torch_generator = torch.Generator().manual_seed(_number(self.seed, number, _NORMS))
        index = generator.permutation(self.fit_index)[: self.options.batch_norm_samples]
        size = _EVALUATION_BATCH.get(self.device.type, 500) // 2
        pieces = [index[i : i + size] for i in range(0, len(index), size)]
        if len(pieces) > 1 and len(pieces[-1]) < size // 2:
            # The batches count alike, so a small one would weigh too much.
            pieces.pop()
        reestimate(self.model, self.forward, (self._batch(piece, torch_generator) for piece in pieces))


@dataclass(frozen=True, eq=False)
class _Step:
    """New weights, λ for the next stage, length (0 = rejected), loss, loss under the mask alone."""

    weights: Array
    damping: float
    length: float
    loss: float
    masked: float


class _Clock:
    """Wall time since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def _generator(seed: int, stage: int, use: int) -> np.random.Generator:
    """Random numbers for one use in one stage."""
    return np.random.default_rng([seed, stage, use])


def _number(seed: int, stage: int, use: int) -> int:
    """A seed for one use in one stage."""
    return int(_generator(seed, stage, use).integers(1 << 31))


def _draw(index: Index, rows: int, size: int, generator: np.random.Generator) -> Index:
    """Sample numbers (rows, size): consecutive pieces of random permutations of `index`."""
    passes = [generator.permutation(index) for _ in range(-(-rows * size // len(index)))]
    return np.concatenate(passes)[: rows * size].reshape(rows, size)
