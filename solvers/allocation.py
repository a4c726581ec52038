"""Splitting one budget over the blocks of a problem, for solvers that cannot share it.

Each rule says how many weights every block removes; they sum to ``n_prune`` exactly and never exceed a block. A mask
found block by block carries no bound on the shared budget, so none is claimed.

``uniform`` gives all blocks the same sparsity, ``rows`` so that also the rows of a layer lose equally many (Wanda),
``magnitude``, ``saliency`` (H_ii w_i²) and ``surgeon`` (w_i² / [H⁻¹]_ii) what one threshold over all blocks would take.

``marginal`` splits by cost curves. Let F_b(k) be the cost of removing k weights from block b, along the block's own
backward elimination (joint objective) or its cheapest diagonal saliencies (selection). Minimising Σ_b F_b(k_b) subject
to Σ_b k_b = n_prune by a Lagrange multiplier μ removes from every block while a removal costs less than μ; on the
lower convex hull of each F_b, where slopes rise, that is exactly the n_prune smallest slopes over all blocks (the
optimum for the convexified curves; Shoham and Gersho, 1988, for bit allocation). `split_curves` does the same for
curves known at some points only, whoever measured them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from solvers.arguments import one_of
from solvers.baselines.obd import diagonal_saliency
from solvers.budget import Cardinality, Knapsack, Partitioned
from solvers.errors import CapabilityError, ProblemError
from solvers.joint.elimination import EliminationPlan, elimination_costs
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.ranking import prune_smallest

Counts = npt.NDArray[np.int64]


def uniform_shares(sizes: Sequence[int], n_prune: int) -> Counts:
    """The same sparsity in groups of these sizes, by largest remainders; sums to `n_prune`."""
    table = np.asarray(sizes, dtype=np.int64)
    shares = n_prune * table / table.sum()
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(-(shares - counts), kind="stable")[: n_prune - int(counts.sum())]] += 1
    return np.asarray(counts)


def _magnitude(problem: SelectionProblem) -> Array:
    return np.abs(problem.weights)


def _saliency(problem: SelectionProblem) -> Array:
    return problem.diagonal * problem.weights**2


def _surgeon(problem: SelectionProblem) -> Array:
    return np.concatenate([(b.weights.square() / b.inverse_diagonal).cpu().numpy() for b in problem.blocks])


def _marginal_slopes(problem: SelectionProblem) -> Array:
    """Slopes of the convexified cost curves, block after block."""
    # Beyond the whole budget no more can be asked of a block.
    slopes = np.full(problem.n, np.inf)
    most_gone = problem.n if problem.budget.n_prune is None else problem.budget.n_prune
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        alone, most = SelectionProblem([block], block.n, problem.objective), min(block.n, most_gone)
        slopes[where][:most] = convex_slopes(_marginal_costs(alone, most))
    return slopes


def _marginal_costs(alone: SelectionProblem, count: int) -> Array:
    """What each of `count` removals adds in a problem of one block, float64 (count,)."""
    if alone.objective is Objective.SELECTION:
        return np.sort(diagonal_saliency(alone))[:count]
    return elimination_costs(alone.with_n_prune(count), EliminationPlan(chunks=8, pool=0))


def convex_slopes(increments: Array) -> Array:
    """Slopes of the lower convex hull of a curve given by its increments, non-decreasing, same shape."""
    return np.asarray(scipy.optimize.isotonic_regression(increments).x) if increments.size else increments


@dataclass(frozen=True, eq=False)
class CostCurve:
    """What it costs to remove weights from one group of them, known at some numbers of weights.

    Attributes
    ----------
    removed : int64 (points,)
        Rising from 0 to all weights of the group.
    costs : float64 (points,)
        Finite.

    Raises
    ------
    ProblemError
    """

    removed: Counts
    costs: Array

    def __post_init__(self) -> None:
        removed, costs = np.asarray(self.removed), np.asarray(self.costs)
        fine = removed.ndim == 1 and removed.shape == costs.shape and len(removed) >= 2 and removed[0] == 0
        if not fine or (np.diff(removed) <= 0).any() or not np.isfinite(costs).all():
            raise ProblemError(
                "a cost curve has as many finite costs as numbers of removed weights, which rise from 0, not "
                f"{removed.tolist()} and {costs.tolist()}"
            )

    @property
    def slopes(self) -> Array:
        """Cost per weight on the lower convex hull, between each point and the next, non-decreasing."""
        steps = np.diff(self.removed).astype(np.float64)
        return np.asarray(scipy.optimize.isotonic_regression(np.diff(self.costs) / steps, weights=steps).x)


def split_curves(curves: Sequence[CostCurve], n_prune: int) -> Counts:
    """How many weights each group loses so that `n_prune` go at the least cost on the hulls of their curves.

    Raises
    ------
    ProblemError
        If there are fewer weights.
    """
    sizes = np.array([int(curve.removed[-1]) for curve in curves], dtype=np.int64)
    if not 0 <= n_prune <= sizes.sum():
        raise ProblemError(f"n_prune must lie in [0, {sizes.sum()}], the weights of all curves, not {n_prune}")
    owners = np.repeat(np.arange(len(curves)), [len(curve.removed) - 1 for curve in curves])
    steps = np.concatenate([np.diff(curve.removed) for curve in curves])
    order = np.argsort(np.concatenate([curve.slopes for curve in curves]), kind="stable")
    done = np.cumsum(steps[order])
    taken = np.clip(n_prune - (done - steps[order]), 0, steps[order])
    return np.bincount(owners[order], weights=taken, minlength=len(curves)).astype(np.int64)


def split_costs(
    curves: Sequence[CostCurve], each: Array, demand: float, most: Counts | None = None
) -> tuple[Counts, float, float]:
    """How many weights each group loses so that what goes costs `demand` or more at the least cost on the hulls.

    A multiplier for the demand removes what has the smallest slope for its cost. Rounding up the last piece exceeds the
    relaxation, whose value is the Lagrangian bound, by less than the price of one weight.

    Parameters
    ----------
    curves : sequence of CostCurve
    each : float64 (groups,), none negative
        What a weight of each group costs.
    demand : float
    most : int64 (groups,), optional
        So many go at most.

    Returns
    -------
    counts : int64 (groups,)
    value, bound : float
        Of the hulls at these counts, and the least there is.

    Raises
    ------
    ProblemError
        If all that may go costs less than the demand.
    """
    sizes = np.array([int(curve.removed[-1]) for curve in curves], dtype=np.int64)
    most = sizes if most is None else most
    if float(each @ most) < demand * (1.0 - 1e-12):
        raise ProblemError(
            f"what may go costs {each @ most:.10g}, less than the {demand:.10g} that has to; raise the limit"
        )
    owners = np.repeat(np.arange(len(curves)), [len(curve.removed) - 1 for curve in curves])
    ends = np.minimum(np.concatenate([curve.removed[1:] for curve in curves]), most[owners])
    steps = ends - np.minimum(np.concatenate([curve.removed[:-1] for curve in curves]), most[owners])
    slopes = np.concatenate([curve.slopes for curve in curves])
    ratio = np.divide(slopes, each[owners], out=np.full(slopes.size, np.inf), where=each[owners] > 0.0)
    order = np.argsort(ratio, kind="stable")
    price, cost = steps * slopes, steps * each[owners]
    done = np.cumsum(cost[order])
    edge = min(int(np.searchsorted(done, demand * (1.0 - 1e-12))), order.size - 1)
    taken = np.zeros(order.size, dtype=np.int64)
    taken[order[:edge]] = steps[order[:edge]]
    if demand <= 0.0:
        return np.zeros(len(curves), dtype=np.int64), 0.0, 0.0
    last, missing = order[edge], demand - (float(done[edge - 1]) if edge else 0.0)
    whole = math.ceil((missing - 1e-12 * demand) / each[owners[last]])
    taken[last] = min(max(whole, 0), int(steps[last]))
    bound = float(price[order[:edge]].sum()) + slopes[last] * missing / each[owners[last]]
    counts = np.bincount(owners, weights=taken, minlength=len(curves)).astype(np.int64)
    return counts, float((taken * slopes).sum()), float(bound)


#: Rules that split as one threshold on scores (n,) does: as many per block as are among the `n_prune` smallest of all.
SCORES: dict[str, Callable[[SelectionProblem], Array]] = {
    "magnitude": _magnitude,
    "saliency": _saliency,
    "surgeon": _surgeon,
    "marginal": _marginal_slopes,
}
ALLOCATIONS = ("uniform", "rows", *SCORES)


def allocate(problem: SelectionProblem, rule: str) -> Counts:
    """How many weights each block removes under `rule`, int64 (blocks,); raises UnknownNameError."""
    one_of("allocation", rule, ALLOCATIONS)
    if rule not in SCORES:
        return uniform_shares([block.n for block in problem.blocks], problem.n_prune)
    chosen = prune_smallest(SCORES[rule](problem), problem.n_prune)
    return np.array([int(chosen[where].sum()) for where in problem.slices], dtype=np.int64)


def allocated(problem: SelectionProblem, rule: str) -> SelectionProblem:
    """The problem whose blocks each have their own budget under `rule`; raises UnknownNameError, CapabilityError."""
    if isinstance(problem.budget, Knapsack) and problem.budget.labels is None:
        return split(problem, rule)
    if not isinstance(problem.budget, Cardinality):
        raise CapabilityError(
            f"allocation={rule!r} shares out a number of weights; a {type(problem.budget).__name__} budget has done so"
        )
    counts = allocate(problem, rule).tolist()
    sizes = [block.n for block in problem.blocks]
    if rule == "rows":
        parts = [block.curvature.n_components for block in problem.blocks]
        counts = [share for total, n in zip(counts, parts, strict=True) for share in _evenly(total, n)]
        sizes = [size // n for size, n in zip(sizes, parts, strict=True) for _ in range(n)]
    return problem.with_budget(Partitioned(tuple(sizes), tuple(counts)))


def split(problem: SelectionProblem, rule: str | None, start: Mask | None = None) -> SelectionProblem:
    """A knapsack as exact counts for the ranges of weights that cost the same: what the scores of a rule leave.

    Parameters
    ----------
    problem : SelectionProblem
        With a `Knapsack` of single weights.
    rule : str, optional
        Of `ALLOCATIONS`; None takes the diagonal saliency, or |w| where there is no curvature.
    start : bool (n,), optional
        A feasible mask, whose counts are taken instead.

    Raises
    ------
    CapabilityError
        Where costs change from weight to weight, so that counts would leave nothing to choose; and for ``rows``, or
        ``marginal`` with costs that change inside a block.
    """
    budget = problem.budget
    assert isinstance(budget, Knapsack)
    sizes = np.array(budget.classes(), dtype=np.int64)
    if 2 * sizes.size > problem.n:
        raise CapabilityError(
            f"costs change {sizes.size} times over {problem.n} weights, so counts of weights that cost the same leave "
            "little to choose; use a solver that takes costs itself: obd, magnitude, woodfisher, brute_force"
        )
    starts = np.concatenate([[0], np.cumsum(sizes)])
    within = np.isin(starts, [0, *(where.stop for where in problem.slices)]).all()
    if rule == "rows" or (rule == "marginal" and not within):
        raise CapabilityError(f"allocation={rule!r} does not share out costs; use another of {', '.join(ALLOCATIONS)}")
    if rule == "uniform":
        total = budget.table.sum(1)
        share = float(((total - budget.limits) / np.maximum(total, 1e-300)).max(initial=0.0))
        counts = np.minimum(np.ceil(sizes * share), sizes)
        if budget.min_kept is not None and (sizes - counts < np.asarray(budget.min_kept)).any():
            raise CapabilityError("allocation='uniform' does not keep these floors under a limit on costs")
    else:
        scores = _default_scores(problem) if rule is None else SCORES[rule](problem)
        chosen = budget.cheapest_of(scores) if start is None else start
        counts = np.add.reduceat(chosen, starts[:-1], dtype=np.int64)
    return problem.with_budget(Partitioned(tuple(sizes.tolist()), tuple(counts.astype(np.int64).tolist())))


def _default_scores(problem: SelectionProblem) -> Array:
    return diagonal_saliency(problem) if problem.measured else _magnitude(problem)


def _evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` integers that differ by one at most, the larger ones spread out."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]
