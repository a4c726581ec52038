"""What the thresholding solvers (`iht`, `admm`) share: metrics, and approximate refits on a support.

Thresholding keeps the largest D_i|v_i|. The metric D² decides what "large" means:

* ``identity``  D² = 1, plain magnitude;
* ``diagonal``  D_i² = H_ii, the saliency that ignores interaction;
* ``obs``       D_i² = 1/[H⁻¹]_ii, the saliency of the optimal brain surgeon, between the two.
"""

from __future__ import annotations

import numpy as np
import torch

from solvers import linalg
from solvers.joint.woodbury import KeptSystem, effective_damping
from solvers.problem import Array, Mask, QuadraticBlock, SelectionProblem

METRICS = ("obs", "diagonal", "identity")


#: Supports of up to this many weights are refitted exactly instead of by conjugate gradients.
_DIRECT = 400
#: So are supports of blocks with up to this many rows, through the r × r system.
_DIRECT_ROWS = 3000


def metric_of(problem: SelectionProblem, kind: str) -> tuple[Array, list[str]]:
    """(D² (n,), repairs); all blocks in the units of H so that they compete fairly."""
    repairs: list[str] = []
    parts: list[Array] = []
    for block in problem.blocks:
        damping, repair = effective_damping(block)
        if repair:
            repairs.append(repair)
        if kind == "identity":
            parts.append(np.ones(block.n))
        elif kind == "diagonal":
            parts.append((block.diagonal - block.damping + damping).cpu().numpy())
        elif block.n <= block.n_rows and not repair:
            parts.append((1.0 / block.inverse_diagonal).cpu().numpy())
        else:
            system = KeptSystem(block, torch.ones(block.n, dtype=torch.bool, device=block.device), damping)
            _, shrink = system.measure(torch.arange(block.n, device=block.device))
            floor = damping / (block.diagonal - block.damping + damping)
            parts.append((damping / torch.maximum(1.0 - shrink, floor)).cpu().numpy())
    return np.concatenate(parts), repairs


def keep_largest(scores: Array, n_kept: int) -> Mask:
    """The kept mask of the `n_kept` largest scores; ties are pruned from the lower index on."""
    kept = np.ones(scores.shape[0], dtype=bool)
    kept[np.argsort(scores, kind="stable")[: scores.shape[0] - n_kept]] = False
    return kept


class SupportModel:
    """The joint objective on one support, minimised exactly or by conjugate gradients.

    Small systems (few rows or few kept weights) are solved exactly; beyond, conjugate gradients are run from where
    the caller stands.

    Parameters
    ----------
    problem : SelectionProblem
    kept : numpy bool (n,)
    """

    def __init__(self, problem: SelectionProblem, kept: Mask) -> None:
        self.problem, self.kept = problem, kept

    def refine(self, solution: Array, steps: int) -> tuple[Array, float]:
        """(v (n,), joint objective of v) exactly, or after `steps` steps from `solution` (n,)."""
        result = np.zeros_like(solution)
        total = 0.0
        for block, where in zip(self.problem.blocks, self.problem.slices, strict=True):
            kept = block.tensor_of(self.kept[where])
            damping, _ = effective_damping(block)
            if block.n_rows <= _DIRECT_ROWS and int(kept.sum()) > _DIRECT:
                system = KeptSystem(block, kept, damping)
                value, objective = system.solution(), system.objective()
            else:
                value, objective = _refine_block(block, kept, damping, block.tensor_of(solution[where]), steps)
            result[where] = value.cpu().numpy()
            total += objective
        return result, total


def _refine_block(
    block: QuadraticBlock, kept: torch.Tensor, damping: float, start: torch.Tensor, steps: int
) -> tuple[torch.Tensor, float]:
    """One block by a dense solve or by conjugate gradients: (v (n,), joint objective)."""
    index = kept.nonzero().squeeze(1)
    columns = block.factor.index_select(1, index)
    weights, value = block.weights[index], start[index]
    gradient = torch.zeros_like(weights) if block.gradient is None else block.gradient[index]
    target = block.project(block.weights)
    residue = linalg.project(columns, value) - target
    downhill = -(linalg.back_project(columns, residue) + damping * (value - weights) + gradient)
    if value.shape[0] <= _DIRECT:
        value = value + _solve_dense(block, columns, damping, downhill)
        residue = linalg.project(columns, value) - target
        steps = 0
    diagonal = block.diagonal[index] - block.damping + damping
    direction = torch.zeros_like(value)
    previous = first = 1.0
    for step in range(steps):
        scaled = downhill / diagonal
        inner = float(downhill @ scaled)
        first = inner if step == 0 else first
        if inner <= 1e-28 * first:
            break
        direction = scaled if step == 0 else scaled + (inner / previous) * direction
        previous = inner
        image = linalg.project(columns, direction)
        curvature = float(image @ image + damping * (direction @ direction))
        if curvature <= 0.0:
            break
        length = inner / curvature
        value = value + length * direction
        residue = residue + length * image
        downhill = downhill - length * (linalg.back_project(columns, image) + damping * direction)
    result = torch.zeros_like(start)
    result[index] = value
    change = result - block.weights
    objective = 0.5 * (residue @ residue) + 0.5 * damping * (change @ change)
    if block.gradient is not None:
        objective = objective + block.gradient @ change
    return result, float(objective)


def _solve_dense(block: QuadraticBlock, columns: torch.Tensor, damping: float, right: torch.Tensor) -> torch.Tensor:
    """H_SS⁻¹ right for a small support; raises SingularHessianError."""
    dense = columns.double()
    hessian = dense.T @ dense
    hessian.diagonal().add_(damping)
    factor = linalg.cholesky(hessian, f"block {block.name!r}: H of {right.shape[0]} kept weights")
    solved: torch.Tensor = torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
    return solved
