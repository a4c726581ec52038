"""How weights are chosen and what becomes of those that stay: budget, solver, objective, update, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from cbs_opt.engine.distill import Distill
from cbs_opt.engine.fine_tune import FineTune
from cbs_opt.engine.update import Update, check_scale
from cbs_opt.measure.costs import CostBudget, budget_of
from solvers import Capability, Objective, Solver, make_solver
from solvers.allocation import ALLOCATIONS
from solvers.arguments import instance, integer, number, one_of, seconds, seed_of, sparsity_of
from solvers.arrays import Mask
from solvers.budget import Pattern, Sparsity
from solvers.errors import CapabilityError, OptionError
from solvers.solver import Need

#: Allocations that ask the network itself, layer by layer.
MEASURED, BEST = "measured", "best"
#: What may become of the running statistics of batch norms.
BATCH_NORMS = ("keep", "reestimate")


class Extent(IntEnum):
    """How much has to be measured, or was; each includes those before."""

    WEIGHTS = 0
    GRADIENT = 1
    CURVATURE = 2

    def __str__(self) -> str:
        return ("weights", "mean gradient", "curvature")[self.value]


@dataclass(frozen=True, eq=False, init=False)
class Choice:
    """What is asked of a solver and of the update.

    Parameters
    ----------
    sparsity : float in [0, 1), optional
        Fraction of the prunable weights to remove; int(n·(1 − sparsity)) weights stay.
    n_kept : int, optional
        The number of weights that stay.
    budget : CostBudget, Pattern or str, optional
        `cbs_opt.Flops`, `cbs_opt.Bytes` or ``"flops:0.5"``: what the weights that stay may cost, as a share of what all
        prunable ones do. Or a pattern of `solvers.budget`: ``"2:4"`` along the inputs of every row, ``"channels:0.5"``
        of the rows, ``"columns:0.5"``, ``"4x4:0.5"`` of the tiles (shares that go: of all layers together, or of each
        where layers are pruned one by one). Exactly one of the three is given.
    solver : str or Solver
        See `solvers.available_solvers`; options in brackets, ``"greedy_ls[window=20]"``.
    objective : {"selection", "joint"}, optional
        What the solver minimises; see `goal` for what None takes.
    update : {"combinatorial", "searched", "single", "own", "none"}
        How the kept weights are re-optimised; see `cbs_opt.engine.update`.
    update_scale : float
        Multiplies the step of the kept weights.
    allocation : str or sequence of str, optional
        How to split the budget over blocks for solvers that cannot share one. Layer by layer, how much each layer
        loses: also ``"measured"``, ``"best"``, or several names of which the best is taken; see
        `cbs_opt.engine.shares`.
    time_limit : float, optional
        Seconds, for solvers that keep one.
    start : bool (n,), optional
        A mask to start from, True = removed, in the order of the network.
    seed : int, optional
        Of the solver; None takes that of the setup.
    min_kept : int or float in (0, 1), optional
        So many weights of every layer, or this share of them, stay at least; smaller layers whole. None is 1 where at
        least as many weights stay as there are layers, so that a path leads through each, and else 0, which sets no
        floor; see `cbs_opt.engine.floors`.
    min_kept_per_row : int
        So many weights of every row (what leads to one output) stay at least, instead of `min_kept`.
    batch_norm : {"keep", "reestimate"}
        Whether the running statistics of batch norms stay those of the dense network, or are re-estimated on the
        calibration data once weights are gone; of stages `StageOptions.batch_norm` says so.
    distill : Distill, optional
        After all else kept weights are moved towards the dense network's outputs.
    finetune : FineTune or float, optional
        Or the network is trained, its masks held: afterwards, in stages after each of them. A number is one of epochs.

    Raises
    ------
    OptionError, UnknownNameError
    CapabilityError
        For update "own" and a solver that proposes no weights.
    """

    sparsity: float | None
    n_kept: int | None
    budget: CostBudget | Pattern | None
    solver: Solver
    objective: Objective | None
    update: Update
    update_scale: float
    allocation: str | tuple[str, ...] | None
    time_limit: float | None
    start: Mask | None
    seed: int | None
    min_kept: int | float | None
    min_kept_per_row: int
    distill: Distill | None
    batch_norm: str
    finetune: FineTune | None

    def __init__(
        self,
        sparsity: float | None = None,
        n_kept: int | None = None,
        solver: str | Solver = "greedy_ls",
        objective: Objective | str | None = None,
        update: Update | str = Update.COMBINATORIAL,
        update_scale: float = 1.0,
        allocation: str | Sequence[str] | None = None,
        time_limit: float | None = None,
        start: Mask | None = None,
        seed: int | None = None,
        min_kept: int | float | None = None,
        min_kept_per_row: int = 0,
        distill: Distill | None = None,
        batch_norm: str = "keep",
        budget: CostBudget | Pattern | str | None = None,
        finetune: FineTune | float | None = None,
    ) -> None:
        if sum(value is not None for value in (sparsity, n_kept, budget)) != 1:
            raise OptionError(
                f"give one of sparsity, n_kept and budget, not sparsity={sparsity!r}, n_kept={n_kept!r} and "
                f"budget={budget!r}"
            )
        limit = None if budget is None else budget_of(budget)
        if isinstance(limit, Sparsity):
            sparsity, limit = limit.share, None
        if start is not None and (not isinstance(start, np.ndarray) or start.dtype != np.bool_):
            raise OptionError(f"start must be a numpy array of bool, True = removed, not {type(start).__name__}")
        chosen, how = make_solver(solver), Update.parse(update)
        if how is Update.OWN and Capability.OWN_WEIGHTS not in chosen.capabilities:
            raise CapabilityError(
                f"update 'own' keeps the weights that a solver proposes, and solver {chosen.name!r} proposes none; use "
                "update='combinatorial', or a solver that does, e.g. 'sweep'"
            )
        grouped = isinstance(limit, CostBudget) and limit.groups
        if grouped and (min_kept or min_kept_per_row):
            raise OptionError(
                f"budget={str(limit)!r} removes {grouped} whole, and floors are of single weights; leave min_kept and "
                "min_kept_per_row out"
            )
        if isinstance(limit, Pattern) and (min_kept or min_kept_per_row):
            raise OptionError(
                f"budget={str(limit)!r} says what stays of each row; leave min_kept and min_kept_per_row out"
            )
        if min_kept and min_kept_per_row:
            raise OptionError(
                f"give one of min_kept={min_kept!r} and min_kept_per_row={min_kept_per_row!r}; the second keeps "
                "weights of every layer too"
            )
        if distill is not None and finetune is not None:
            raise OptionError(
                "distill and finetune are two ways to train afterwards; for both losses use "
                "finetune=FineTune(..., distill=0.5)"
            )
        values = {
            "sparsity": None if sparsity is None else sparsity_of(sparsity),
            "n_kept": None if n_kept is None else integer("n_kept", n_kept, 0),
            "budget": limit,
            "solver": chosen,
            "objective": None if objective is None else Objective.parse(objective),
            "update": how,
            "update_scale": check_scale(update_scale),
            "allocation": None if allocation is None else _allocation_of(allocation),
            "time_limit": seconds(time_limit),
            "start": start,
            "seed": None if seed is None else seed_of(seed),
            "min_kept": None if min_kept is None else _floor_of(min_kept),
            "min_kept_per_row": integer("min_kept_per_row", min_kept_per_row, 0),
            "distill": None if distill is None else instance("distill", distill, Distill),
            "finetune": None if finetune is None else FineTune.of(finetune),
            "batch_norm": one_of("treatment of batch norm", batch_norm, BATCH_NORMS),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def shared(self) -> str | None:
        """The allocation, of one problem that is solved at once.

        Raises
        ------
        OptionError
            For those that are found layer by layer.
        """
        if self.allocation is None or (isinstance(self.allocation, str) and self.allocation in ALLOCATIONS):
            return self.allocation
        raise OptionError(
            f"allocation={self.allocation!r} is found by pruning layers one by one; use curvature='layer_inputs' or "
            f"'kfac', or one of {', '.join(ALLOCATIONS)}"
        )

    def kept(self, n: int) -> int:
        """How many of `n` weights stay; raises OptionError if there are fewer.

        Under a budget, which may settle no number, about as many: as if all weights cost the same.
        """
        if self.budget is not None:
            return int(n * self.budget.kept)
        if self.sparsity is not None:
            return int(n * (1.0 - self.sparsity))
        assert self.n_kept is not None
        if self.n_kept > n:
            raise OptionError(f"n_kept must lie in [0, {n}], the number of prunable weights, not {self.n_kept}")
        return self.n_kept

    @property
    def costs(self) -> CostBudget | None:
        """The budget, if it is one of costs."""
        return self.budget if isinstance(self.budget, CostBudget) else None

    @property
    def whole(self) -> bool:
        """Whether the budget is of groups, or leaves weights to each, so that no layer has a floor of its own."""
        return self.pattern is not None or (self.costs is not None and self.costs.groups is not None)

    @property
    def pattern(self) -> Pattern | None:
        """The budget, if it is a pattern."""
        return self.budget if isinstance(self.budget, Pattern) else None

    @property
    def selects(self) -> Extent:
        """What the solver and the allocation look at."""
        if Need.CURVATURE in self.solver.needs or self.allocation not in (None, "uniform", "magnitude"):
            return Extent.CURVATURE
        return Extent.GRADIENT if Need.GRADIENT in self.solver.needs else Extent.WEIGHTS

    @property
    def needs(self) -> Extent:
        """What the choice and the update look at."""
        return self.selects if self.update is Update.NONE else Extent.CURVATURE

    def goal(self, staged: bool = False) -> Objective:
        """The objective asked for; else selection where the solver supports it, in stages joint where it does."""
        if self.objective is not None:
            return self.objective
        first, second = Objective.SELECTION, Objective.JOINT
        if staged:
            first, second = second, first
        return first if Capability(first.value) in self.solver.capabilities else second


def _allocation_of(value: object) -> str | tuple[str, ...]:
    """A rule, or several, no matter in what kind of sequence."""
    if isinstance(value, str):
        return one_of("allocation", value, (*ALLOCATIONS, MEASURED, BEST))
    if not isinstance(value, Sequence):
        raise OptionError(f"allocation is a name or several, not {type(value).__name__}")
    names = tuple(one_of("allocation", name, (*ALLOCATIONS, MEASURED)) for name in value)
    if len(names) < 2 or len(set(names)) < len(names):
        raise OptionError(f"several allocations to choose among are two or more different names, not {list(value)}")
    return names


def _floor_of(value: int | float) -> int | float:
    """A number of weights, or a share of a layer."""
    if isinstance(value, float):
        share = number("min_kept", value, remedy="a number of weights, or a share of a layer in (0, 1)")
        if not 0.0 < share < 1.0:
            raise OptionError(
                f"min_kept as a share of each layer lies in (0, 1), not {share!r}; a number is an integer"
            )
        return share
    return integer("min_kept", value, 0)
