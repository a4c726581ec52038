"""`admm`: the alternating direction method for the joint objective (the ALPS family).

Splitting v (smooth) from s (sparse) in  min ½ vᵀHv − cᵀv  with  v = s,  |s|₀ ≤ n_kept,  c = Hw − g, gives

    v ← (H + ρD²)⁻¹ (c + ρD²(s − u)) ,      s ← the n_kept largest D|v + u| of v + u ,      u ← u + v − s .

The penalty ρ grows as the support settles (by 1.3 while more than a tenth of it changes, 1.2 above half a percent,
1.1 below), and the method ends when it no longer moves. (H + ρD²)⁻¹ is applied through the r × r system
I + A(λI + ρD²)⁻¹Aᵀ, rebuilt when ρ changes. The framework refits the last support exactly.

Source: Meng et al., *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models*,
NeurIPS 2024. The metric D (ALPS scales H to unit diagonal) is an option, see `solvers.joint.support`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from solvers import linalg
from solvers.joint.support import METRICS, keep_largest, metric_of
from solvers.joint.woodbury import effective_damping
from solvers.problem import Array, QuadraticBlock, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Solver, option

#: Iterations between changes of ρ.
_STRIDE = 3


class _Inverse:
    """x ↦ (AᵀA + diag(e))⁻¹x for one block, e > 0."""

    def __init__(self, block: QuadraticBlock, ridge: torch.Tensor) -> None:
        self.block, self.ridge = block, ridge
        rows = block.n_rows
        if bool((ridge == ridge[0]).all()):
            kernel = block.gram / ridge[0]
        else:
            kernel = torch.zeros((rows, rows), dtype=torch.float64, device=block.device)
            root = ridge.rsqrt()
            for start in range(0, block.n, max(1, min(4096, linalg.CHUNK_ENTRIES // rows))):
                part = slice(start, start + max(1, min(4096, linalg.CHUNK_ENTRIES // rows)))
                columns = block.factor[:, part]
                kernel += linalg.lower_gram(columns * root[part].to(columns.dtype), panel=256)
        kernel.diagonal().add_(1.0)
        self.factor = linalg.cholesky(kernel, f"block {block.name!r}: I + A(λI + ρD²)⁻¹Aᵀ")

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(AᵀA + diag(e))⁻¹ x."""
        scaled = x / self.ridge
        inner = torch.cholesky_solve(self.block.project(scaled).unsqueeze(1), self.factor).squeeze(1)
        return scaled - self.block.back_project(inner) / self.ridge


@dataclass(frozen=True)
class AdmmSolver(Solver):
    """Alternating directions with a growing penalty."""

    name = "admm"
    summary = "alternating direction method with a growing penalty, then refit (ALPS family)"
    reference = "Meng et al., ALPS, NeurIPS 2024"
    capabilities = frozenset(
        {
            Capability.JOINT,
            Capability.GLOBAL_BUDGET,
            Capability.LINEAR_TERM,
            Capability.TIME_LIMIT,
            Capability.WARM_START,
        }
    )

    iterations: int = option(300, "iterations at most", minimum=1)
    penalty: float = option(0.1, "first ρ, in units of the metric", minimum=1e-12)
    metric: str = option("obs", "what thresholding measures weights by", choices=METRICS)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Alternate until the support settles."""
        squared, repairs = metric_of(problem, self.metric)
        if self.metric == "identity":
            # ρ is in units of the metric, which here are none: those of the typical OBS metric, λ, are taken.
            squared = squared * float(np.mean([effective_damping(block)[0] for block in problem.blocks]))
            if not squared[0] > 0.0:
                squared = np.full(problem.n, float(problem.diagonal.mean()))
        metric = np.sqrt(squared)
        linear = problem.multiply(problem.weights)
        if problem.gradient is not None:
            linear = linear - problem.gradient
        first = problem.weights
        kept = ~context.start if context.start is not None else keep_largest(metric * np.abs(first), problem.n_kept)
        sparse = np.where(kept, first, 0.0) if context.start is not None else first.copy()
        scaled_dual = np.zeros(problem.n)
        penalty, reason, used = self.penalty, Reason.ITERATION_LIMIT, 0
        inverses = self._inverses(problem, penalty * squared)
        settled = kept
        for used in range(1, self.iterations + 1):
            if context.deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            smooth = self._solve(problem, inverses, linear + penalty * squared * (sparse - scaled_dual))
            target = smooth + scaled_dual
            kept = keep_largest(metric * np.abs(target), problem.n_kept)
            sparse = np.where(kept, target, 0.0)
            scaled_dual = target - sparse
            if used % _STRIDE:
                continue
            moved = int((kept & ~settled).sum())
            settled = kept
            if moved == 0 and used > _STRIDE:
                reason = Reason.COMPLETED
                break
            growth = 1.3 if moved >= 0.1 * problem.n_kept else 1.2 if moved >= 0.005 * problem.n_kept else 1.1
            penalty *= growth
            scaled_dual = scaled_dual / growth
            inverses = self._inverses(problem, penalty * squared)
        pruned = ~kept
        value = problem.joint_value(pruned)
        if context.start is not None and problem.joint_value(context.start) < value:
            # The alternation is not monotone; a start that was better stands.
            pruned, value = context.start, problem.joint_value(context.start)
        context.record(value)
        statistics = {"iterations": float(used), "penalty": penalty}
        return Proposal(pruned, reason=reason, repairs=tuple(repairs), statistics=statistics)

    @staticmethod
    def _inverses(problem: SelectionProblem, weight: Array) -> list[_Inverse]:
        return [
            _Inverse(block, block.tensor_of(weight[where]) + effective_damping(block)[0])
            for block, where in zip(problem.blocks, problem.slices, strict=True)
        ]

    @staticmethod
    def _solve(problem: SelectionProblem, inverses: list[_Inverse], right: Array) -> Array:
        parts = [
            inverse.apply(inverse.block.tensor_of(right[where])).cpu().numpy()
            for inverse, where in zip(inverses, problem.slices, strict=True)
        ]
        return np.concatenate(parts)
