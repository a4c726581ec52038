"""Compiled parts of the tree over linear rows: what rows imply, the dual of their relaxation, a relaxed point.

With open items z ∈ [0, 1] and l, h what rows still ask for once decided items are taken off,

    min {sᵀz : l ≤ A z ≤ h}  ≥  max over μ of  Σ_j (l_j μ_j⁺ − h_j μ_j⁻) + Σ_i min(0, s_i − (Aᵀμ)_i) ,

at any μ, so that any search for one bounds. `least` ascends by one price after another: along one, the dual is a
concave, piecewise linear function, whose best point is found by sorting. For one row that is the fractional knapsack.
"""

from __future__ import annotations

import numba
import numpy as np

_PASSES = 4


@numba.njit(cache=True)
def propagate(fates, matrix, low, high):  # type: ignore[no-untyped-def]
    """Decide, in place, open items that rows leave no choice; False where no mask is left."""
    rows, items = matrix.shape
    changed = True
    while changed:
        changed = False
        for j in range(rows):
            least, most, slack = 0.0, 0.0, 0.0
            for i in range(items):
                slack += matrix[j, i]
                if fates[i] != 0:
                    most += matrix[j, i]
                    if fates[i] == 1:
                        least += matrix[j, i]
            slack *= 1e-13
            if least > high[j] + slack or most < low[j] - slack:
                return False
            for i in range(items):
                if fates[i] != 2 or matrix[j, i] == 0.0:
                    continue
                if least + matrix[j, i] > high[j] + slack:
                    fates[i] = 0
                    most -= matrix[j, i]
                    changed = True
                elif most - matrix[j, i] < low[j] - slack:
                    fates[i] = 1
                    least += matrix[j, i]
                    changed = True
    return True


@numba.njit(cache=True)
def least(slope, matrix, low, high, prices, reduced):  # type: ignore[no-untyped-def]
    """A lower bound on the least sᵀz of open items (f,) under their rows; prices (m,) and s − Aᵀμ (f,) in place."""
    rows, items = matrix.shape
    for i in range(items):
        reduced[i] = slope[i]
        for j in range(rows):
            reduced[i] -= matrix[j, i] * prices[j]
    for _step in range(_PASSES if rows > 1 else 1):
        moved = False
        for j in range(rows):
            before = prices[j]
            for i in range(items):
                reduced[i] += matrix[j, i] * before
            prices[j] = _price(reduced, matrix[j], low[j], high[j])
            for i in range(items):
                reduced[i] -= matrix[j, i] * prices[j]
            moved = moved or abs(prices[j] - before) > 1e-9 * abs(before)
        if not moved:
            break
    total, size = 0.0, 0.0
    for j in range(rows):
        if prices[j] > 0.0:
            total += low[j] * prices[j]
            size += abs(low[j]) * prices[j]
        elif prices[j] < 0.0:
            total += high[j] * prices[j]
            size -= abs(high[j]) * prices[j]
    for i in range(items):
        size += abs(slope[i]) * 1e-3
        if reduced[i] < 0.0:
            total += reduced[i]
            size -= reduced[i]
    return total - 64.0 * 2.220446049250313e-16 * size


@numba.njit(cache=True)
def _price(reduced, row, low, high):  # type: ignore[no-untyped-def]
    """The best price of one row, others as they are."""
    activity = 0.0
    for i in range(row.size):
        if reduced[i] < 0.0:
            activity += row[i]
    if low <= activity <= high:
        return 0.0
    some = np.flatnonzero(row > 0.0)
    if some.size == 0:
        return 0.0
    ratio = reduced[some] / row[some]
    order = np.argsort(ratio)
    if activity < low:
        for at in order:
            if ratio[at] >= 0.0:
                activity += row[some[at]]
                if activity >= low:
                    return ratio[at]
        return max(0.0, ratio[order[-1]])
    for at in order[::-1]:
        if ratio[at] < 0.0:
            activity -= row[some[at]]
            if activity <= high:
                return ratio[at]
    return min(0.0, ratio[order[0]])


@numba.njit(cache=True)
def settle(quadratic, linear, matrix, low, high, point, prices, rho, rounds, sweeps):  # type: ignore[no-untyped-def]
    """Towards the least ½ zᵀMz + bᵀz over the box and the rows, by coordinates of the augmented Lagrangian."""
    items, rows = point.size, prices.size
    forces = linear.copy()
    activity = np.zeros(rows)
    for i in range(items):
        for k in range(items):
            forces[k] += quadratic[i, k] * point[i]
        for j in range(rows):
            activity[j] += matrix[j, i] * point[i]
    pull = np.empty(rows)
    for _step in range(rounds):
        for _sweep in range(sweeps):
            most = 0.0
            for i in range(items):
                gradient, bend = forces[i], quadratic[i, i]
                for j in range(rows):
                    if matrix[j, i] != 0.0:
                        up = prices[j] + rho[j] * (low[j] - activity[j])
                        down = prices[j] + rho[j] * (high[j] - activity[j])
                        if up > 0.0:
                            gradient -= up * matrix[j, i]
                            bend += rho[j] * matrix[j, i] ** 2
                        elif down < 0.0:
                            gradient -= down * matrix[j, i]
                            bend += rho[j] * matrix[j, i] ** 2
                if bend <= 0.0:
                    target = 0.0 if gradient > 0.0 else 1.0
                else:
                    target = min(1.0, max(0.0, point[i] - gradient / bend))
                change = target - point[i]
                if change == 0.0:
                    continue
                point[i] = target
                most = max(most, abs(change))
                for k in range(items):
                    forces[k] += quadratic[i, k] * change
                for j in range(rows):
                    activity[j] += matrix[j, i] * change
            if most < 1e-4:
                break
        worst = 0.0
        for j in range(rows):
            up = prices[j] + rho[j] * (low[j] - activity[j])
            down = prices[j] + rho[j] * (high[j] - activity[j])
            pull[j] = up if up > 0.0 else (down if down < 0.0 else 0.0)
            worst = max(worst, abs(pull[j] - prices[j]) / (abs(pull[j]) + 1e-300))
            prices[j] = pull[j]
        if worst < 1e-3:
            break
    return forces


@numba.njit(cache=True)
def shares(sizes, matrix, low, high, prices, found):  # type: ignore[no-untyped-def]
    """The kept shares y (f,) of the least ½ Σ q_i / y_i with low ≤ A (1 − y) ≤ high, roughly, in place; q ≥ 0.

    At prices μ an item has y_i = min(1, √(q_i / (2 (Aᵀμ)_i))); each price is bisected in turn.
    """
    rows, items = matrix.shape
    for _step in range(3 if rows > 1 else 1):
        for j in range(rows):
            bottom, top = 0.0, 0.0
            base = np.zeros(items)
            for i in range(items):
                for k in range(rows):
                    if k != j:
                        base[i] += matrix[k, i] * prices[k]
                if matrix[j, i] > 0.0:
                    # Beyond this price the item is almost all gone; below the other it stays.
                    top = max(top, (sizes[i] * 1e8 + 1e-300 - base[i]) / matrix[j, i])
                    bottom = min(bottom, -base[i] / matrix[j, i])
            if _gone(sizes, base, matrix[j], 0.0, found) < low[j]:
                below, above, goal = 0.0, top, low[j]
            elif _gone(sizes, base, matrix[j], 0.0, found) > high[j]:
                below, above, goal = bottom, 0.0, high[j]
            else:
                prices[j] = 0.0
                continue
            for _ in range(60):
                # The scale of prices is unknown, so that the middle is geometric where both ends are of one sign.
                middle = 0.5 * (below + above)
                if below >= 0.0 and above > 1e4 * max(below, 1e-12 * above):
                    middle = np.sqrt(max(below, 1e-12 * above) * above)
                if _gone(sizes, base, matrix[j], middle, found) < goal:
                    below = middle
                else:
                    above = middle
            prices[j] = above
    for i in range(items):
        price = 0.0
        for j in range(rows):
            price += matrix[j, i] * prices[j]
        found[i] = 1.0 if 2.0 * price <= sizes[i] else np.sqrt(sizes[i] / (2.0 * price))


@numba.njit(cache=True)
def _gone(sizes, base, row, price, found):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(row.size):
        if row[i] > 0.0:
            own = 2.0 * (base[i] + row[i] * price)
            total += row[i] * (1.0 - (1.0 if own <= sizes[i] else np.sqrt(sizes[i] / own)))
    return total
