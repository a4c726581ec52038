"""The framework's own judgement of what a backend returned.

A backend proposes a support and claims a bound. Here the objective, the refit and the status are computed
from the support alone, so that no backend can report a number that is not true.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from solvers.bounds.certificate import relative_gap
from solvers.errors import BackendError
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.rational import exact_value
from solvers.refit import Refit
from solvers.solution import Proposal, Solution, Status
from solvers.solver import Context

#: Relative gap at which a mask counts as proven optimal.
OPTIMALITY_TOLERANCE = 1e-6
#: The objective is evaluated in exact arithmetic for up to this many weights where its rounding could decide.
EXACT_LIMIT = 64
_EPS = float(np.finfo(np.float64).eps)


def check_support(problem: SelectionProblem, proposal: Proposal, solver: str) -> Mask:
    """The proposed mask, made read-only; raises BackendError if it is not a feasible one."""
    pruned = proposal.pruned
    if not isinstance(pruned, np.ndarray) or pruned.dtype != np.bool_ or pruned.shape != (problem.n,):
        shape = getattr(pruned, "shape", None)
        raise BackendError(
            f"solver {solver!r} returned a mask of type {type(pruned).__name__} and shape {shape}; "
            f"it must be numpy bool of shape ({problem.n},)"
        )
    violation = problem.budget.violation(pruned)
    if violation:
        raise BackendError(f"solver {solver!r} returned a mask that does not keep the budget: {violation}")
    own = pruned.copy()
    own.flags.writeable = False
    return own


def check_weights(problem: SelectionProblem, proposal: Proposal, solver: str) -> tuple[Array | None, float]:
    """(the backend's own weights, made read-only, their objective); raises BackendError if they do not fit the mask."""
    weights = proposal.weights
    if weights is None:
        return None, math.nan
    if not isinstance(weights, np.ndarray) or weights.dtype != np.float64 or weights.shape != (problem.n,):
        raise BackendError(f"solver {solver!r} returned weights that are not numpy float64 of shape ({problem.n},)")
    if not np.isfinite(weights).all() or weights[proposal.pruned].any():
        raise BackendError(f"solver {solver!r} returned weights that are not finite, or not zero where it prunes")
    own = weights.copy()
    own.flags.writeable = False
    return own, problem.change(own) if problem.measured else math.nan


def evaluate(problem: SelectionProblem, pruned: Mask, with_refit: bool) -> tuple[float, Refit | None]:
    """(objective, refit) of a mask; the refit is made if the objective is the joint one. nan without a curvature."""
    if not problem.measured:
        return math.nan, None
    if problem.objective is Objective.JOINT:
        result = problem.refit(pruned)
        return result.value, result
    return problem.selection_value(pruned), problem.refit(pruned) if with_refit else None


def rounding_of(problem: SelectionProblem, pruned: Mask, refitted: Refit | None) -> float:
    """Roughly what rounding may change about the objective of a mask: eps (Σ √H_ii |d_i|)² + eps Σ |g_i d_i|.

    d is the change of the weights that the objective prices; weights that do not change play no role.
    """
    if problem.objective is Objective.JOINT and refitted is not None:
        step = refitted.weights - problem.weights
    else:
        step = np.where(pruned, problem.weights, 0.0)
    size = float(np.sqrt(problem.diagonal) @ np.abs(step)) ** 2
    if problem.gradient is not None:
        size += float(np.abs(problem.gradient) @ np.abs(step))
    return 4.0 * _EPS * size


def excess_of(problem: SelectionProblem, pruned: Mask, refitted: Refit | None) -> float:
    """At most what the refit may still lie above the joint objective of its mask: ½ Σ r_i²/ridge_i over the kept.

    r = g + H(v − w) vanishes on the kept weights at the best v, and H is at least its ridge. inf without a ridge.
    """
    if refitted is None:
        return 0.0
    total = 0.0
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        step = block.tensor_of(refitted.weights[where]) - block.weights
        slope = block.multiply(step)
        if block.gradient is not None:
            slope = slope + block.gradient
        slope = torch.where(block.tensor_of(pruned[where]), 0.0, slope)
        ridge = block.curvature.ridge.to(slope.device)
        total += float(torch.where(slope == 0.0, 0.0, 0.5 * slope.square() / ridge).sum())
    return total


def exactly(problem: SelectionProblem, pruned: Mask, objective: float) -> float:
    """The objective of a mask in rational arithmetic, rounded once; −inf where it is unbounded below."""
    if not math.isfinite(objective):
        return objective
    value = exact_value(problem, pruned)
    return -math.inf if value is None else float(value)


def certify(
    objective: float, bound: float, solver: str, rounding: float = 0.0, excess: float = 0.0
) -> tuple[float, float, Status]:
    """(bound, gap, status) from a claimed bound; every tolerance is relative to the objective's own value.

    Parameters
    ----------
    objective : float
    bound : float
        −inf where none is claimed.
    solver : str
    rounding : float
        What the objective may be off by: where that is more than the tolerance nothing is proven.
    excess : float
        How far the best objective of the same mask may lie below this one.

    Raises
    ------
    BackendError
        If the claimed bound is nan or lies above the objective beyond rounding: it is then wrong.
    """
    if math.isnan(bound):
        raise BackendError(f"solver {solver!r} returned a bound that is not a number")
    if math.isnan(objective):
        return -math.inf, math.inf, Status.FEASIBLE
    tolerance = OPTIMALITY_TOLERANCE * abs(objective)
    if bound > objective + tolerance + rounding:
        raise BackendError(
            f"solver {solver!r} claims the lower bound {bound!r} for a mask whose objective is {objective!r}; "
            "the bound is wrong"
        )
    bound = min(bound, objective - excess)
    gap = relative_gap(objective, bound)
    proven = math.isfinite(bound) and gap <= OPTIMALITY_TOLERANCE and rounding <= tolerance
    if not proven and math.isfinite(gap) and objective:
        gap = max(gap, rounding / abs(objective))
    return float(bound), gap, Status.OPTIMAL if proven else Status.FEASIBLE


def verified(
    problem: SelectionProblem, proposal: Proposal, context: Context, solver: str, with_refit: bool, as_is: bool = False
) -> Solution:
    """The solution that a proposal makes; raises BackendError for what is not true."""
    seconds = context.deadline.elapsed()
    pruned = check_support(problem, proposal, solver)
    own_weights, own_objective = check_weights(problem, proposal, solver)
    joint = problem.objective is Objective.JOINT and problem.measured
    if joint and not with_refit and own_weights is not None:
        objective, refitted = own_objective, None
    elif joint and as_is:
        objective, refitted = problem.selection_value(pruned), None
    else:
        objective, refitted = evaluate(problem, pruned, with_refit)
    rounding = excess = 0.0
    if math.isfinite(proposal.bound) and math.isfinite(objective):
        rounding = rounding_of(problem, pruned, refitted)
        excess = excess_of(problem, pruned, refitted) if problem.objective is Objective.JOINT else 0.0
        if rounding + excess > 0.1 * OPTIMALITY_TOLERANCE * abs(objective) and problem.n <= EXACT_LIMIT:
            seen, slack = objective, OPTIMALITY_TOLERANCE * abs(objective) + rounding
            objective, rounding, excess = exactly(problem, pruned, objective), 0.0, 0.0
            if objective + OPTIMALITY_TOLERANCE * abs(objective) < proposal.bound <= seen + slack:
                note = "the claimed bound lies above the exact objective by what float64 rounds away: nothing is proven"
                proposal = replace(proposal, bound=-math.inf, repairs=(*proposal.repairs, note))
        # Without a ridge nothing is known of H; what the residual says was looked at when the refit was made.
        excess = excess if math.isfinite(excess) else 0.0
    bound, gap, status = certify(objective, proposal.bound, solver, rounding, excess)
    return Solution(
        pruned=pruned,
        objective=objective,
        bound=bound,
        gap=gap,
        status=status,
        reason=proposal.reason,
        refit_objective=math.nan if refitted is None else refitted.value,
        refit_weights=None if refitted is None else refitted.weights,
        seconds=seconds,
        solver=solver,
        trace=tuple(context.trace),
        repairs=(*proposal.repairs, *(refitted.repairs if refitted else ())),
        statistics=dict(proposal.statistics),
        own_weights=own_weights,
        own_objective=own_objective,
    )
