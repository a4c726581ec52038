"""The best few of many columns, by enumeration: what ends the branches of the joint tree.

Keeping the columns S of G instead of none gains ½ s_Sᵀ (G_SS)⁻¹ s_S, s = Gv. All but the last two columns are walked
depth-first with Schur complements; the pairs that complete them are scanned without divisions.
"""
# The compiled functions carry no annotations: numba infers their types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import numba
import numpy as np

#: Columns whose squared sine is below this are dependent.
DEPENDENT = 1e-13


@numba.njit(cache=True, error_model="numpy", nogil=True)
def scan_row(gram, part, squares, pivots, x, first, offset, best, second):
    """The pairs (x, y), first ≤ y < x: (best, second, y of the best or −1) of doubled gains, `offset` included."""
    row = gram[x]
    pivot, square, double = pivots[x], squares[x], 2.0 * part[x]
    need, found = second - offset, -1
    for y in range(first, x):
        determinant = pivot * pivots[y] - row[y] * row[y]
        if determinant <= DEPENDENT * pivot * pivots[y]:
            continue
        value = square * pivots[y] + squares[y] * pivot - double * part[y] * row[y]
        if value > need * determinant:
            value = value / determinant + offset
            if value > best:
                best, second, found = value, best, y
            else:
                second = value
            need = second - offset
    return best, second, found


@numba.njit(cache=True, error_model="numpy", nogil=True)
def eliminate(gram, part, item, below, rest):
    """Fill the lower triangles below[i:, i:] and rest[i:], i > item, with what keeping `item` leaves; its gain."""
    m, pivot = part.size, gram[item, item]
    for x in range(item + 1, m):
        ratio = gram[x, item] / pivot
        rest[x] = part[x] - ratio * part[item]
        for y in range(item + 1, x + 1):
            below[x, y] = gram[x, y] - ratio * gram[y, item]
    return part[item] * part[item] / pivot


@numba.njit(cache=True, error_model="numpy", nogil=True)
def best_subset(matrix, slope, size, needed):
    """The `size` ≥ 2 columns S with the largest gain, if it exceeds `needed`; about 3 ns a subset.

    Parameters
    ----------
    matrix : (m, m), G
    slope : (m,), s
    size : int
    needed : float

    Returns
    -------
    gain, second : float
        The largest and the next; `needed` where no subset exceeds it.
    chosen : int (size,)
        −1 where no subset exceeds it.
    """
    m = slope.size
    levels = size - 2
    grams, slopes, gains = np.empty((levels + 1, m, m)), np.empty((levels + 1, m)), np.zeros(levels + 1)
    grams[0], slopes[0] = matrix, slope
    chosen, best_chosen = np.full(size, -1), np.full(size, -1)
    squares, pivots = np.empty(m), np.empty(m)
    # Gains are doubled throughout.
    best, second = 2.0 * needed, 2.0 * needed
    level, item = 0, 0
    while True:
        gram, part = grams[level], slopes[level]
        if level == levels:
            first = chosen[level - 1] + 1 if level > 0 else 0
            for y in range(first, m):
                squares[y] = part[y] * part[y]
                pivots[y] = gram[y, y]
            for x in range(first + 1, m):
                row, pivot, square, double = gram[x], pivots[x], squares[x], 2.0 * part[x]
                need, hits = second - gains[level], 0
                # Without a division or a branch, so that it vectorises; most rows end here.
                for y in range(first, x):
                    determinant = pivot * pivots[y] - row[y] * row[y]
                    value = square * pivots[y] + squares[y] * pivot - double * part[y] * row[y]
                    hits += value > need * determinant
                if hits == 0:
                    continue
                best, second, y = scan_row(gram, part, squares, pivots, x, first, gains[level], best, second)
                if y >= 0:
                    best_chosen[:] = chosen
                    best_chosen[size - 2], best_chosen[size - 1] = x, y
        elif item <= m - (size - level):
            chosen[level] = item
            if gram[item, item] > DEPENDENT * matrix[item, item]:
                gains[level + 1] = gains[level] + eliminate(gram, part, item, grams[level + 1], slopes[level + 1])
                level += 1
            item += 1
            continue
        if level == 0:
            return 0.5 * best, 0.5 * second, best_chosen
        level -= 1
        item = chosen[level] + 1


@numba.njit(cache=True, error_model="numpy", nogil=True)
def best_of_groups(matrix, slope, owner, needs, needed):
    """The same where `needs` (groups,) columns of each group are kept; `owner` (m,) rises. About 30 ns a subset.

    A walk through the columns takes or leaves each; at the last one to be taken all that are left are looked at.
    """
    m, size = slope.size, np.sum(needs)
    grams, slopes, gains = np.empty((size, m, m)), np.empty((size, m)), np.zeros(size)
    grams[0], slopes[0] = matrix, slope
    chosen, best_chosen = np.full(size, -1), np.full(size, -1)
    # The first column after each group, and for each level its group.
    stops, group_of = np.searchsorted(owner, np.arange(needs.size), side="right"), np.empty(size, np.int64)
    last_of = np.empty(size, np.int64)
    level = 0
    for g in range(needs.size):
        for taken in range(needs[g]):
            group_of[level] = g
            # So many of the group have to come after this one.
            last_of[level] = stops[g] - (needs[g] - taken)
            level += 1
    best, second = 2.0 * needed, 2.0 * needed
    level, item = 0, 0
    while True:
        gram, part = grams[level], slopes[level]
        if level == size - 1:
            for y in range(item, m):
                if gram[y, y] > DEPENDENT * matrix[y, y]:
                    value = gains[level] + part[y] * part[y] / gram[y, y]
                    if value > best:
                        best, second = value, best
                        best_chosen[:] = chosen
                        best_chosen[level] = y
                    elif value > second:
                        second = value
        elif item <= last_of[level]:
            chosen[level] = item
            if gram[item, item] > DEPENDENT * matrix[item, item]:
                gains[level + 1] = gains[level] + eliminate(gram, part, item, grams[level + 1], slopes[level + 1])
                level += 1
                if group_of[level] != group_of[level - 1]:
                    item = stops[group_of[level - 1]]
                    continue
            item += 1
            continue
        if level == 0:
            return 0.5 * best, 0.5 * second, best_chosen
        level -= 1
        item = chosen[level] + 1


@numba.njit(cache=True, error_model="numpy", nogil=True)
def count_subsets(m, size):
    """The binomial coefficient as a float."""
    count = 1.0
    for i in range(size):
        count *= (m - i) / (i + 1.0)
    return count
