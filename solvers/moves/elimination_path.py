"""Backward elimination on a dense joint problem, one weight at a time, with its costs.

For minimise ½ vᵀHv − cᵀv with all weights in, N = H⁻¹ and v = Nc. Removing i costs v_i²/(2N_ii); afterwards

    v ← v − N_:i v_i / N_ii ,      N ← N − N_:i N_i: / N_ii .

The rank-one changes of N are kept aside and applied by the block, so that s removals cost O(s³) at the speed of a
matrix product, although each choice is exact.

Source: Hassibi and Stork, *Second order derivatives for network pruning: Optimal Brain Surgeon*, NeurIPS 1993.
"""

from __future__ import annotations

import math

import torch

from solvers.errors import SingularHessianError
from solvers.linalg import cholesky, named
from solvers.moves.reduced import ReducedProblem

_DELAY = 48


def eliminate_dense(
    problem: ReducedProblem, count: int, name: str, quotas: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove `count` weights one after another, always the cheapest.

    Parameters
    ----------
    problem : ReducedProblem of q weights
    count : int ≤ q
    name : str
        Of the block, for messages.
    quotas : int64 tensors (q,) and (groups,), optional
        The group of each weight, and the most that may go of each; at least `count` in all.

    Returns
    -------
    order : int64 tensor (count,)
        Positions in the order of removal.
    costs : float64 tensor (count,)
        What each removal adds to the objective.

    Raises
    ------
    SingularHessianError
        If H is singular to float64.
    """
    if count == 0:
        return problem.linear.new_zeros(0, dtype=torch.int64), problem.linear.new_zeros(0)
    with named(name):
        factor = cholesky(problem.hessian, f"H of {problem.hessian.shape[0]} kept weights")
    inverse = torch.cholesky_inverse(factor)
    value = torch.cholesky_solve(problem.linear.unsqueeze(1), factor).squeeze(1)
    least = 1.0 / problem.hessian.diagonal()
    diagonal = torch.maximum(inverse.diagonal(), least)
    alive = torch.arange(value.shape[0], device=value.device)
    order: list[torch.Tensor] = []
    costs: list[torch.Tensor] = []
    left = None if quotas is None else quotas[1].clone()
    done = 0
    while done < count:
        steps = min(_DELAY, count - done)
        aside = torch.zeros((steps, alive.shape[0]), dtype=torch.float64, device=value.device)
        gone = torch.zeros(alive.shape[0], dtype=torch.bool, device=value.device)
        for step in range(steps):
            score = value.square() / diagonal
            score[gone] = math.inf
            if quotas is not None and left is not None:
                score[left[quotas[0][alive]] == 0] = math.inf
            pick = score.argmin().view(1)
            column = inverse.index_select(0, pick).squeeze(0)
            if step:
                column = column - aside[:step].index_select(1, pick).squeeze(1) @ aside[:step]
            scaled = column / torch.maximum(column.index_select(0, pick), least.index_select(0, pick)).sqrt()
            aside[step] = scaled
            order.append(alive.index_select(0, pick))
            if quotas is not None and left is not None:
                left[quotas[0][order[-1]]] -= 1
            costs.append(0.5 * score.index_select(0, pick))
            value = value - scaled * (value.index_select(0, pick) / scaled.index_select(0, pick))
            diagonal = torch.maximum(diagonal - scaled.square(), least)
            gone.index_fill_(0, pick, True)
        done += steps
        if done < count:
            stay = (~gone).nonzero().squeeze(1)
            aside = aside.index_select(1, stay)
            inverse = inverse.index_select(0, stay).index_select(1, stay)
            inverse.addmm_(aside.T, aside, alpha=-1.0)
            alive, value, diagonal, least = (x.index_select(0, stay) for x in (alive, value, diagonal, least))
    result, spent = torch.cat(order), torch.cat(costs)
    if not bool(torch.isfinite(spent).all()):
        raise SingularHessianError(f"block {name!r}: the elimination met a singular H; use a larger damping")
    return result, spent
