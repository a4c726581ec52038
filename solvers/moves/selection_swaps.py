"""Swap moves on a dense table, for problems or sub-problems of up to a few thousand weights.

With Q = diag(w) H diag(w) and x ∈ {0, 1}ⁿ marking the removed weights, the selection objective is
½ xᵀQx − Σ g_i w_i x_i, its forces are s = Qx − g·w, and swapping i ∈ P with j ∈ S changes it by

    β_j − α_i − γ_ij = (s_j + ½Q_jj) − (s_i − ½Q_ii) − Q_ij .

A swap updates s by two rows of Q. Weights outside the table may be removed too: they only enter through s. Swaps stay
within groups of consecutive weights: `low` and `high` say from where to before where the group of each weight reaches.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from solvers.problem import Array, Mask

Random = npt.NDArray[np.uint64]
Index = npt.NDArray[np.int64]


def random_state(rng: np.random.Generator) -> Random:
    """State of the kernels' generator (xorshift64*), which compiles in a tenth of the time of numpy's."""
    return rng.integers(1, 2**63, size=1, dtype=np.uint64)


@numba.njit(cache=True, nogil=True)
def _uniform(random: Random) -> float:
    """A number in [0, 1) with 53 random bits (Vigna, *An experimental exploration of xorshift generators*, 2016)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True, nogil=True)
def _apply(table: Array, forces: Array, pruned: Mask, i: int, j: int) -> None:
    pruned[i] = False
    pruned[j] = True
    for k in range(forces.shape[0]):
        forces[k] += table[j, k] - table[i, k]


@numba.njit(cache=True, nogil=True)
def steepest_descent(
    table: Array, forces: Array, pruned: Mask, low: Index, high: Index, min_gain: float, max_swaps: int
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
            for j in range(low[i], high[i]):
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
def _shortlist(score: Array, pruned: Mask, side: bool, size: int) -> Index:
    """Positions of the `size` smallest scores among those whose `pruned` is `side`, in order of position."""
    n = score.shape[0]
    chosen = np.empty(n, dtype=np.int64)
    values = np.empty(n)
    count = 0
    for k in range(n):
        if pruned[k] == side:
            values[count] = score[k]
            chosen[count] = k
            count += 1
    if count <= size:
        return chosen[:count]
    limit = np.partition(values[:count], size - 1)[size - 1]
    ties = size
    for m in range(count):
        ties -= values[m] < limit
    kept = 0
    for m in range(count):
        here = values[m]
        if here < limit or (here == limit and ties > 0):
            ties -= here == limit
            chosen[kept] = chosen[m]
            kept += 1
    return chosen[:kept]


@numba.njit(cache=True, nogil=True)
def tabu_search(
    table: Array,
    forces: Array,
    pruned: Mask,
    low: Index,
    high: Index,
    frozen_until: np.ndarray,
    value: float,
    best_value: float,
    best: Mask,
    clock: int,
    iterations: int,
    tenure: int,
    candidates: int,
    random: Random,
) -> tuple[float, float, int]:
    """Run `iterations` tabu moves, in place; (value, best value, moves since the best was found).

    Each move is the best swap of the `candidates` largest α and smallest β that is not tabu, or that beats the best
    value seen. Both weights are then frozen for `tenure` to 2·`tenure` moves.
    """
    n = forces.shape[0]
    idle = 0
    score, half = np.empty(n), 0.5 * np.diag(table)
    for step in range(clock, clock + iterations):
        for k in range(n):
            score[k] = half[k] - forces[k] if pruned[k] else half[k] + forces[k]
        inside = _shortlist(score, pruned, True, candidates)
        outside = _shortlist(score, pruned, False, candidates)
        lowest, low_i, low_j, ties = np.inf, -1, -1, 0
        for i in inside:
            held = frozen_until[i] > step
            first, last = 0, outside.size
            if high[i] - low[i] < n:
                first, last = np.searchsorted(outside, low[i]), np.searchsorted(outside, high[i])
            for j in outside[first:last]:
                change = score[i] + score[j] - table[i, j]
                if change > lowest:
                    continue
                if (held or frozen_until[j] > step) and value + change >= best_value - 1e-12 * abs(best_value):
                    continue
                if change < lowest:
                    lowest, low_i, low_j, ties = change, i, j, 1
                else:
                    ties += 1
                    if _uniform(random) * ties < 1.0:
                        low_i, low_j = i, j
        if low_i < 0:
            # Everything on the list is tabu: wait for the oldest to thaw.
            idle += 1
            continue
        _apply(table, forces, pruned, low_i, low_j)
        value += lowest
        frozen_until[low_i] = step + 1 + tenure + int(_uniform(random) * (tenure + 1))
        frozen_until[low_j] = step + 1 + tenure + int(_uniform(random) * (tenure + 1))
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
    low: Index,
    high: Index,
    value: float,
    best_value: float,
    best: Mask,
    hot: float,
    cold: float,
    steps: int,
    random: Random,
) -> tuple[float, float, int]:
    """Metropolis swaps while the temperature falls geometrically from `hot` to `cold`; (value, best value, accepted).

    In place. `best` holds the best mask seen.
    """
    inside = np.flatnonzero(pruned)
    outside = np.flatnonzero(~pruned)
    first, last = np.searchsorted(outside, low[inside]), np.searchsorted(outside, high[inside])
    accepted = 0
    cooling = (cold / hot) ** (1.0 / max(1, steps - 1))
    temperature = hot
    for _ in range(steps):
        a = int(_uniform(random) * inside.shape[0])
        # Partners stay in their places, so that those of a group lie together.
        b = first[a] + int(_uniform(random) * (last[a] - first[a]))
        if b == last[a]:
            continue
        i, j = inside[a], outside[b]
        change = forces[j] + 0.5 * table[j, j] - forces[i] + 0.5 * table[i, i] - table[i, j]
        if change <= 0.0 or _uniform(random) < np.exp(-change / temperature):
            _apply(table, forces, pruned, i, j)
            inside[a], outside[b] = j, i
            value += change
            accepted += 1
            if value < best_value - 1e-12 * abs(best_value):
                best_value = value
                best[:] = pruned
        temperature *= cooling
    return value, best_value, accepted


def swaps_between_checks(n: int) -> int:
    """Swaps of `steepest_descent` among n weights, some n² steps each, in about a tenth of a second."""
    return int(min(max(2e8 / n**2, 1), 200))


def compile_kernel(name: str) -> None:
    """Compile `steepest_descent`, `tabu_search` or `anneal`, or load it from numba's cache on disk.

    Called where a solver's module is loaded, so that the first search of a process keeps its time limit.
    """
    table, forces, pruned = np.zeros((2, 2)), np.zeros(2), np.array([True, False])
    random, low, high = random_state(np.random.default_rng(0)), np.zeros(2, np.int64), np.full(2, 2)
    if name == "steepest_descent":
        steepest_descent(table, forces, pruned, low, high, 0.0, 1)
    elif name == "tabu_search":
        frozen = np.zeros(2, dtype=np.int64)
        tabu_search(table, forces, pruned, low, high, frozen, 0.0, 0.0, pruned.copy(), 0, 1, 1, 1, random)
    else:
        anneal(table, forces, pruned, low, high, 0.0, 0.0, pruned.copy(), 1.0, 0.5, 1, random)
