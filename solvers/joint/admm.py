"""`admm`: the alternating direction method for the joint objective (the ALPS family).

In the coordinates y = Dv of a metric D, splitting y (smooth) from z (sparse) in  min ½ yᵀH̃y − c̃ᵀy  with  y = z  and z
within the budget,  H̃ = D⁻¹HD⁻¹,  c̃ = D⁻¹(Hw − g),  gives

    y ← (H̃ + ρI)⁻¹ (c̃ + ρ(z − u)) ,      z ← y + u but for the weights that cost the budget least |y + u| ,
    u ← u + y − z .

The penalty ρ grows as the support settles (by 1.3 while more than a tenth of it changes, 1.2 above half a percent,
1.1 below), and the method ends when it no longer moves. How (H̃ + ρI)⁻¹ is applied is the curvature's business
(`Curvature.penalised`): for a layer one eigendecomposition of its input moment serves all rows and penalties, and where
the moment is float32 so is all that is iterated on. The framework refits the last support exactly.

Source: Meng et al., *ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models*,
NeurIPS 2024. The metric D (ALPS scales H to unit diagonal) is an option, see `solvers.joint.support`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from solvers.budget import Groups, Knapsack
from solvers.curvature import Kronecker
from solvers.joint.support import METRICS, metric_of, search_problem
from solvers.linalg import Apply, named
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANYTIME, JOINT_PROBLEM, RANKED, Context, Deadline, Solver, option
from solvers.tensors import ProblemTensors

#: Iterations between changes of ρ.
STRIDE = 3


@dataclass(frozen=True)
class AdmmSolver(Solver):
    """Alternating directions with a growing penalty."""

    name = "admm"
    summary = "alternating direction method with a growing penalty, then refit (ALPS family)"
    reference = "Meng et al., ALPS, NeurIPS 2024"
    capabilities = JOINT_PROBLEM | ANYTIME
    budgets = (*RANKED, Groups, Knapsack)
    most_items = {Knapsack: 20_000}

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
        single = all(isinstance(b.curvature, Kronecker) and b.curvature.dtype == torch.float32 for b in vectors.blocks)
        dtype = torch.float32 if single else torch.float64
        metric = squared.sqrt()
        linear = torch.where(metric > 0.0, vectors.linear / metric, 0.0).to(dtype)
        search = _Alternation(problem, vectors, metric.to(dtype), linear)
        sparse = (metric * vectors.weights).to(dtype)
        if context.start is None:
            pruned = search.cheapest(sparse)
        else:
            pruned = vectors.of(context.start)
            sparse = sparse * ~pruned
        pruned, sparse, statistics, reason = search.run(sparse, pruned, self.penalty, self.iterations, context.deadline)
        found = pruned.cpu().numpy()
        attained = torch.where(metric > 0.0, sparse.double() / metric, 0.0)
        value = problem.change(attained.cpu().numpy())
        if context.start is not None:
            first, value = problem.joint_value(context.start), problem.joint_value(found)
            if first < value:
                # The alternation is not monotone; a start that was better stands.
                found, value = context.start, first
        context.record(value)
        return Proposal(found, reason=reason, repairs=tuple(repairs), statistics=statistics)


class _Alternation:
    """The problem in the coordinates of a metric (n,), in its dtype."""

    def __init__(
        self, problem: SelectionProblem, vectors: ProblemTensors, metric: torch.Tensor, linear: torch.Tensor
    ) -> None:
        self.problem, self.vectors, self.linear = problem, vectors, linear
        self._penalised = []
        for block, part in zip(vectors.blocks, vectors.split(metric), strict=True):
            with named(block.name):
                self._penalised.append(block.curvature.penalised(part))

    def cheapest(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """What goes so that the least of ‖x‖² does: of groups, and where costs count, sums of squares are compared."""
        budget = self.problem.budget
        if isinstance(budget, RANKED):
            return budget.cheapest(torch.abs(x, out=out))
        squares = x.double().square()
        if getattr(budget, "labels", None) is None:
            return budget.cheapest(squares)
        labels = torch.from_numpy(np.asarray(budget.labels)).to(x.device)  # type: ignore[attr-defined]
        sums = squares.new_zeros(int(labels.max()) + 1).index_add_(0, labels, squares)
        return budget.over_items.cheapest(sums)[labels]

    def smooth(self, penalty: float) -> Apply:
        """x ↦ (H̃ + ρI)⁻¹x."""
        inverses = []
        for block, at in zip(self.vectors.blocks, self._penalised, strict=True):
            with named(block.name):
                inverses.append(at(penalty))
        if len(inverses) == 1:
            return inverses[0]
        return lambda x: torch.cat([inverse(p) for inverse, p in zip(inverses, self.vectors.split(x), strict=True)])

    def run(
        self, sparse: torch.Tensor, pruned: torch.Tensor, penalty: float, iterations: int, deadline: Deadline
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float], Reason]:
        """(mask, z, counts, why it stopped) from z and its mask, each (n,)."""
        # Vectors are written where others were: fresh memory would cost as much as a tenth of the product.
        dual, signed, size = torch.zeros_like(sparse), sparse.clone(), torch.empty_like(sparse)
        settled, reason, used = pruned, Reason.ITERATION_LIMIT, 0
        n_kept = int((~pruned).sum())
        smooth = self.smooth(penalty)
        for used in range(1, iterations + 1):
            if deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            target = smooth(torch.add(self.linear, signed, alpha=penalty, out=signed)).add_(dual)
            pruned = self.cheapest(target, size)
            torch.mul(target, pruned, out=dual)
            sparse, growth = target, 1.0
            if used % STRIDE == 0:
                moved = int((settled & ~pruned).sum())
                settled = pruned
                if moved == 0 and used > STRIDE:
                    reason = Reason.COMPLETED
                    break
                growth = 1.3 if moved >= 0.1 * n_kept else 1.2 if moved >= 0.005 * n_kept else 1.1
                penalty *= growth
                smooth = self.smooth(penalty)
            # z − u, the dual being in units of ρ: z is the target where the dual is zero.
            torch.add(target, dual, alpha=-1.0 - 1.0 / growth, out=signed)
            if growth > 1.0:
                dual /= growth
        return pruned, sparse.masked_fill(pruned, 0.0), {"iterations": float(used), "penalty": penalty}, reason
