"""What comes back: a backend's proposal, and the solution the framework makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from solvers.problem import Array, Mask


class Status(str, Enum):
    """How good the mask is known to be. Decided by the framework, never by a backend's own word."""

    OPTIMAL = "optimal"
    """A valid lower bound meets the recomputed objective (relative 1e-6)."""
    FEASIBLE = "feasible"
    """Exactly n_prune weights are removed; optimality is not proven."""

    def __str__(self) -> str:
        return self.value


class Reason(str, Enum):
    """Why the backend stopped."""

    COMPLETED = "completed"
    TIME_LIMIT = "time_limit"
    NODE_LIMIT = "node_limit"
    ITERATION_LIMIT = "iteration_limit"
    INTERRUPTED = "interrupted"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TracePoint:
    """A new incumbent or bound: seconds since the start, objective as the backend saw it, lower bound."""

    seconds: float
    objective: float
    bound: float = -math.inf


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a backend returns: a support and what it claims to have proven about it.

    Attributes
    ----------
    pruned : numpy bool (n,), exactly n_prune True
    bound : float
        A lower bound on the optimal objective that holds whatever the rounding; −inf for none.
    reason : Reason
    repairs : tuple of str
        Numerical repairs made on the way, in words; never silent.
    statistics : mapping of str to float
        Whatever counts are of interest (passes, nodes, swaps).
    weights : numpy float64 (n,), optional
        The backend's own values of the kept weights, zero where pruned, for users who want no refit. They are part of
        the proposal only where a method has them anyway and they are worth having.
    """

    pruned: Mask
    bound: float = -math.inf
    reason: Reason = Reason.COMPLETED
    repairs: tuple[str, ...] = ()
    statistics: Mapping[str, float] = field(default_factory=dict)
    weights: Array | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """A verified mask. Every figure was computed by the framework from the mask, except `bound` (see there).

    Attributes
    ----------
    pruned : numpy bool (n,)
        True = removed; exactly ``problem.n_prune`` are.
    objective : float
        The problem's objective of this mask, float64. For the joint objective that is the value of the refit, but where
        no refit was asked for (``with_refit=False``) and the backend proposes weights of its own (`sweep`): it is then
        the value of these, `own_objective`, or under ``as_is=True`` that of the kept weights as they are where the
        backend proposes none; the refit could only lower either.
    bound : float
        The backend's proven lower bound, checked not to exceed the objective; −inf where there is none.
    gap : float
        (objective − bound) / |objective|; inf without a bound, and where the objective is 0 and the bound is not.
    status : Status
    reason : Reason
    refit_objective : float
        The joint objective after the combinatorial update of this mask; nan if it was not asked for.
    refit_weights : numpy float64 (n,) or None
        The updated weights that attain it.
    own_weights : numpy float64 (n,) or None
        The backend's own values of the kept weights, where it proposes any; zero where pruned, as is verified.
    own_objective : float
        gᵀ(v − w) + ½ (v − w)ᵀH(v − w) of them, never below `refit_objective` but for rounding; nan without them.
    seconds : float
        Wall time of the backend alone.
    solver : str
        The solver with its options, as ``solve`` accepts it.
    trace : tuple of TracePoint
    repairs : tuple of str
    statistics : mapping of str to float
    """

    pruned: Mask
    objective: float
    bound: float
    gap: float
    status: Status
    reason: Reason
    refit_objective: float
    refit_weights: Array | None
    seconds: float
    solver: str
    trace: tuple[TracePoint, ...] = ()
    repairs: tuple[str, ...] = ()
    statistics: Mapping[str, float] = field(default_factory=dict)
    own_weights: Array | None = None
    own_objective: float = math.nan

    @property
    def n_pruned(self) -> int:
        """Number of weights removed."""
        return int(self.pruned.sum())

    def __repr__(self) -> str:
        return (
            f"Solution({self.solver}: {self.status.value}, objective={self.objective:.6g}, bound={self.bound:.6g}, "
            f"gap={self.gap:.2%}, refit={self.refit_objective:.6g}, {self.seconds:.3g} s, {self.reason.value})"
        )

    def as_row(self) -> dict[str, Any]:
        """The figures as JSON-ready values (None for what is not finite)."""

        def number(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "solver": self.solver,
            "objective": number(self.objective),
            "bound": number(self.bound),
            "gap": number(self.gap),
            "status": self.status.value,
            "reason": self.reason.value,
            "refit_objective": number(self.refit_objective),
            "seconds_solve": self.seconds,
            "repairs": list(self.repairs),
        }
