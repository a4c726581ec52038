"""What happens to the kept weights once the mask is chosen.

With P removed, S kept, E_P the columns of the identity that belong to P:

* ``none``           v_S = w_S
* ``single``         WoodFisher's update: every removal is compensated as if it were the only one,
                     δ = −H⁻¹ E_P (w_P / diag(H⁻¹)_P), then v_P = 0. With a first-order term the optimal brain surgeon
                     removes from the unconstrained minimiser u = w − H⁻¹g, so δ = −H⁻¹g − H⁻¹E_P (u_P / diag(H⁻¹)_P).
* ``own``            v as the solver leaves it, of solvers that have values of the kept weights anyway (`sweep`)
* ``combinatorial``  CBS-U, the minimiser of the quadratic model for this P (`solvers.refit`)
* ``searched``       CBS-U with the damping and the length of its step searched by the calibration loss
                     (`step_search`): far from w the model is wrong, and the network itself has the last word

and v_S = w_S + scale · δ_S. Sources: Singh and Alistarh, *WoodFisher*, NeurIPS 2020; Yu et al., ICML 2022.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch

from cbs_opt.engine.damped_refits import DampedRefits
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.engine.step_search import search_step
from solvers import QuadraticBlock, SelectionProblem, Solution
from solvers.arguments import number
from solvers.arrays import Array, Mask
from solvers.errors import BackendError, OptionError, UnknownNameError
from solvers.plain import plainly
from solvers.refit import refit


class Update(str, Enum):
    """How the kept weights are updated; see the module's docstring."""

    NONE = "none"
    OWN = "own"
    SINGLE = "single"
    COMBINATORIAL = "combinatorial"
    SEARCHED = "searched"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: Update | str) -> Update:
        """The update of that name; raises UnknownNameError."""
        try:
            return cls(value)
        except ValueError:
            raise UnknownNameError.of("update", str(value), [u.value for u in cls]) from None


@dataclass(frozen=True, eq=False)
class Updated:
    """New weights.

    Attributes
    ----------
    weights : float64 (n,)
        v, exactly zero where pruned.
    refit_objective : float
        Joint objective of the mask after CBS-U; nan where CBS-U was not computed.
    seconds : float
        Wall time.
    repairs : tuple of str
        Numerical repairs, in words.
    """

    weights: Array
    refit_objective: float
    seconds: float
    repairs: tuple[str, ...] = ()


def check_scale(scale: float) -> float:
    """`scale` as a finite number ≥ 0; raises OptionError."""
    return number("update_scale", scale, least=0, remedy="1 is the full update")


def own_update(problem: SelectionProblem, solution: Solution, scale: float = 1.0) -> Updated:
    """The solver's own weights; a budget of one mask takes no solver, and its kept weights are as they are.

    Raises
    ------
    BackendError
        If the solver has proposed none.
    """
    own = solution.own_weights
    if own is None and problem.budget.only_mask(problem.n) is None:
        raise BackendError(f"solver {solution.solver!r} declares own_weights and has proposed none; mend the solver")
    own = np.where(solution.pruned, 0.0, problem.weights if own is None else own)
    return scaled(problem, solution.pruned, Updated(own, math.nan, 0.0), scale)


@plainly
def update_weights(
    problem: SelectionProblem,
    pruned: Mask,
    update: Update | str = Update.COMBINATORIAL,
    *,
    scale: float = 1.0,
    loss: Callable[[Array], float] | None = None,
) -> Updated:
    """Update the kept weights of a mask.

    Parameters
    ----------
    problem : SelectionProblem
    pruned : numpy bool (n,), True = removed
    update : Update or str
    scale : float
        Multiplies the step of the kept weights.
    loss : callable, optional
        Weights (n,) → loss of the network on training data; ``searched`` needs it.

    Raises
    ------
    UnknownNameError, OptionError
    SingularHessianError
        For ``single`` where H has no inverse.
    """
    started = time.perf_counter()
    chosen = Update.parse(update)
    check_scale(scale)
    value = math.nan
    repairs: tuple[str, ...] = ()
    weights = problem.weights
    if chosen is Update.NONE:
        new = weights
    elif chosen is Update.OWN:
        raise OptionError("update 'own' takes the weights of a solver, which a mask has not; use 'combinatorial'")
    elif chosen is Update.SINGLE:
        parts = [_single(block, pruned[where]) for block, where in zip(problem.blocks, problem.slices, strict=True)]
        new = np.concatenate(parts)
    elif chosen is Update.SEARCHED:
        if loss is None:
            raise OptionError("update 'searched' needs a loss to search by; use cbs_opt.prune, or pass loss=")
        if scale != 1.0:
            raise OptionError(f"update 'searched' finds its own length; leave update_scale={scale:g} out")
        if min(block.damping for block in problem.blocks) <= 0.0:
            raise OptionError("update 'searched' varies the damping; pass a positive one, e.g. damping=1e-3")
        refits = DampedRefits(problem, pruned)
        new = search_step(refits.start, refits.step, loss, StageOptions()).weights
    else:
        result = refit(problem, pruned)
        new, value, repairs = result.weights, result.value, result.repairs
    updated = Updated(np.where(pruned, 0.0, new), value, time.perf_counter() - started, repairs)
    return scaled(problem, pruned, updated, scale)


def scaled(problem: SelectionProblem, pruned: Mask, updated: Updated, scale: float) -> Updated:
    """The same update with the step of the kept weights times `scale`."""
    if scale == 1.0:
        return updated
    weights = problem.weights
    return replace(updated, weights=np.where(pruned, 0.0, weights + scale * (updated.weights - weights)))


def _single(block: QuadraticBlock, pruned: Mask) -> Array:
    """w + δ of one block, float64 (n,)."""
    mask = torch.tensor(pruned, device=block.device)
    start = block.weights
    if block.gradient is not None:
        start = start - block.solve(block.gradient)
    elif not bool(mask.any()):
        return start.cpu().numpy()
    pull = torch.where(mask, start / block.inverse_diagonal, 0.0)
    return (start - block.solve(pull)).cpu().numpy()
