"""`admm`: the alternating direction method for the joint objective (the ALPS family).

Splitting v (smooth) from s (sparse) in  min ½ vᵀHv − cᵀv  with  v = s,  |s|₀ ≤ n_kept,  c = Hw − g, gives

    v ← (H + ρD²)⁻¹ (c + ρD²(s − u)) ,      s ← the n_kept largest D|v + u| of v + u ,      u ← u + v − s .

The penalty ρ grows as the support settles (by 1.3 while more than a tenth of it changes, 1.2 above half a percent,
1.1 below), and the method ends when it no longer moves. How (H + ρD²)⁻¹ is applied is the curvature's
business (`Curvature.shifted_inverse`); it is rebuilt when ρ changes. The framework refits the last support exactly.

Source: Meng et al., *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models*,
NeurIPS 2024. The metric D (ALPS scales H to unit diagonal) is an option, see `solvers.joint.support`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from solvers.joint.support import METRICS, keep_largest, metric_of, search_problem
from solvers.linalg import Apply, named
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANYTIME, JOINT_PROBLEM, Context, Solver, option
from solvers.tensors import ProblemTensors

#: Iterations between changes of ρ.
_STRIDE = 3


@dataclass(frozen=True)
class AdmmSolver(Solver):
    """Alternating directions with a growing penalty."""

    name = "admm"
    summary = "alternating direction method with a growing penalty, then refit (ALPS family)"
    reference = "Meng et al., ALPS, NeurIPS 2024"
    capabilities = JOINT_PROBLEM | ANYTIME

    iterations: int = option(300, "iterations at most", minimum=1)
    penalty: float = option(0.1, "first ρ, in units of the metric", minimum=1e-12)
    metric: str = option("obs", "what thresholding measures weights by", choices=METRICS)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Alternate until the support settles."""
        vectors, repairs = search_problem(problem)
        squared = metric_of(vectors, self.metric)
        if self.metric == "identity":
            # ρ is in units of the metric, which here are none: those of the typical OBS metric, λ, are taken.
            typical = sum(block.damping for block in vectors.blocks) / len(vectors.blocks)
            squared = squared * (typical if typical > 0.0 else float(vectors.diagonal.mean()))
        metric, linear = squared.sqrt(), vectors.linear
        if context.start is None:
            kept = keep_largest(metric * vectors.weights.abs(), problem.n_kept)
            sparse = vectors.weights
        else:
            kept = ~vectors.of(context.start)
            sparse = torch.where(kept, vectors.weights, 0.0)
        scaled_dual = torch.zeros_like(sparse)
        penalty, reason, used = self.penalty, Reason.ITERATION_LIMIT, 0
        inverses = _inverses(vectors, penalty * squared)
        settled = kept
        for used in range(1, self.iterations + 1):
            if context.deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            right = linear + penalty * squared * (sparse - scaled_dual)
            parts = zip(inverses, vectors.split(right), strict=True)
            target = torch.cat([inverse(part) for inverse, part in parts]) + scaled_dual
            kept = keep_largest(metric * target.abs(), problem.n_kept)
            sparse = torch.where(kept, target, 0.0)
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
            inverses = _inverses(vectors, penalty * squared)
        pruned = (~kept).cpu().numpy()
        value = problem.joint_value(pruned)
        if context.start is not None:
            first = problem.joint_value(context.start)
            if first < value:
                # The alternation is not monotone; a start that was better stands.
                pruned, value = context.start, first
        context.record(value)
        statistics = {"iterations": float(used), "penalty": penalty}
        return Proposal(pruned, reason=reason, repairs=tuple(repairs), statistics=statistics)


def _inverses(vectors: ProblemTensors, ridge: torch.Tensor) -> list[Apply]:
    """(H + diag(ridge))⁻¹ of every block."""
    found = []
    for block, part in zip(vectors.blocks, vectors.split(ridge), strict=True):
        with named(block.name):
            found.append(block.curvature.shifted_inverse(part))
    return found
