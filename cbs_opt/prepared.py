"""A network with its quadratic model, ready to be pruned any number of times.

Gradients cost most of the time and do not depend on solver, sparsity or update:

    prepared = cbs_opt.prepare(model, data, loss_fn, fisher=FisherOptions(n_rows=1000, damping=1e-3))
    for sparsity in (0.8, 0.9):
        result = prepared.prune(sparsity=sparsity, solver="greedy_ls", update="combinatorial")

The steps of `Prepared.prune` are there one by one, for loops such as the stages: `problem`, `solve`, `update`,
`result`; `relinearised` gives the quadratic model at other weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cbs_opt.calibration import CalibrationData, CalibrationOptions, Forward, LossFunction
from cbs_opt.devices import resolve_device
from cbs_opt.fisher import FisherBlocks, FisherOptions, build_blocks
from cbs_opt.gradients import GradientSample, Progress, sample_gradients
from cbs_opt.layers import PrunableLayers, find_layers
from cbs_opt.losses import MOST_SAMPLES, LossMeter
from cbs_opt.masks import apply_masks, remove_masks
from cbs_opt.network_checks import check_mode
from cbs_opt.results import PruneResult, assemble
from cbs_opt.update import Update, Updated, check_scale, update_weights
from solvers import Capability, Objective, SelectionProblem, Solution, Solver, make_solver, solve
from solvers.errors import ModelError, OptionError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Prepared:
    """Made by `prepare`.

    Attributes
    ----------
    layers : PrunableLayers
    weights : float64 (n,)
        The prunable weights the quadratic model is built at.
    gradients : GradientSample
    fisher : FisherOptions
    blocks : FisherBlocks
    device : torch.device
    """

    def __init__(
        self,
        template: nn.Module,
        working: nn.Module,
        layers: PrunableLayers,
        data: CalibrationData,
        forward: Forward,
        meter: LossMeter,
        weights: Array,
        gradients: GradientSample,
        fisher: FisherOptions,
        device: torch.device,
        seed: int,
    ) -> None:
        self._template, self._working = template, working
        self._data, self._forward, self._meter = data, forward, meter
        self.layers, self.weights, self.gradients = layers, weights, gradients
        self.fisher, self.device, self.seed = fisher, device, seed
        self.blocks: FisherBlocks = build_blocks(gradients, torch.from_numpy(weights), layers, fisher, seed)
        self._dense_loss: float | None = None

    @property
    def n(self) -> int:
        """Number of prunable weights."""
        return self.layers.n

    @property
    def data(self) -> CalibrationData:
        """The calibration samples."""
        return self._data

    @property
    def loss_samples(self) -> int:
        """Samples that calibration losses are taken over."""
        return self._meter.n_samples

    @property
    def model(self) -> nn.Module:
        """The private network that losses and gradients are computed with; its weights change with every loss."""
        return self._working

    @property
    def dense_loss(self) -> float:
        """Mean calibration loss at `weights`."""
        if self._dense_loss is None:
            self._dense_loss = self.loss(self.weights)
        return self._dense_loss

    def loss(self, weights: Array) -> float:
        """Mean calibration loss with other prunable weights (n,), in the order of the network."""
        return self._meter.of_weights(weights)

    def problem(
        self,
        *,
        sparsity: float | None = None,
        n_kept: int | None = None,
        objective: Objective | str = Objective.SELECTION,
    ) -> SelectionProblem:
        """The selection problem at a sparsity, or for an exact number of weights to keep."""
        return SelectionProblem(self.blocks.blocks, self._n_prune(sparsity, n_kept), objective)

    def calibration_loss(self, pruned: Mask) -> float:
        """Mean calibration loss under a mask (n,) in the order of the blocks, the kept weights as they are."""
        mask = self.blocks.partition.to_network(pruned)
        return self.loss(np.where(mask, 0.0, self.weights))

    def solve(
        self,
        *,
        sparsity: float | None = None,
        n_kept: int | None = None,
        solver: str | Solver = "greedy_ls",
        objective: Objective | str | None = None,
        time_limit: float | None = None,
        allocation: str | None = None,
        start: Mask | None = None,
        seed: int | None = None,
        with_refit: bool = False,
    ) -> tuple[SelectionProblem, Solution]:
        """Choose the weights to remove.

        Parameters
        ----------
        sparsity, n_kept
            Exactly one of them.
        solver : str or Solver
        objective : {"selection", "joint"}, optional
            None takes the selection objective where the solver supports it, else the joint one.
        start : bool (n,), optional
            A mask to start from, in the order of the network.
        with_refit : bool
            Also judge a selection by the joint objective.

        Raises
        ------
        CBSError
            As `solvers.solve`.
        """
        chosen = make_solver(solver)
        problem = self.problem(sparsity=sparsity, n_kept=n_kept, objective=pick_objective(chosen, objective))
        if start is not None:
            start = self.blocks.partition.to_groups(np.asarray(start))
        solution = solve(
            problem,
            chosen,
            time_limit=time_limit,
            seed=self.seed if seed is None else seed,
            start=start,
            calibration_loss=self.calibration_loss,
            allocation=allocation,
            with_refit=with_refit,
        )
        return problem, solution

    def update(
        self,
        problem: SelectionProblem,
        solution: Solution,
        *,
        update: Update | str = Update.COMBINATORIAL,
        scale: float = 1.0,
    ) -> Updated:
        """New values of the kept weights, in the order of the blocks."""
        return update_weights(problem, solution.pruned, update, scale=scale)

    def result(
        self,
        problem: SelectionProblem,
        solution: Solution,
        *,
        update: Update | str = Update.COMBINATORIAL,
        scale: float = 1.0,
        seed: int | None = None,
    ) -> PruneResult:
        """Update the kept weights and put everything into a copy of the network."""
        updated = self.update(problem, solution, update=update, scale=scale)
        return assemble(self, problem, solution, updated, update=Update.parse(update), scale=scale, seed=seed)

    def prune(
        self,
        *,
        sparsity: float | None = None,
        n_kept: int | None = None,
        solver: str | Solver = "greedy_ls",
        update: Update | str = Update.COMBINATORIAL,
        update_scale: float = 1.0,
        objective: Objective | str | None = None,
        time_limit: float | None = None,
        allocation: str | None = None,
        start: Mask | None = None,
        seed: int | None = None,
    ) -> PruneResult:
        """Choose, update, and put into the network; see `solve` and `cbs_opt.prune` for the arguments."""
        Update.parse(update)
        check_scale(update_scale)
        problem, solution = self.solve(
            sparsity=sparsity,
            n_kept=n_kept,
            solver=solver,
            objective=objective,
            time_limit=time_limit,
            allocation=allocation,
            start=start,
            seed=seed,
        )
        result = self.result(problem, solution, update=update, scale=update_scale, seed=seed)
        if sparsity is None:
            return result
        return replace(result, report=replace(result.report, sparsity_asked=float(sparsity)))

    def network(self, weights: Array, pruned: Mask) -> tuple[nn.Module, dict[str, Tensor]]:
        """A copy of the network with given weights and masks (n,), in the order of the network; and its masks."""
        model = copy.deepcopy(self._template)
        self.layers.write(model, weights)
        masks = self.layers.split(~pruned)
        apply_masks(model, masks)
        return model, masks

    def with_fisher(self, fisher: FisherOptions) -> Prepared:
        """The same gradients under another damping, block structure or first-order term.

        Raises
        ------
        OptionError
            If the options ask for other gradients.
        """
        changed = [
            name
            for name in ("n_rows", "batch_size", "seed", "dtype", "method")
            if getattr(fisher, name) != getattr(self.fisher, name)
        ]
        if changed:
            raise OptionError(
                f"{', '.join(changed)} would need other gradients; call cbs_opt.prepare again, or relinearised"
            )
        return self._replaced(self.weights, self.gradients, fisher)

    def relinearised(
        self,
        weights: Array,
        *,
        fisher: FisherOptions | None = None,
        seed: int | None = None,
        reuse_memory: bool = False,
        progress: Progress | None = None,
    ) -> Prepared:
        """The quadratic model at other prunable weights (n,), in the order of the network.

        Parameters
        ----------
        fisher : FisherOptions, optional
            None keeps the options.
        seed : int, optional
            Of the rows; None keeps it.
        reuse_memory : bool
            Overwrite the factor of this object, which must not be used any more.
        """
        options = fisher or self.fisher
        if seed is not None:
            options = replace(options, seed=seed)
        self.layers.write(self._working, weights)
        n_rows = options.rows_for(self._data)
        previous = self.gradients.factor
        fits = previous.shape == (n_rows, self.n) and previous.dtype == options.torch_dtype
        gradients = _gradients(
            self._working,
            self.layers,
            self._data,
            self._forward,
            options,
            self.device,
            self.seed,
            progress,
            out=previous if reuse_memory and fits else None,
        )
        # As the network holds them: the quadratic model is built at the rounded weights.
        return self._replaced(self.layers.read(self._working).numpy(), gradients, options)

    def _replaced(self, weights: Array, gradients: GradientSample, fisher: FisherOptions) -> Prepared:
        return Prepared(
            self._template,
            self._working,
            self.layers,
            self._data,
            self._forward,
            self._meter,
            weights,
            gradients,
            fisher,
            self.device,
            self.seed,
        )

    def _n_prune(self, sparsity: float | None, n_kept: int | None) -> int:
        if (sparsity is None) == (n_kept is None):
            raise OptionError(f"give either sparsity or n_kept, not sparsity={sparsity!r} and n_kept={n_kept!r}")
        if sparsity is not None:
            return self.layers.n_prune(sparsity)
        if isinstance(n_kept, bool) or not isinstance(n_kept, (int, np.integer)) or not 0 <= n_kept <= self.n:
            raise OptionError(
                f"n_kept must be an integer in [0, {self.n}], the number of prunable weights, not {n_kept!r}"
            )
        return self.n - int(n_kept)


def prepare(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction,
    *,
    fisher: FisherOptions | None = None,
    calibration: CalibrationOptions | None = None,
    include: Sequence[str] | str = ("*",),
    exclude: Sequence[str] | str = (),
    device: torch.device | str = "auto",
    seed: int = 0,
    loss_samples: int = MOST_SAMPLES,
    check: Callable[[PrunableLayers], None] | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read the data, compute the gradients and build the quadratic model.

    Parameters
    ----------
    model : nn.Module
        Not changed. Networks with batch norm must be in eval mode. Earlier pruning masks become zeros.
    data
        Calibration (training) data; see `cbs_opt.calibration`.
    loss_fn : callable
        (output, target) → mean loss over the batch; for dict batches (output, batch).
    fisher : FisherOptions, optional
    calibration : CalibrationOptions, optional
    include, exclude : patterns
        Which layers; see `cbs_opt.find_layers`.
    device : {"auto", "cpu", "cuda"} or torch.device
    seed : int
        Of rows, calibration samples and solvers, unless they have their own.
    loss_samples : int
        Calibration losses are taken over at most this many samples.
    check : callable, optional
        Called with the layers before any work; may raise.
    progress : callable, optional
        Called with (rows done, rows in all).

    Raises
    ------
    ModelError, DataError, OptionError, UnknownNameError
        For bad input, before gradients are computed.
    """
    fisher = fisher or FisherOptions()
    seed = check_seed(seed)
    calibration = calibration or CalibrationOptions(seed=seed)
    if isinstance(loss_samples, bool) or not isinstance(loss_samples, (int, np.integer)) or loss_samples < 1:
        raise OptionError(f"loss_samples must be a positive integer, not {loss_samples!r}")
    where = resolve_device(device)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not callable(loss_fn):
        raise OptionError(f"loss_fn must be a function of (output, target), not {type(loss_fn).__name__}")
    check_mode(model)
    find_layers(model, include=include, exclude=exclude)
    try:
        template = remove_masks(copy.deepcopy(model))
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied: {error}") from error
    layers = find_layers(template, include=include, exclude=exclude)
    weights = layers.read(template).numpy()
    if check is not None:
        check(layers)
    samples = CalibrationData.read(data, calibration)
    fisher.rows_for(samples)
    working = copy.deepcopy(template).to(where).eval()
    forward = Forward(working, loss_fn)
    samples = samples.cast(layers.parameters(working)[0].dtype)
    gradients = _gradients(working, layers, samples, forward, fisher, where, seed, progress)
    meter = LossMeter(working, layers, samples, forward, device=where, n_samples=loss_samples, seed=seed)
    return Prepared(template, working, layers, samples, forward, meter, weights, gradients, fisher, where, seed)


def pick_objective(solver: Solver, objective: Objective | str | None) -> Objective:
    """The objective asked for, or the selection objective where the solver supports it, else the joint one."""
    if objective is not None:
        return Objective.parse(objective)
    return Objective.SELECTION if Capability.SELECTION in solver.capabilities else Objective.JOINT


def check_seed(seed: int) -> int:
    """`seed` as an integer ≥ 0; raises OptionError."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise OptionError(f"seed must be an integer, zero or more, not {seed!r}")
    return int(seed)


def _gradients(
    working: nn.Module,
    layers: PrunableLayers,
    data: CalibrationData,
    forward: Forward,
    fisher: FisherOptions,
    device: torch.device,
    seed: int,
    progress: Progress | None,
    out: Tensor | None = None,
) -> GradientSample:
    chosen = fisher.seed if fisher.seed is not None else seed
    index = data.draw(fisher.rows_for(data), fisher.batch_size, chosen)
    return sample_gradients(
        working,
        layers,
        data,
        forward,
        index,
        device=device,
        dtype=fisher.torch_dtype,
        method=fisher.gradient_method,
        memory_budget=fisher.memory_budget,
        out=out,
        progress=progress,
    )
