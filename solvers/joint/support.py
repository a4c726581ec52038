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
    """The joint objective on one support, minimised approximately by conjugate gradients.

    Parameters
    ----------
    problem : SelectionProblem
    kept : numpy bool (n,)
    """

    def __init__(self, problem: SelectionProblem, kept: Mask) -> None:
        self.kept = kept
        self._blocks: list[tuple[QuadraticBlock, torch.Tensor, torch.Tensor, float, slice]] = []
        start = 0
        for block, where in zip(problem.blocks, problem.slices, strict=True):
            index = block.tensor_of(np.flatnonzero(kept[where]))
            columns = block.factor.index_select(1, index)
            stop = start + int(index.numel())
            self._blocks.append((block, index, columns, effective_damping(block)[0], slice(start, stop)))
            start = stop
        self._n_kept = start

    def refine(self, solution: Array, steps: int) -> tuple[Array, float]:
        """`steps` preconditioned conjugate-gradient steps from `solution` (n,), zero where pruned.

        Returns (v (n,), joint objective of v).
        """
        result = np.zeros_like(solution)
        positions = np.flatnonzero(self.kept)
        total = 0.0
        for block, index, columns, damping, where in self._blocks:
            value = block.tensor_of(solution[positions[where]])
            value, objective = _refine_block(block, index, columns, damping, value, steps)
            result[positions[where]] = value.cpu().numpy()
            total += objective
        return result, total


def _refine_block(
    block: QuadraticBlock, index: torch.Tensor, columns: torch.Tensor, damping: float, value: torch.Tensor, steps: int
) -> tuple[torch.Tensor, float]:
    """Conjugate gradients on one block's support: (v_S, joint objective)."""
    weights = block.weights[index]
    gradient = torch.zeros_like(weights) if block.gradient is None else block.gradient[index]
    residue = linalg.project(columns, value) - block.project(block.weights)
    downhill = -(linalg.back_project(columns, residue) + damping * (value - weights) + gradient)
    diagonal = block.diagonal[index] - block.damping + damping
    if value.shape[0] <= _DIRECT:
        value = value + _solve_dense(block, columns, damping, downhill)
        residue = linalg.project(columns, value) - block.project(block.weights)
        steps = 0
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
    removed = block.weights.square().sum() - weights.square().sum()
    change = value - weights
    objective = 0.5 * (residue @ residue) + 0.5 * damping * (change @ change + removed) + gradient @ change
    if block.gradient is not None:
        objective = objective - (block.gradient @ block.weights - gradient @ weights)
    return value, float(objective)


def _solve_dense(block: QuadraticBlock, columns: torch.Tensor, damping: float, right: torch.Tensor) -> torch.Tensor:
    """H_SS⁻¹ right for a small support; raises SingularHessianError."""
    dense = columns.double()
    hessian = dense.T @ dense
    hessian.diagonal().add_(damping)
    factor = linalg.cholesky(hessian, f"block {block.name!r}: H of {right.shape[0]} kept weights")
    solved: torch.Tensor = torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
    return solved
