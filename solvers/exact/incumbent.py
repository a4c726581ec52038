"""A good mask to start an exact backend from: one-swap local optima on dense H, for at most a few hundred weights.

Selection: from the diagonal saliency H_ii w_i² (and from the caller's start), the steepest of all swaps, β_j − α_i −
γ_ij < 0, until none improves. Joint: backward elimination with refit (the optimal brain surgeon of Hassibi & Stork,
1993, one weight at a time), then the same with the refitted objective, value(P) = ½ c_Pᵀ [(H⁻¹)_PP]⁻¹ c_P. The
package's own `tabu` and `joint_ls` are asked too, and usually find the optimum.
"""

from __future__ import annotations

import math

import numpy as np

from solvers.errors import SingularHessianError
from solvers.problem import Array, Mask, Objective, ProblemArrays, SelectionProblem
from solvers.registry import make_solver
from solvers.solver import Context, Deadline

_MAX_PASSES = 1000


def local_optimum(problem: SelectionProblem, arrays: ProblemArrays, context: Context) -> Mask:
    """The best of a few one-swap local optima, numpy bool (n,); deterministic."""
    hessian = arrays.hessian
    starts: list[Mask] = [] if context.start is None else [context.start.copy()]
    if problem.objective is Objective.SELECTION:
        cost = hessian * np.outer(arrays.weights, arrays.weights)
        linear = arrays.gradient * arrays.weights
        for score in (0.5 * np.diag(cost) - linear, np.abs(arrays.weights)):
            starts.append(_smallest(score, problem.n_prune))
        starts.append(_forward(cost, linear, problem.n_prune))
        candidates = [_swap_selection(cost, linear, start, context) for start in starts]
    else:
        inverse, centre = _damped_inverse(hessian, arrays)
        starts.append(_backward(inverse, centre, problem.n_prune))
        candidates = [_swap_joint(inverse, centre, start, context) for start in starts]
    candidates += starts[:1] if context.start is not None else []
    candidates += _searched(problem, context)
    values = [problem.value(mask) for mask in candidates]
    return candidates[int(np.argmin(values))]


def _searched(problem: SelectionProblem, context: Context) -> list[Mask]:
    """What the package's own best heuristic finds, in at most a fifth of the time that is left."""
    remaining = context.deadline.remaining()
    share = None if math.isinf(remaining) else max(0.2 * remaining, 1e-3)
    name = "tabu" if problem.objective is Objective.SELECTION else "joint_ls"
    inner = Context(seed=context.seed, deadline=Deadline(share))
    try:
        return [make_solver(name).run(problem, inner).pruned]
    except SingularHessianError:
        # It needs H⁻¹, which is not needed here; the other candidates remain.
        return []


def _smallest(score: Array, count: int) -> Mask:
    mask = np.zeros(score.shape[0], dtype=bool)
    mask[np.argsort(score, kind="stable")[:count]] = True
    return mask


def _forward(cost: Array, linear: Array, count: int) -> Mask:
    """Remove the cheapest weight given those already removed."""
    mask = np.zeros(linear.shape[0], dtype=bool)
    rise = 0.5 * np.diag(cost) - linear
    for _ in range(count):
        item = int(np.argmin(np.where(mask, np.inf, rise)))
        mask[item] = True
        rise = rise + cost[item]
    return mask


def _swap_selection(cost: Array, linear: Array, start: Mask, context: Context) -> Mask:
    mask = start.copy()
    half = 0.5 * np.diag(cost)
    scale = max(float(np.abs(half).sum() + np.abs(linear).sum()), np.finfo(float).tiny)
    for _ in range(_MAX_PASSES):
        if context.deadline.expired():
            break
        field = cost @ mask
        removed, kept = np.flatnonzero(mask), np.flatnonzero(~mask)
        drop = field[removed] - half[removed] - linear[removed]
        rise = field[kept] + half[kept] - linear[kept]
        change = rise[None, :] - drop[:, None] - cost[np.ix_(removed, kept)]
        at = int(np.argmin(change))
        i, j = divmod(at, kept.size)
        if change[i, j] >= -1e-15 * scale:
            break
        mask[removed[i]], mask[kept[j]] = False, True
    return mask


def _damped_inverse(hessian: Array, arrays: ProblemArrays) -> tuple[Array, Array]:
    """(H⁻¹, c), with just enough damping for a Cholesky factor: the masks are judged elsewhere, exactly."""
    norms = np.sqrt(np.diag(hessian))
    norms = np.where(norms > 0, norms, 1.0)
    scaled = hessian / np.outer(norms, norms)
    values, vectors = np.linalg.eigh(scaled)
    values = values.clip(min=1e-11 * max(float(values[-1]), 1e-11))
    inverse = (vectors / values) @ vectors.T / np.outer(norms, norms)
    return inverse, arrays.weights - inverse @ arrays.gradient


def _backward(inverse: Array, centre: Array, count: int) -> Mask:
    """Remove the weight whose removal costs least after a refit, and eliminate it from H⁻¹."""
    inverse, centre = inverse.copy(), centre.copy()
    mask = np.zeros(centre.shape[0], dtype=bool)
    for _ in range(count):
        diagonal = np.diag(inverse)
        with np.errstate(divide="ignore", invalid="ignore"):
            cost = np.where(mask | (diagonal <= 0), np.inf, centre**2 / diagonal)
        item = int(np.argmin(cost))
        if not np.isfinite(cost[item]):
            item = int(np.flatnonzero(~mask)[0])
        pivot = inverse[item, item]
        mask[item] = True
        if pivot > 0:
            column = inverse[:, item].copy()
            centre -= column * (centre[item] / pivot)
            inverse -= np.outer(column, column / pivot)
        inverse[item, :] = inverse[:, item] = 0.0
        centre[item] = 0.0
    return mask


def _swap_joint(inverse: Array, centre: Array, start: Mask, context: Context) -> Mask:
    """First-improvement over which weight returns, best over which leaves in its place."""
    mask = start.copy()
    diagonal = np.diag(inverse)
    for _ in range(_MAX_PASSES):
        improved = False
        for item in np.flatnonzero(mask):
            if context.deadline.expired():
                return mask
            rest = mask.copy()
            rest[item] = False
            removed, others = np.flatnonzero(rest), np.flatnonzero(~rest)
            if removed.size:
                block = inverse[np.ix_(removed, removed)]
                try:
                    right = np.column_stack([centre[removed], inverse[np.ix_(removed, others)]])
                    solved = np.linalg.solve(block, right)
                except np.linalg.LinAlgError:
                    continue
                cross = inverse[np.ix_(others, removed)]
                numerator = (centre[others] - cross @ solved[:, 0]) ** 2
                pivot = diagonal[others] - np.einsum("ij,ji->i", cross, solved[:, 1:])
            else:
                numerator, pivot = centre[others] ** 2, diagonal[others]
            cost = np.where(pivot > 1e-12 * diagonal[others], numerator / np.maximum(pivot, 1e-300), np.inf)
            now = cost[np.flatnonzero(others == item)[0]]
            best = int(np.argmin(cost))
            if cost[best] < now * (1 - 1e-9):
                mask = rest
                mask[others[best]] = True
                improved = True
        if not improved:
            break
    return mask
