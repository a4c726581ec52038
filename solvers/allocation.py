"""Splitting one budget over the blocks of a problem, for solvers that cannot share it.

Each rule returns how many weights every block removes; they sum to ``n_prune`` exactly and never exceed a
block. A mask found block by block carries no bound on the shared budget, so none is claimed.

``marginal`` splits by cost curves. Let F_b(k) be the cost of removing k weights from block b, along the block's own
backward elimination (joint objective) or its cheapest diagonal saliencies (selection). Minimising Σ_b F_b(k_b) subject
to Σ_b k_b = n_prune by a Lagrange multiplier μ removes from every block while a removal costs less than μ; on the
lower convex hull of each F_b, where slopes rise, that is exactly the n_prune smallest slopes over all blocks (the
optimum for the convexified curves; Shoham and Gersho, 1988, for bit allocation).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from solvers.baselines.obd import diagonal_saliency
from solvers.budget import Cardinality, Partitioned
from solvers.errors import CapabilityError, UnknownNameError
from solvers.joint.elimination import EliminationPlan, elimination_costs
from solvers.problem import Array, Objective, SelectionProblem
from solvers.ranking import prune_smallest

Counts = npt.NDArray[np.int64]


def uniform(problem: SelectionProblem) -> Counts:
    """The same sparsity in every block (largest remainders)."""
    sizes = np.array([block.n for block in problem.blocks], dtype=np.int64)
    shares = problem.n_prune * sizes / problem.n
    counts = np.floor(shares).astype(np.int64)
    for index in np.argsort(-(shares - counts), kind="stable")[: problem.n_prune - int(counts.sum())]:
        counts[index] += 1
    return counts


def _by_score(problem: SelectionProblem, score: Array) -> Counts:
    """As many per block as a global selection of the smallest scores would take."""
    chosen = prune_smallest(score, problem.n_prune)
    return np.array([int(chosen[where].sum()) for where in problem.slices], dtype=np.int64)


def by_magnitude(problem: SelectionProblem) -> Counts:
    """The split that global magnitude pruning makes."""
    return _by_score(problem, np.abs(problem.weights))


def by_saliency(problem: SelectionProblem) -> Counts:
    """The split that the global diagonal saliency H_ii w_i² makes."""
    return _by_score(problem, problem.diagonal * problem.weights**2)


def by_marginal_cost(problem: SelectionProblem) -> Counts:
    """The split at which one more removal costs the same in every block, on convexified cost curves."""
    # Beyond the whole budget no more can be asked of a block.
    slopes = np.full(problem.n, np.inf)
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        alone, most = SelectionProblem([block], block.n, problem.objective), min(block.n, problem.n_prune)
        slopes[where][:most] = convex_slopes(_marginal_costs(alone, most))
    return _by_score(problem, slopes)


def _marginal_costs(alone: SelectionProblem, count: int) -> Array:
    """What each of `count` removals adds in a problem of one block, float64 (count,)."""
    if alone.objective is Objective.SELECTION:
        return np.sort(diagonal_saliency(alone))[:count]
    return elimination_costs(alone.with_n_prune(count), EliminationPlan(chunks=8, pool=0))


def convex_slopes(increments: Array) -> Array:
    """Slopes of the lower convex hull of a curve given by its increments, non-decreasing, same shape."""
    return np.asarray(isotonic_regression(increments).x) if increments.size else increments


ALLOCATIONS: dict[str, Callable[[SelectionProblem], Counts]] = {
    "uniform": uniform,
    "magnitude": by_magnitude,
    "saliency": by_saliency,
    "marginal": by_marginal_cost,
}


def allocate(problem: SelectionProblem, rule: str) -> Counts:
    """How many weights each block removes under `rule`, int64 (blocks,); raises UnknownNameError."""
    if rule not in ALLOCATIONS:
        raise UnknownNameError.of("allocation", rule, ALLOCATIONS)
    return ALLOCATIONS[rule](problem)


def allocated(problem: SelectionProblem, rule: str) -> SelectionProblem:
    """The problem whose blocks each have their own budget under `rule`; raises UnknownNameError, CapabilityError."""
    if not isinstance(problem.budget, Cardinality):
        raise CapabilityError(
            f"allocation={rule!r} shares out a number of weights; a {type(problem.budget).__name__} budget has done so"
        )
    sizes = tuple(block.n for block in problem.blocks)
    return problem.with_budget(Partitioned(sizes, tuple(allocate(problem, rule).tolist())))
