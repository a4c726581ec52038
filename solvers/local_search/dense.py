"""Swap moves on a dense table, for problems or sub-problems of up to a few thousand weights.

With Q = diag(w) H diag(w) and x ∈ {0, 1}ⁿ marking the removed weights, the selection objective is
½ xᵀQx − Σ g_i w_i x_i, its forces are s = Qx − g·w, and swapping i ∈ P with j ∈ S changes it by

    β_j − α_i − γ_ij = (s_j + ½Q_jj) − (s_i − ½Q_ii) − Q_ij .

A swap updates s by two rows of Q. Weights outside the table may be removed too: they only enter through s.
"""

from __future__ import annotations

import numba
import numpy as np

from solvers.problem import Array, Mask


@numba.njit(cache=True, nogil=True)
def _apply(table: Array, forces: Array, pruned: Mask, i: int, j: int) -> None:
    pruned[i] = False
    pruned[j] = True
    for k in range(forces.shape[0]):
        forces[k] += table[j, k] - table[i, k]


@numba.njit(cache=True, nogil=True)
def steepest_descent(
    table: Array, forces: Array, pruned: Mask, min_gain: float, max_swaps: int
) -> tuple[int, float]:
    """Make the best swap while it gains more than `min_gain`; in place; (swaps made, total change)."""
    n = forces.shape[0]
    total = 0.0
    for count in range(max_swaps):
        best, best_i, best_j = -min_gain, -1, -1
        for i in range(n):
            if not pruned[i]:
                continue
            drop = forces[i] - 0.5 * table[i, i]
            for j in range(n):
                if not pruned[j]:
                    change = forces[j] + 0.5 * table[j, j] - drop - table[i, j]
                    if change < best:
                        best, best_i, best_j = change, i, j
        if best_i < 0:
            return count, total
        _apply(table, forces, pruned, best_i, best_j)
        total += best
    return max_swaps, total


@numba.njit(cache=True, nogil=True)
def _shortlist(score: Array, members: Mask, size: int) -> np.ndarray:
    """Positions of the `size` smallest scores among `members`, in order of position."""
    n = score.shape[0]
    chosen = np.empty(n, dtype=np.int64)
    values = np.empty(n)
    count = 0
    for k in range(n):
        if members[k]:
            values[count] = score[k]
            chosen[count] = k
            count += 1
    if count <= size:
        return chosen[:count]
    limit = np.partition(values[:count], size - 1)[size - 1]
    ties = size - np.sum(values[:count] < limit)
    kept = 0
    for k in range(count):
        if values[k] < limit or (values[k] == limit and ties > 0):
            ties -= values[k] == limit
            chosen[kept] = chosen[k]
            kept += 1
    return chosen[:kept]


@numba.njit(cache=True, nogil=True)
def tabu_search(
    table: Array,
    forces: Array,
    pruned: Mask,
    frozen_until: np.ndarray,
    value: float,
    best_value: float,
    best: Mask,
    clock: int,
    iterations: int,
    tenure: int,
    candidates: int,
    rng: np.random.Generator,
) -> tuple[float, float, int]:
    """Run `iterations` tabu moves, in place; (value, best value, moves since the best was found).

    Each move is the best swap of the `candidates` largest α and smallest β that is not tabu, or that beats the best
    value seen. Both weights are then frozen for `tenure` to 2·`tenure` moves.
    """
    n = forces.shape[0]
    idle = 0
    score = np.empty(n)
    for step in range(clock, clock + iterations):
        for k in range(n):
            half = 0.5 * table[k, k]
            score[k] = half - forces[k] if pruned[k] else half + forces[k]
        inside = _shortlist(score, pruned, candidates)
        outside = _shortlist(score, ~pruned, candidates)
        lowest, low_i, low_j, ties = np.inf, -1, -1, 0
        for i in inside:
            held = frozen_until[i] > step
            for j in outside:
                change = score[i] + score[j] - table[i, j]
                if change > lowest:
                    continue
                if (held or frozen_until[j] > step) and value + change >= best_value - 1e-12 * abs(best_value):
                    continue
                if change < lowest:
                    lowest, low_i, low_j, ties = change, i, j, 1
                else:
                    ties += 1
                    if rng.random() * ties < 1.0:
                        low_i, low_j = i, j
        if low_i < 0:
            # Everything on the list is tabu: wait for the oldest to thaw.
            idle += 1
            continue
        _apply(table, forces, pruned, low_i, low_j)
        value += lowest
        frozen_until[low_i] = step + 1 + tenure + int(rng.random() * (tenure + 1))
        frozen_until[low_j] = step + 1 + tenure + int(rng.random() * (tenure + 1))
        idle += 1
        if value < best_value - 1e-12 * abs(best_value):
            best_value = value
            best[:] = pruned
            idle = 0
    return value, best_value, idle


@numba.njit(cache=True, nogil=True)
def anneal(
    table: Array,
    forces: Array,
    pruned: Mask,
    value: float,
    best_value: float,
    best: Mask,
    hot: float,
    cold: float,
    steps: int,
    rng: np.random.Generator,
) -> tuple[float, float, int]:
    """Metropolis swaps while the temperature falls geometrically from `hot` to `cold`; (value, best value, accepted).

    In place. `best` holds the best mask seen.
    """
    inside = np.flatnonzero(pruned)
    outside = np.flatnonzero(~pruned)
    accepted = 0
    cooling = (cold / hot) ** (1.0 / max(1, steps - 1))
    temperature = hot
    for _ in range(steps):
        a = int(rng.random() * inside.shape[0])
        b = int(rng.random() * outside.shape[0])
        i, j = inside[a], outside[b]
        change = forces[j] + 0.5 * table[j, j] - forces[i] + 0.5 * table[i, i] - table[i, j]
        if change <= 0.0 or rng.random() < np.exp(-change / temperature):
            _apply(table, forces, pruned, i, j)
            inside[a], outside[b] = j, i
            value += change
            accepted += 1
            if value < best_value - 1e-12 * abs(best_value):
                best_value = value
                best[:] = pruned
        temperature *= cooling
    return value, best_value, accepted
