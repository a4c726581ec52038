"""Backward elimination of whole groups with refit: the optimal brain surgeon for neurons, channels, tiles.

Among rows that share H_r = s_r M, and whose groups lie at the same inputs, removing the inputs Q from all rows adds

    Σ_r ½ s_r v_rQᵀ ([M⁻¹]_QQ)⁻¹ v_rQ ,     v_r ← v_r − M⁻¹_:Q ([M⁻¹]_QQ)⁻¹ v_rQ ,     M⁻¹ ← M⁻¹ − M⁻¹_:Q(…)⁻¹M⁻¹_Q: ,

v the weights as refitted so far (with a gradient starting at w − H⁻¹g), and the cheapest group goes, one at a time
(Hassibi and Stork, NeurIPS 1993; for channels of layers: Meng et al., *OSSCAR*, ICML 2024). Any small problem is one
such row; the input channels of a `Kronecker` layer are one, too, of d inputs.
"""

from __future__ import annotations

import numpy as np
import torch

from solvers.arrays import Index, Mask
from solvers.budget import Groups
from solvers.curvature import Kronecker
from solvers.errors import CapabilityError
from solvers.linalg import cholesky_solve, strict_cholesky
from solvers.problem import SelectionProblem
from solvers.solver import Deadline

#: Most inputs of a row, as the inverse of their matrix is held and changed.
MOST_INPUTS = 6000


def eliminate_groups(problem: SelectionProblem, deadline: Deadline) -> tuple[Mask, bool]:
    """(the mask, whether the time sufficed): once it is over, the groups that are cheapest alone go together.

    Raises
    ------
    SingularHessianError
    CapabilityError
        For more weights than `MOST_INPUTS` that do not share a matrix.
    """
    assert isinstance(problem.budget, Groups)
    budget = problem.budget
    inverse, target, scale, labels = _shared(problem, np.asarray(budget.labels))
    members = [torch.from_numpy(found).to(target.device) for found in _members(labels, budget.n_groups)]
    alive = np.ones(budget.n_groups, dtype=bool)
    costs, completed = np.full(budget.n_groups, np.inf), True
    for step in range(budget.k):
        for group in np.flatnonzero(alive).tolist():
            costs[group] = _cost(inverse, target, scale, members[group])
        costs[~alive] = np.inf
        if deadline.expired():
            alive[np.argsort(costs, kind="stable")[: budget.k - step]] = False
            completed = False
            break
        group = int(np.argmin(costs))
        alive[group] = False
        index = members[group]
        columns = inverse[:, index]
        solved = torch.linalg.solve(inverse[index][:, index], columns.T)
        target -= target[:, index] @ solved
        inverse -= columns @ solved
        target[:, index] = 0.0
        inverse[index], inverse[:, index] = 0.0, 0.0
    return budget.widen(~alive), completed


def _shared(problem: SelectionProblem, labels: Index) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Index]:
    """(M⁻¹ (d, d), v (rows, d), s (rows,), the group of each input (d,))."""
    curvature = problem.blocks[0].curvature
    if len(problem.blocks) == 1 and isinstance(curvature, Kronecker) and curvature.n_rows > 1:
        table = labels.reshape(curvature.n_rows, curvature.n_inputs)
        if (table == table[0]).all():
            block = problem.blocks[0]
            target = block.weights.clone()
            if block.gradient is not None:
                target -= block.solve(block.gradient)
            inverse = curvature.inputs.inverse.clone()
            return inverse, target.view(curvature.n_rows, -1), curvature.row_scale, table[0]
    if problem.n > MOST_INPUTS:
        raise CapabilityError(
            f"backward elimination of groups takes {MOST_INPUTS} weights, or the input channels of one layer, not "
            f"{problem.n} weights; use the selection objective, or blocks of their own"
        )
    hessian = torch.block_diag(*[block.curvature.dense() for block in problem.blocks])  # type: ignore[no-untyped-call]
    factor = strict_cholesky(hessian, "H")
    target = problem.tensors.weights.clone()
    if problem.tensors.gradient is not None:
        target -= cholesky_solve(factor, problem.tensors.gradient)
    return torch.cholesky_inverse(factor), target.unsqueeze(0), target.new_ones(1), labels


def _members(labels: Index, count: int) -> list[Index]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=count))[:-1])


def _cost(inverse: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, index: torch.Tensor) -> float:
    inner, part = inverse[index][:, index], target[:, index]
    if index.numel() == 1:
        return float((scale * part[:, 0].square()).sum() / (2.0 * inner[0, 0]))
    return 0.5 * float((scale * (part * torch.linalg.solve(inner, part.T).T).sum(1)).sum())
