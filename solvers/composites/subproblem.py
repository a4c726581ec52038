"""The problem that is left when all but a few weights are decided; again a `SelectionProblem`.

Let W be the freed weights, R the removed and K the kept ones outside W.

Selection. With P' ⊆ W the objective is

    ½ w_R ᵀH_RR w_R − g_Rᵀw_R  +  ½ w_P'ᵀH_P'P' w_P' − (g_P' − H_P'R w_R)ᵀ w_P' ,

so the sub-problem has the columns A_W and the gradient g'_W = g_W − H_WR w_R. K plays no part.

Joint. The kept weights stay free, so they are minimised out. With T = K ∪ W free and R removed let w̃ be the
minimiser and c its value; its gradient vanishes on T, and eliminating K leaves

    c + ½ (v_W − w̃_W)ᵀ H̃ (v_W − w̃_W) ,     H̃ = H_WW − H_WK H_KK⁻¹ H_KW = λI + λ A_Wᵀ(λI + A_KA_Kᵀ)⁻¹ A_W ,

by the push-through identity: the same form, with weights w̃_W, no gradient, the same damping and the factor
√λ L⁻¹A_W where LLᵀ = λI + A_KA_Kᵀ. For λ → 0 the factor becomes A_W projected off the range of A_K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from solvers.arrays import Index
from solvers.block import QuadraticBlock
from solvers.curvature import Curvature, Dense, Diagonal, LowRank
from solvers.curvature.low_rank import RELATIVE_DAMPING_FLOOR
from solvers.linalg import cholesky
from solvers.problem import Mask, Objective, SelectionProblem


@dataclass(frozen=True, eq=False)
class Subproblem:
    """A sub-problem over `free` (positions in the outer numbering, ascending).

    Attributes
    ----------
    problem : SelectionProblem
        Over the freed weights in their order, with the budget that is left for them.
    constant : float
        What is added to its objective to give the outer one.
    free : int64 (m,)
    """

    problem: SelectionProblem
    constant: float
    free: Index

    def widen(self, pruned: Mask, part: Mask) -> Mask:
        """The outer mask `pruned` with its freed weights set to the sub-problem's mask `part`."""
        whole = pruned.copy()
        whole[self.free] = part
        return whole


def subproblem(problem: SelectionProblem, pruned: Mask, free: Index) -> Subproblem | None:
    """The sub-problem over `free`, everything else staying as in `pruned`; None where the joint one is unbounded."""
    free = np.sort(free)
    outside = pruned.copy()
    outside[free] = False
    budget = int(pruned[free].sum())
    joint = problem.objective is Objective.JOINT
    relaxed = problem.refit(outside) if joint else None
    if relaxed is not None and not math.isfinite(relaxed.value):
        return None
    constant = problem.selection_value(outside) if relaxed is None else relaxed.value
    blocks = []
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        local = free[(free >= where.start) & (free < where.stop)] - where.start
        if local.size == 0:
            continue
        index = torch.as_tensor(local, device=block.device)
        if relaxed is None:
            removed = torch.where(block.tensor_of(outside[where]), block.weights, 0.0)
            # Disjoint from W, so what lies on the diagonal of H plays no role.
            gradient = -block.multiply(removed)[index]
            if block.gradient is not None:
                gradient = gradient + block.gradient[index]
            target, curvature = block.weights[index], _compressed(block.curvature.select(index))
        else:
            kept = torch.as_tensor(~outside[where], device=block.device)
            kept[index] = False
            target = torch.as_tensor(relaxed.weights[where][local], device=block.device)
            gradient, curvature = None, _schur_complement(block, index, kept)
        blocks.append(QuadraticBlock(target, curvature=curvature, gradient=gradient, name=block.name))
    return Subproblem(SelectionProblem(blocks, budget, problem.objective), constant, free)


def _compressed(curvature: Curvature) -> Curvature:
    """The same H, a factor having no more rows than columns."""
    if not isinstance(curvature, LowRank) or curvature.rank <= curvature.n:
        return curvature
    triangle = torch.linalg.qr(curvature.factor.double(), mode="r")[1]
    return LowRank(triangle, curvature.damping)


def _schur_complement(block: QuadraticBlock, index: torch.Tensor, kept: torch.Tensor) -> Curvature:
    """H_WW − H_WK H_KK⁻¹ H_KW for W = `index` (m,) and K = `kept`, a bool mask (n,)."""
    curvature = block.curvature
    if not bool(kept.any()) or isinstance(curvature, Diagonal):
        return _compressed(curvature.select(index))
    if isinstance(curvature, LowRank):
        columns = curvature.factor_columns(index).double()
        return _compressed(LowRank(_schur_factor(curvature, columns, kept), curvature.damping))
    # Only what shares a component with W interacts with it.
    parts = curvature.component_of(torch.arange(block.n, device=block.device))
    others = (kept & torch.isin(parts, parts[index])).nonzero().squeeze(1)
    own = curvature.submatrix(index, index)
    if others.numel() == 0:
        return Dense(own)
    values, vectors = torch.linalg.eigh(curvature.submatrix(others, others))
    inside = values > others.numel() * 2.3e-16 * values[-1]
    half = vectors[:, inside].T @ curvature.submatrix(others, index) / values[inside].sqrt().unsqueeze(1)
    return Dense(own - half.T @ half)


def _schur_factor(curvature: LowRank, columns: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Ã with ÃᵀÃ + λI = H_WW − H_WK H_KK⁻¹ H_KW, float64 (r, m)."""
    others = curvature.factor_columns(kept.nonzero().squeeze(1)).double()
    if curvature.damping <= RELATIVE_DAMPING_FLOOR * float(curvature.diagonal.sum()):
        left, singular, _ = torch.linalg.svd(others, full_matrices=False)
        rank = singular > max(others.shape) * 2.3e-16 * singular[0]
        basis = left[:, rank]
        projected: torch.Tensor = columns - basis @ (basis.T @ columns)
        return projected
    kernel = others @ others.T
    kernel.diagonal().add_(curvature.damping)
    lower = cholesky(kernel, "λI + A_K A_Kᵀ")
    shrunk: torch.Tensor = math.sqrt(curvature.damping) * torch.linalg.solve_triangular(lower, columns, upper=False)
    return shrunk
