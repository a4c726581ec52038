"""A network with its quadratic model, ready to be pruned any number of times.

Gradients cost most of the time and do not depend on solver, sparsity or update:

    prepared = cbs_opt.prepare(model, data, loss_fn, fisher=FisherOptions(n_rows=1000, damping=1e-3))
    for sparsity in (0.8, 0.9):
        result = prepared.prune(sparsity=sparsity, solver="greedy_ls", update="combinatorial")

The steps of `Prepared.prune` are there one by one, for loops such as the stages: `problem`, `solve`, `update`,
`result`; `relinearised` gives the quadratic model at other weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cbs_opt.data.calibration import CalibrationOptions
from cbs_opt.data.forward import LossFunction
from cbs_opt.data.losses import MOST_SAMPLES
from cbs_opt.engine.update import Update, Updated, check_scale, update_weights
from cbs_opt.engine.workspace import Workspace, open_workspace
from cbs_opt.measure.fisher import FisherBlocks, FisherOptions, build_blocks
from cbs_opt.measure.gradients import GradientSample, Progress
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.report.result import PruneResult, assemble
from solvers import Capability, Objective, SelectionProblem, Solution, Solver, make_solver, solve
from solvers.errors import OptionError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Prepared:
    """Made by `prepare`.

    Attributes
    ----------
    workspace : Workspace
        The network and its calibration data.
    layers : PrunableLayers
    weights : float64 (n,)
        The prunable weights the quadratic model is built at.
    gradients : GradientSample
    fisher : FisherOptions
    blocks : FisherBlocks
    """

    def __init__(self, workspace: Workspace, weights: Array, gradients: GradientSample, fisher: FisherOptions) -> None:
        self.workspace, self.layers = workspace, workspace.layers
        self.weights, self.gradients, self.fisher = weights, gradients, fisher
        self.blocks: FisherBlocks = build_blocks(
            gradients, torch.from_numpy(weights), workspace.layers, fisher, workspace.seed
        )

    @property
    def n(self) -> int:
        """Number of prunable weights."""
        return self.layers.n

    def loss(self, weights: Array) -> float:
        """Mean calibration loss with other prunable weights (n,), in the order of the network."""
        return self.workspace.meter.of_weights(weights)

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
            seed=self.workspace.seed if seed is None else seed,
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
        partition = self.blocks.partition
        return update_weights(
            problem, solution.pruned, update, scale=scale, loss=lambda weights: self.loss(partition.to_network(weights))
        )

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
        return Prepared(self.workspace, self.weights, self.gradients, fisher)

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
        memory = self.gradients.factor if reuse_memory else None
        gradients = self.workspace.gradients(weights, options, progress=progress, out=memory)
        # As the network holds them: the quadratic model is built at the rounded weights.
        return Prepared(self.workspace, self.layers.read(self.workspace.model).numpy(), gradients, options)

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
        Calibration (training) data; see `cbs_opt.data.calibration`.
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
    workspace = open_workspace(
        model,
        data,
        loss_fn,
        fisher=fisher,
        calibration=calibration,
        include=include,
        exclude=exclude,
        device=device,
        seed=seed,
        loss_samples=loss_samples,
        check=check,
    )
    gradients = workspace.gradients(workspace.weights, fisher, progress=progress)
    return Prepared(workspace, workspace.weights, gradients, fisher)


def pick_objective(solver: Solver, objective: Objective | str | None) -> Objective:
    """The objective asked for, or the selection objective where the solver supports it, else the joint one."""
    if objective is not None:
        return Objective.parse(objective)
    return Objective.SELECTION if Capability.SELECTION in solver.capabilities else Objective.JOINT
