"""Depth-first search below one node of the selection tree, in compiled code.

Node problem, with M = Q − diag d (positive definite on 1^⊥) and b = c − ½d:

    min f(z) = ½ zᵀMz − bᵀz + const   subject to   0 ≤ z ≤ 1,  1ᵀz = k,  z fixed to 0 or 1 by the branching.

It is solved by an active-set method. The weights strictly between their bounds form the fractional set F, for which two
things are kept: P = N(NᵀM_FF N)⁻¹Nᵀ, N spanning the vectors of sum zero (the inverse of M on the face), and a, the
minimiser of ½aᵀM_FF a with 1ᵀa = 1. Fixing a weight, or clamping it to a bound, is a rank-one downdate of P; releasing
it is a rank-one update; a Newton step is −P∇f. A child thus costs a few operations of |F|² instead of a solve.

Whatever z is, convexity gives the certificate f(z) + min over feasible s of ∇f(z)ᵀ(s − z), a sum of the k smallest
partial derivatives; less a rounding margin it is the node's bound, so that errors in P cost tightness and never
validity. Its partial derivatives also fix weights (reduced costs).

Branching: if F alone were left free, fixing z_q to 0 or 1 would raise f by ½ z_q²/P_qq or ½ (1 − z_q)²/P_qq: strong
branching for nothing. The product of the two, each capped at three times what is needed to prune, weighted by
their sum, chooses q. The child with the smaller rise is searched first.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from solvers.problem import Array, Mask

Statuses = npt.NDArray[np.int8]
Indices = npt.NDArray[np.int64]

#: Statuses of a weight: fixed to 0 or 1 by the branching, free at the bound 0 or 1, or fractional.
FIXED_ZERO, FIXED_ONE, AT_ZERO, AT_ONE, FRACTIONAL = 0, 1, 2, 3, 4
#: Places in the counters.
NODES, PIVOTS, FIXINGS, ROUNDS, LEAVES, STUCK = range(6)

_EPS = float(np.finfo(np.float64).eps)
_ROUNDS = 60
_REASSOCIATE = {"reassoc", "contract", "nsz"}


@numba.njit(cache=True, nogil=True, fastmath=_REASSOCIATE)
def gradient(matrix: Array, linear: Array, z: Array, out: Array) -> None:
    """Put M z − b into `out`."""
    n = z.shape[0]
    for i in range(n):
        out[i] = -linear[i]
    for j in range(n):
        if z[j] != 0.0:
            zj, row = z[j], matrix[j]
            for i in range(n):
                out[i] += zj * row[i]


@numba.njit(cache=True, nogil=True, fastmath=_REASSOCIATE)
def remove(inverse: Array, centre: Array, members: Indices, size: int, q: int, z: Array, to: float) -> int:
    """Move the weight at position q of F to the value `to`, re-optimise the others, take it out of F; the new size."""
    last = size - 1
    if q != last:
        members[q], members[last] = members[last], members[q]
        centre[q], centre[last] = centre[last], centre[q]
        for i in range(size):
            inverse[q, i], inverse[last, i] = inverse[last, i], inverse[q, i]
        for i in range(size):
            inverse[i, q], inverse[i, last] = inverse[i, last], inverse[i, q]
    pivot = inverse[last, last]
    var = members[last]
    if pivot > 0.0:
        shift = (to - z[var]) / pivot
        ratio = centre[last] / pivot
        for i in range(last):
            column = inverse[i, last]
            z[members[i]] += shift * column
            centre[i] -= ratio * column
            factor = column / pivot
            if factor != 0.0:
                for j in range(last):
                    inverse[i, j] -= factor * inverse[last, j]
    z[var] = to
    return last


@numba.njit(cache=True, nogil=True, fastmath=_REASSOCIATE)
def insert(matrix: Array, inverse: Array, centre: Array, members: Indices, size: int, var: int, p: Array) -> int:
    """Put a weight into F; the new size, or the old one where M is not positive definite along the new direction."""
    if size == 0:
        members[0] = var
        inverse[0, 0] = 0.0
        centre[0] = 1.0
        return 1
    row = matrix[var]
    for i in range(size):
        p[i] = -centre[i]
    for i in range(size):
        m = row[members[i]]
        for t in range(size):
            p[t] -= m * inverse[i, t]
    p[size] = 1.0
    first = matrix[members[0]]
    multiplier, own = row[members[0]], row[var]
    for t in range(size):
        multiplier += first[members[t]] * p[t]
        own += row[members[t]] * p[t]
    curvature = own - multiplier
    if not curvature > 1e-300:
        return size
    for i in range(size):
        scaled = p[i] / curvature
        for j in range(size):
            inverse[i, j] += scaled * p[j]
        inverse[i, size] = scaled
        inverse[size, i] = scaled
    inverse[size, size] = 1.0 / curvature
    ratio = multiplier / curvature
    centre[size] = 0.0
    for i in range(size + 1):
        centre[i] -= ratio * p[i]
    members[size] = var
    return size + 1


@numba.njit(cache=True, nogil=True)
def certificate(
    z: Array, g: Array, linear: Array, sums: Array, status: Statuses, count: int, constant: float, work: Array
) -> tuple[float, float, float, float]:
    """(bound, f(z), largest of the k smallest partial derivatives, the next one); k = `count` counts free weights."""
    n = z.shape[0]
    value, inner, size, least, free = constant, 0.0, abs(constant), 0.0, 0
    for i in range(n):
        if z[i] != 0.0:
            value += 0.5 * z[i] * (g[i] - linear[i])
            inner += g[i] * z[i]
            size += abs(z[i]) * (sums[i] + abs(linear[i]))
        if status[i] >= AT_ZERO:
            work[free] = g[i]
            free += 1
        elif status[i] == FIXED_ONE:
            least += g[i]
            size += sums[i] + abs(linear[i])
    high, after = -np.inf, np.inf
    if count == free:
        for t in range(free):
            least += work[t]
    elif count > 0:
        parts = np.partition(work[:free], count)
        for t in range(count):
            least += parts[t]
            high = max(high, parts[t])
        after = parts[count]
    return value - inner + least - (n + 16) * _EPS * size, value, high, after


@numba.njit(cache=True, nogil=True)
def _branching_position(inverse: Array, members: Indices, size: int, z: Array, needed: float) -> int:
    """The position in F to branch on."""
    best, chosen = -1.0, 0
    for q in range(size):
        if inverse[q, q] <= 0.0:
            continue
        x = z[members[q]]
        down = 0.5 * x * x / inverse[q, q]
        up = 0.5 * (1.0 - x) * (1.0 - x) / inverse[q, q]
        score = min(down, 3.0 * needed) * min(up, 3.0 * needed) * (down + up)
        if score > best:
            best, chosen = score, q
    return chosen


@numba.njit(cache=True, nogil=True)
def explore(
    matrix: Array,
    linear: Array,
    constant: float,
    count: int,
    point: Array,
    upper: float,
    best: Mask,
    node_limit: int,
    tolerance: float,
) -> tuple[float, Statuses, Array, Array, Indices]:
    """Search the tree below a node in which every weight is still free.

    Parameters
    ----------
    matrix : float64 (n, n), M, positive definite on 1^⊥
    linear : float64 (n,), b
    constant : float
    count : int, 0 < k < n
    point : float64 (n,)
        Where to start; entries strictly inside (0, 1) form the first fractional set.
    upper : float
        Value of the incumbent; nodes that cannot beat it by `tolerance` are dropped.
    best : bool (n,)
        Overwritten with a better incumbent where one is found.
    node_limit : int
        After this many nodes the open ones are handed back.
    tolerance : float
        Absolute.

    Returns
    -------
    upper : float
    statuses : int8 (m, n)
        The m open nodes: 0, 1, or 2 for free.
    bounds : float64 (m,)
    points : float64 (m, n)
    counters : int64 (6,)
    """
    n = matrix.shape[0]
    status = np.full(n, AT_ZERO, np.int8)
    z, g, work, p = np.zeros(n), np.empty(n), np.empty(n), np.empty(n + 1)
    sums = np.empty(n)
    for i in range(n):
        sums[i] = np.abs(matrix[i]).sum()
    inverse, centre, members = np.zeros((n + 1, n + 1)), np.zeros(n + 1), np.empty(n + 1, np.int64)
    size = 0
    for i in range(n):
        z[i] = min(max(point[i], 0.0), 1.0)
        if z[i] >= 1.0:
            status[i] = AT_ONE
        elif z[i] > 0.0:
            grown = insert(matrix, inverse, centre, members, size, i, p)
            if grown > size:
                size, status[i] = grown, FRACTIONAL
            else:
                z[i] = 0.0
    counters = np.zeros(6, np.int64)
    # The stack holds the far children. Its inverses lie one after another in one growing buffer.
    depth, room, used = 0, n + 2, 0
    s_status, s_z = np.empty((room, n), np.int8), np.empty((room, n))
    s_members, s_centre = np.empty((room, n), np.int64), np.empty((room, n))
    s_size, s_used = np.empty(room, np.int64), np.empty(room, np.int64)
    s_place, s_value, s_bound = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room)
    pool = np.empty(4 * (size + 8) * (size + 8))
    opened = 0
    o_status, o_bound, o_z = np.empty((room, n), np.int8), np.empty(room), np.empty((room, n))
    bound, pending = -np.inf, True
    while True:
        cut = upper - tolerance
        if not pending:
            if depth == 0:
                break
            depth -= 1
            used = s_used[depth]
            if s_bound[depth] >= cut:
                continue
            size, bound = s_size[depth], s_bound[depth]
            status[:] = s_status[depth]
            z[:] = s_z[depth]
            at = used
            for i in range(size):
                members[i], centre[i] = s_members[depth, i], s_centre[depth, i]
                for j in range(size):
                    inverse[i, j] = pool[at]
                    at += 1
            q = s_place[depth]
            var, to = members[q], s_value[depth]
            size = remove(inverse, centre, members, size, q, z, float(to))
            status[var] = to
            if counters[NODES] >= node_limit:
                for i in range(n):
                    o_status[opened, i] = min(status[i], AT_ZERO)
                o_bound[opened] = bound
                o_z[opened] = z
                opened += 1
                continue
        pending = False
        counters[NODES] += 1
        ones, free = 0, 0
        for i in range(n):
            ones += status[i] == FIXED_ONE
            free += status[i] >= AT_ZERO
        left = count - ones
        if left < 0 or left > free:
            continue
        dropped, current, high, after = False, bound, 0.0, 0.0
        for _ in range(_ROUNDS):
            counters[ROUNDS] += 1
            missing = float(count)
            for i in range(n):
                missing -= z[i]
            if left in (0, free):
                missing = 0.0
            if abs(missing) > 1e-13:
                if size == 0:
                    # The sum can only be repaired by a free weight at a bound: the cheapest.
                    gradient(matrix, linear, z, g)
                    var, cheapest = -1, np.inf
                    for i in range(n):
                        if missing > 0.0 and status[i] == AT_ZERO and g[i] < cheapest:
                            var, cheapest = i, g[i]
                        elif missing < 0.0 and status[i] == AT_ONE and -g[i] < cheapest:
                            var, cheapest = i, -g[i]
                    size = insert(matrix, inverse, centre, members, size, var, p)
                    status[var] = FRACTIONAL
                for t in range(size):
                    z[members[t]] += missing * centre[t]
            gradient(matrix, linear, z, g)
            if size > 1:
                for t in range(size):
                    p[t] = 0.0
                for i in range(size):
                    gi = g[members[i]]
                    for t in range(size):
                        p[t] -= gi * inverse[i, t]
                for t in range(size):
                    z[members[t]] += p[t]
                gradient(matrix, linear, z, g)
            current, value, high, after = certificate(z, g, linear, sums, status, left, constant, work)
            bound = max(bound, current)
            if bound >= cut:
                dropped = True
                break
            if left in (0, free):
                # Nothing is left to choose.
                for i in range(n):
                    if status[i] >= AT_ZERO:
                        z[i] = 1.0 if left > 0 else 0.0
                gradient(matrix, linear, z, g)
                value = constant
                for i in range(n):
                    value += 0.5 * z[i] * (g[i] - linear[i])
                if value < upper:
                    upper = value
                    for i in range(n):
                        best[i] = z[i] > 0.5
                counters[LEAVES] += 1
                dropped = True
                break
            clamped = 0
            while size > 1:
                q, worst = -1, 1e-10
                for t in range(size):
                    x = z[members[t]]
                    outside = max(-x, x - 1.0)
                    if outside > worst:
                        q, worst = t, outside
                if q < 0:
                    break
                var = members[q]
                side = 0 if z[var] < 0.5 else 1
                size = remove(inverse, centre, members, size, q, z, float(side))
                status[var] = AT_ZERO + side
                clamped += 1
            if size == 1 and (z[members[0]] <= 1e-10 or z[members[0]] >= 1.0 - 1e-10):
                var = members[0]
                side = 0 if z[var] < 0.5 else 1
                z[var], status[var], size = float(side), AT_ZERO + side, 0
            counters[PIVOTS] += clamped
            if clamped > 0:
                continue
            if size == 0:
                one, zero, g_one, g_zero = -1, -1, -np.inf, np.inf
                for i in range(n):
                    if status[i] == AT_ONE and g[i] > g_one:
                        one, g_one = i, g[i]
                    if status[i] == AT_ZERO and g[i] < g_zero:
                        zero, g_zero = i, g[i]
                if one < 0 or zero < 0 or g_one <= g_zero:
                    # The relaxation is integral.
                    if value < upper:
                        upper = value
                        for i in range(n):
                            best[i] = z[i] > 0.5
                    counters[LEAVES] += 1
                    dropped = True
                    break
                size = insert(matrix, inverse, centre, members, 0, one, p)
                status[one] = FRACTIONAL
                grown = insert(matrix, inverse, centre, members, size, zero, p)
                if grown == size:
                    break
                size, status[zero] = grown, FRACTIONAL
                continue
            level = 0.0
            for t in range(size):
                level += g[members[t]]
            level /= size
            # Stop once all wrong signs together could raise the bound by only a thousandth of what is needed.
            var, most = -1, 1e-3 * (cut - bound) / max(1, left)
            for i in range(n):
                if status[i] == AT_ZERO and level - g[i] > most:
                    var, most = i, level - g[i]
                elif status[i] == AT_ONE and g[i] - level > most:
                    var, most = i, g[i] - level
            if var < 0:
                break
            grown = insert(matrix, inverse, centre, members, size, var, p)
            if grown == size:
                break
            size, status[var] = grown, FRACTIONAL
            counters[PIVOTS] += 1
        if dropped:
            continue
        needed = cut - current
        for i in range(n):
            # Forcing a weight against the order of the partial derivatives costs at least their difference.
            if status[i] == AT_ZERO and g[i] - high >= needed:
                status[i] = FIXED_ZERO
                counters[FIXINGS] += 1
            elif status[i] == AT_ONE and after - g[i] >= needed:
                status[i] = FIXED_ONE
                counters[FIXINGS] += 1
        if size == 0 or opened + depth + 2 >= room:
            # Cannot be branched on here; whoever called solves it afresh.
            for i in range(n):
                o_status[opened, i] = min(status[i], AT_ZERO)
            o_bound[opened] = bound
            o_z[opened] = z
            opened += 1
            counters[STUCK] += 1
            if opened + depth + 2 >= room:
                node_limit = counters[NODES]
            continue
        q = _branching_position(inverse, members, size, z, cut - bound)
        near = 0 if z[members[q]] < 0.5 else 1
        if used + size * size > pool.shape[0]:
            larger = np.empty(2 * pool.shape[0] + size * size)
            larger[:used] = pool[:used]
            pool = larger
        s_size[depth], s_used[depth], s_place[depth], s_value[depth] = size, used, q, 1 - near
        s_bound[depth] = bound
        s_status[depth] = status
        s_z[depth] = z
        for i in range(size):
            s_members[depth, i], s_centre[depth, i] = members[i], centre[i]
            for j in range(size):
                pool[used] = inverse[i, j]
                used += 1
        depth += 1
        var = members[q]
        size = remove(inverse, centre, members, size, q, z, float(near))
        status[var] = near
        pending = True
    return upper, o_status[:opened].copy(), o_bound[:opened].copy(), o_z[:opened].copy(), counters
