"""Backward greedy: remove everything, then put back the weights that lower the objective most, a few at a time.

With P the removed weights, x = w on P and 0 elsewhere, putting i back changes the selection objective by
−α_i = −w_i (Hx)_i + ½ H_ii w_i² + g_i w_i. After every round Hx is computed anew: one product with H each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers import Capability, Context, Proposal, Reason, SelectionProblem, Solver, option


@dataclass(frozen=True)
class BackwardGreedySolver(Solver):
    """Greedy in the direction opposite to the usual one."""

    name = "backward_greedy"
    summary = "remove everything, then put the most valuable weights back"
    reference = "the tutorial docs/writing_a_solver.md"
    capabilities = frozenset(
        {Capability.SELECTION, Capability.GLOBAL_BUDGET, Capability.LINEAR_TERM, Capability.TIME_LIMIT}
    )

    batch: int = option(1, "weights put back per product with H", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Put back n_kept weights; when time runs out, all that are missing at once."""
        weights, diagonal = problem.weights, problem.diagonal
        linear = np.zeros(problem.n) if problem.gradient is None else problem.gradient * weights
        pruned = np.ones(problem.n, dtype=bool)
        reason, rounds = Reason.COMPLETED, 0
        while (missing := int(pruned.sum()) - problem.n_prune) > 0:
            image = problem.multiply(np.where(pruned, weights, 0.0))
            drop = weights * image - 0.5 * diagonal * weights**2 - linear
            count = min(self.batch, missing)
            if context.deadline.expired():
                reason, count = Reason.TIME_LIMIT, missing
            ranked = np.argsort(np.where(pruned, -drop, np.inf), kind="stable")
            pruned[ranked[:count]] = False
            rounds += 1
        context.record(problem.value(pruned))
        return Proposal(pruned, reason=reason, statistics={"rounds": float(rounds)})
