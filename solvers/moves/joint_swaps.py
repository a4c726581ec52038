"""One-swap search on a dense joint problem through its tableau.

For minimise ½ vᵀHv − cᵀv over v supported on S, sweeping the rows of S out of [H c] leaves

    M_SS = −N ,  N = H_SS⁻¹        M_PS = T = H_PS N        M_PP = Σ = H_PP − H_PS N H_SP
    x_S = v = N c_S                x_P = ρ = c_P − H_PS v

from which the exact change of the objective for putting j in P back and taking i in S out, interaction included, is

    ½ v_i²/N_ii − ½ (ρ_j + T_ji v_i/N_ii)² / (Σ_jj + T_ji²/N_ii) .

A swap is two pivots of O(n²); scanning all pairs is O(|S||P|). Swaps stay within groups of consecutive weights: `low`
and `high` (n,) say from where to before where the group of each weight reaches. `descend` takes the best swap until
none gains; `tabu_walk` goes on past local optima: it takes the best swap among weights not moved lately, be it uphill.

Source: the sweep operator (Goodnight, 1979; Dempster); tabu search for subset selection (Glover).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from solvers.arrays import Index
from solvers.problem import Array, Mask

#: Pivots after which the tableau is rebuilt from H.
REFRESH = 300


def build(hessian: Array, linear: Array, kept: Mask) -> tuple[Array, Array]:
    """(M (n, n), x (n,)) for the kept set, afresh; raises numpy.linalg.LinAlgError if H_SS is singular."""
    n = linear.size
    tableau, solution = np.empty((n, n)), np.empty(n)
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    inverse = np.linalg.inv(hessian[np.ix_(inside, inside)]) if inside.size else np.zeros((0, 0))
    inverse = 0.5 * (inverse + inverse.T)
    cross = hessian[np.ix_(outside, inside)] @ inverse
    tableau[np.ix_(inside, inside)] = -inverse
    tableau[np.ix_(outside, inside)] = cross
    tableau[np.ix_(inside, outside)] = cross.T
    schur = hessian[np.ix_(outside, outside)] - cross @ hessian[np.ix_(inside, outside)]
    tableau[np.ix_(outside, outside)] = schur
    value = inverse @ linear[inside]
    # One step of refinement: v is what the scores rest on.
    value += inverse @ (linear[inside] - hessian[np.ix_(inside, inside)] @ value)
    solution[inside] = value
    solution[outside] = linear[outside] - hessian[np.ix_(outside, inside)] @ value
    return tableau, solution


@njit(cache=True, nogil=True)
def pivot(tableau: Array, solution: Array, k: int, kept: Mask) -> float:
    """Move k across; returns the change of the objective."""
    n = solution.size
    d = tableau[k, k]
    xk = solution[k]
    factor = xk / d
    row = tableau[k].copy()
    for i in range(n):
        if i != k:
            a = row[i] / d
            if a != 0.0:
                target = tableau[i]
                for j in range(n):
                    target[j] -= a * row[j]
            solution[i] -= row[i] * factor
    sign = -1.0 if kept[k] else 1.0
    for i in range(n):
        value = sign * row[i] / d
        tableau[i, k] = value
        tableau[k, i] = value
    tableau[k, k] = -1.0 / d
    solution[k] = sign * factor
    kept[k] = not kept[k]
    change: float = -0.5 * xk * factor
    return change


@njit(cache=True, nogil=True)
def best_swap(
    tableau: Array, solution: Array, inside: Index, outside: Index, low: Index, high: Index
) -> tuple[float, int, int]:
    """(change, position out of S, position into S) of the best swap among the candidates given."""
    count = inside.size
    ratio, inverse, cost = np.empty(count), np.empty(count), np.empty(count)
    for a in range(count):
        i = inside[a]
        inverse[a] = -1.0 / tableau[i, i]
        ratio[a] = solution[i] * inverse[a]
        cost[a] = 0.5 * solution[i] * ratio[a]
    best, out, into = np.inf, -1, -1
    for b in range(outside.size):
        j = outside[b]
        row = tableau[j]
        rho, schur = solution[j], row[j]
        first, last = 0, count
        if high[j] - low[j] < solution.size:
            first, last = np.searchsorted(inside, low[j]), np.searchsorted(inside, high[j])
        for a in range(first, last):
            t = row[inside[a]]
            r = rho + t * ratio[a]
            change = cost[a] - 0.5 * r * r / (schur + t * t * inverse[a])
            if change < best:
                best, out, into = change, inside[a], j
    return best, out, into


@njit(cache=True, nogil=True)
def descend(
    tableau: Array, solution: Array, kept: Mask, low: Index, high: Index, least_gain: float, most: int
) -> tuple[float, int]:
    """Best swaps until none gains `least_gain` or `most` were made: (change of the objective, swaps)."""
    total, swaps = 0.0, 0
    while swaps < most:
        change, out, into = best_swap(tableau, solution, np.flatnonzero(kept), np.flatnonzero(~kept), low, high)
        if out < 0 or change >= -least_gain:
            break
        total += pivot(tableau, solution, out, kept)
        total += pivot(tableau, solution, into, kept)
        swaps += 1
    return total, swaps


@njit(cache=True, nogil=True)
def tabu_walk(
    tableau: Array,
    solution: Array,
    kept: Mask,
    low: Index,
    high: Index,
    until: Index,
    clock: int,
    draws: Index,
    value: float,
    best_value: float,
    best_kept: Mask,
) -> tuple[float, float, int]:
    """len(draws) tabu swaps, in place; (objective, best objective, step at which it was last bettered or −1).

    `until` holds for every weight the step before which it may not move; `draws` the tenures; a tabu swap is
    taken all the same if it betters the best.
    """
    last = -1
    for step in range(draws.size):
        now = clock + step
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
        free_in = inside[until[inside] <= now]
        free_out = outside[until[outside] <= now]
        if free_in.size == 0 or free_out.size == 0:
            free_in, free_out = inside, outside
        _, out, into = best_swap(tableau, solution, free_in, free_out, low, high)
        if out < 0 and free_in.size + free_out.size < kept.size:
            # No two free weights share a group.
            _, out, into = best_swap(tableau, solution, inside, outside, low, high)
        if out < 0:
            break
        value += pivot(tableau, solution, out, kept)
        value += pivot(tableau, solution, into, kept)
        until[out] = now + draws[step]
        until[into] = now + 1 + draws[step] // 2
        if value < best_value - 1e-12 * abs(best_value):
            best_value = value
            best_kept[:] = kept
            last = now
    return value, best_value, last
