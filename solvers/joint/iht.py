"""`iht`: iterative hard thresholding with line search and active sets (the CHITA family).

For the joint objective f(v) = gᵀ(v − w) + ½ (v − w)ᵀH(v − w) with at most n_kept weights, each iteration tries

    S(τ) = the n_kept largest of D|v − τ D⁻²∇f(v)| ,

over a range of step lengths τ, re-optimises each support by some conjugate-gradient steps (the active set), and
goes on from the best. Unless a mask is given, it first thresholds to a few lower sparsities (`levels`). The scale
of τ is the exact line search along the thresholded direction; the range moves with what worked. The metric D is an
option (`solvers.joint.support`). It stops when no step length improves f, and the framework refits the last support
exactly.

Source: Benbaki et al., *Fast as CHITA: Neural Network Pruning with Combinatorial Optimization*, ICML 2023;
Blumensath and Davies (normalised iterative hard thresholding, 2010); Foucart (hard thresholding pursuit, 2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from solvers.joint.support import METRICS, SupportModel, keep_largest, metric_of
from solvers.problem import Array, Mask, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Solver, option


@dataclass(frozen=True)
class HardThresholdingSolver(Solver):
    """Hard thresholding pursuit with an exact line search."""

    name = "iht"
    summary = "iterative hard thresholding with line search, active sets and refit (CHITA family)"
    reference = "Benbaki et al., Fast as CHITA, ICML 2023"
    capabilities = frozenset(
        {
            Capability.JOINT,
            Capability.GLOBAL_BUDGET,
            Capability.LINEAR_TERM,
            Capability.TIME_LIMIT,
            Capability.WARM_START,
        }
    )

    iterations: int = option(50, "thresholding steps at most", minimum=1)
    active_steps: int = option(10, "conjugate-gradient steps on each support", minimum=1)
    levels: int = option(16, "sparsities, in geometric progression, on the way to the one asked for", minimum=1)
    trials: int = option(6, "step lengths tried per iteration, each half of the one before", minimum=1)
    metric: str = option("identity", "what thresholding measures weights by", choices=METRICS)
    tolerance: float = option(1e-6, "least relative improvement of an iteration", minimum=0)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Threshold until no step length improves the objective."""
        squared, repairs = metric_of(problem, self.metric)
        metric = np.sqrt(squared)
        if context.start is not None:
            kept = ~context.start
            solution = np.where(kept, problem.weights, 0.0)
        else:
            kept, solution = self._approach(problem, metric, context)
        solution, value = SupportModel(problem, kept).refine(solution, 3 * self.active_steps)
        context.record(value)
        reach, failures, used = 2.0, 0, 0
        reason = Reason.ITERATION_LIMIT
        for _ in range(self.iterations):
            if context.deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            used += 1
            direction = self._direction(problem, solution, squared)
            scale = reach * self._exact_length(problem, solution, direction, metric)
            best: tuple[float, int, Array, Mask] | None = None
            tried = kept
            for trial in range(self.trials):
                candidate = solution - scale * 0.5**trial * direction
                support = keep_largest(metric * np.abs(candidate), problem.n_kept)
                if np.array_equal(support, kept) or np.array_equal(support, tried):
                    continue
                tried = support
                refined, reached = SupportModel(problem, support).refine(
                    np.where(support, solution, 0.0), self.active_steps
                )
                if best is None or reached < best[0]:
                    best = (reached, trial, refined, support)
                if context.deadline.expired():
                    break
            if best is not None and best[0] < value - self.tolerance * abs(value):
                value, trial, solution, kept = best
                # Keep the range centred on what worked.
                reach *= 2.0 if trial == 0 else (0.5 if trial >= self.trials - 2 else 1.0)
                failures = 0
                context.record(value)
                continue
            # Nothing gained: settle the active set, look at shorter steps, then stop.
            solution, value = SupportModel(problem, kept).refine(solution, 3 * self.active_steps)
            reach *= 0.5 ** (self.trials - 1)
            failures += 1
            if failures == 3:
                reason = Reason.COMPLETED
                break
        statistics = {"iterations": float(used), "objective_reached": value}
        return Proposal(~kept, reason=reason, repairs=tuple(repairs), statistics=statistics)

    def _approach(self, problem: SelectionProblem, metric: Array, context: Context) -> tuple[Mask, Array]:
        """(kept, v) after thresholding to fewer and fewer weights, re-optimised each time."""
        solution = problem.weights.copy()
        for level in range(1, self.levels + 1):
            fraction = level / self.levels
            n_kept = max(problem.n_kept, round(problem.n * (problem.n_kept / problem.n) ** fraction))
            if level == self.levels or context.deadline.expired():
                break
            kept = keep_largest(metric * np.abs(solution), n_kept)
            solution, _ = SupportModel(problem, kept).refine(np.where(kept, solution, 0.0), self.active_steps)
        kept = keep_largest(metric * np.abs(solution), problem.n_kept)
        return kept, np.where(kept, solution, 0.0)

    @staticmethod
    def _direction(problem: SelectionProblem, solution: Array, squared: Array) -> Array:
        """D⁻²∇f(v)."""
        gradient = problem.multiply(solution - problem.weights)
        if problem.gradient is not None:
            gradient += problem.gradient
        return np.asarray(gradient / squared)

    @staticmethod
    def _exact_length(problem: SelectionProblem, solution: Array, direction: Array, metric: Array) -> float:
        """The τ that minimises f along −direction restricted to the n_kept weights it moves most."""
        moved = np.where(keep_largest(metric * np.abs(direction), problem.n_kept), direction, 0.0)
        curvature = float(moved @ problem.multiply(moved))
        slope = float(moved @ (metric**2 * moved))
        return slope / curvature if curvature > 0.0 else 1.0
