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

import torch

from solvers.joint.support import METRICS, keep_largest, metric_of, refine, search_problem
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANYTIME, JOINT_PROBLEM, Context, Solver, option
from solvers.tensors import ProblemTensors


@dataclass(frozen=True)
class HardThresholdingSolver(Solver):
    """Hard thresholding pursuit with an exact line search."""

    name = "iht"
    summary = "iterative hard thresholding with line search, active sets and refit (CHITA family)"
    reference = "Benbaki et al., Fast as CHITA, ICML 2023"
    capabilities = JOINT_PROBLEM | ANYTIME

    iterations: int = option(50, "thresholding steps at most", minimum=1)
    active_steps: int = option(10, "conjugate-gradient steps on each support", minimum=1)
    levels: int = option(16, "sparsities, in geometric progression, on the way to the one asked for", minimum=1)
    trials: int = option(6, "step lengths tried per iteration, each half of the one before", minimum=1, maximum=60)
    metric: str = option("identity", "what thresholding measures weights by", choices=METRICS)
    tolerance: float = option(1e-6, "least relative improvement of an iteration", minimum=0)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Threshold until no step length improves the objective."""
        vectors, repairs = search_problem(problem)
        search = _Thresholding(vectors, metric_of(vectors, self.metric), problem.n_kept)
        if context.start is not None:
            kept = ~vectors.of(context.start)
            solution = torch.where(kept, vectors.weights, 0.0)
        else:
            kept, solution = self._approach(search, context)
        solution, value = search.refine(kept, solution, 3 * self.active_steps)
        context.record(value)
        reach, failures, used = 2.0, 0, 0
        reason = Reason.ITERATION_LIMIT
        for _ in range(self.iterations):
            if context.deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            used += 1
            best = self._best_trial(search, kept, solution, reach, context)
            if best is not None and best.value < value - self.tolerance * abs(value):
                value, solution, kept = best.value, best.solution, best.kept
                # Keep the range centred on what worked.
                reach *= 2.0 if best.trial == 0 else (0.5 if best.trial >= self.trials - 2 else 1.0)
                failures = 0
                context.record(value)
                continue
            # Nothing gained: settle the active set, look at shorter steps, then stop.
            solution, value = search.refine(kept, solution, 3 * self.active_steps)
            reach *= 0.5 ** (self.trials - 1)
            failures += 1
            if failures == 3:
                reason = Reason.COMPLETED
                break
        statistics = {"iterations": float(used), "objective_reached": value}
        return Proposal((~kept).cpu().numpy(), reason=reason, repairs=tuple(repairs), statistics=statistics)

    def _best_trial(
        self, search: _Thresholding, kept: torch.Tensor, solution: torch.Tensor, reach: float, context: Context
    ) -> _Trial | None:
        """The best support over the range of step lengths; None where all give the present one."""
        direction = search.direction(solution)
        scale = reach * search.exact_length(direction)
        best: _Trial | None = None
        tried = kept
        for trial in range(self.trials):
            support = search.largest(solution - scale * 0.5**trial * direction)
            if torch.equal(support, kept) or torch.equal(support, tried):
                continue
            tried = support
            refined, reached = search.refine(support, torch.where(support, solution, 0.0), self.active_steps)
            if best is None or reached < best.value:
                best = _Trial(reached, trial, refined, support)
            if context.deadline.expired():
                break
        return best

    def _approach(self, search: _Thresholding, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """(kept, v) after thresholding to fewer and fewer weights, re-optimised each time."""
        solution, n = search.vectors.weights.clone(), search.vectors.weights.numel()
        for level in range(1, self.levels):
            if context.deadline.expired():
                break
            n_kept = max(search.n_kept, round(n * (search.n_kept / n) ** (level / self.levels)))
            kept = keep_largest(search.metric * solution.abs(), n_kept)
            solution, _ = search.refine(kept, torch.where(kept, solution, 0.0), self.active_steps)
        kept = search.largest(solution)
        return kept, torch.where(kept, solution, 0.0)


@dataclass(frozen=True, eq=False)
class _Trial:
    """A support tried: its objective after refitting, the number of its step length, v, and the support."""

    value: float
    trial: int
    solution: torch.Tensor
    kept: torch.Tensor


class _Thresholding:
    """The problem with its metric D² (n,), on its device."""

    def __init__(self, vectors: ProblemTensors, squared: torch.Tensor, n_kept: int) -> None:
        self.vectors, self.squared, self.n_kept = vectors, squared, n_kept
        self.metric = squared.sqrt()

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The n_kept largest D|x|."""
        return keep_largest(self.metric * x.abs(), self.n_kept)

    def refine(self, kept: torch.Tensor, solution: torch.Tensor, steps: int) -> tuple[torch.Tensor, float]:
        """(v, objective) on a support, from `solution`."""
        split = self.vectors.split
        return refine(self.vectors.blocks, split(kept), split(solution), steps)

    def direction(self, solution: torch.Tensor) -> torch.Tensor:
        """D⁻²∇f(v)."""
        gradient = self.vectors.multiply(solution - self.vectors.weights)
        if self.vectors.gradient is not None:
            gradient = gradient + self.vectors.gradient
        return gradient / self.squared

    def exact_length(self, direction: torch.Tensor) -> float:
        """The τ that minimises f along −direction restricted to the n_kept weights it moves most."""
        moved = torch.where(self.largest(direction), direction, 0.0)
        curvature = float(moved @ self.vectors.multiply(moved))
        slope = float(moved @ (self.squared * moved))
        return slope / curvature if curvature > 0.0 else 1.0
