"""The face of a relaxed point: the active-set method of the selection tree's kernels, one small step each.

Node problem, with M = Q − diag d (positive definite on 1^⊥) and b = c − ½d:

    min f(z) = ½ zᵀMz − bᵀz + const   subject to   0 ≤ z ≤ 1,  1ᵀz = k,  z fixed to 0 or 1 by the branching.

It is solved by an active-set method. The weights strictly between their bounds form the fractional set F, for which two
things are kept: P = N(NᵀM_FF N)⁻¹Nᵀ, N spanning the vectors of sum zero (the inverse of M on the face), and a, the
minimiser of ½aᵀM_FF a with 1ᵀa = 1. Fixing a weight, or clamping it to a bound, is a rank-one downdate of P; releasing
it is a rank-one update; a Newton step is −P∇f. A child thus costs a few operations of |F|² instead of a solve.

Whatever z is, convexity gives the certificate f(z) + min over feasible s of ∇f(z)ᵀ(s − z), a sum of the k smallest
partial derivatives; less a rounding margin it is the node's bound, so that errors in P cost tightness and never
validity. Its partial derivatives also fix weights (reduced costs).
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from solvers.problem import Array, Mask

Statuses = npt.NDArray[np.int8]
Indices = npt.NDArray[np.int64]


class Status(IntEnum):
    """Of a weight: decided by the branching (as in `Fate`), or open, with z at a bound or in between."""

    KEPT = 0
    PRUNED = 1
    AT_ZERO = 2
    AT_ONE = 3
    FRACTIONAL = 4


class Face(NamedTuple):
    """The node problem, its relaxed point, and the face it lies on; all arrays are changed in place.

    Attributes
    ----------
    matrix : float64 (n, n), linear : float64 (n,)
        M and b.
    sums : float64 (n,)
        Row sums of |M|.
    earlier, later : int64 (n,)
        Neighbours in a chain of weights that are pruned in this order in some optimum; −1 for none.
    status : int8 (n,)
    z, g : float64 (n,)
        The point and ∇f(z).
    inverse : float64 (n + 1, n + 1), centre : float64 (n + 1,), members : int64 (n + 1,)
        P, a and F, of which the leading part is in use.
    work : float64 (n + 1,)
    stop : bool (1,)
        Whether time is up.
    """

    matrix: Array
    linear: Array
    sums: Array
    earlier: Indices
    later: Indices
    status: Statuses
    z: Array
    g: Array
    inverse: Array
    centre: Array
    members: Indices
    work: Array
    stop: Mask


_EPS = float(np.finfo(np.float64).eps)
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
        if status[i] >= Status.AT_ZERO:
            work[free] = g[i]
            free += 1
        elif status[i] == Status.PRUNED:
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
def new_face(
    matrix: Array, linear: Array, earlier: Indices, later: Indices, point: Array, stop: Mask
) -> tuple[Face, int]:
    """(face, size of F) at a point (n,); entries strictly inside (0, 1) form F, as many as there is time for."""
    n = matrix.shape[0]
    sums = np.empty(n)
    for i in range(n):
        sums[i] = np.abs(matrix[i]).sum()
    status, z, work = np.full(n, Status.AT_ZERO, np.int8), np.zeros(n), np.empty(n + 1)
    inverse, centre, members = np.zeros((n + 1, n + 1)), np.zeros(n + 1), np.empty(n + 1, np.int64)
    size = 0
    for i in range(n):
        z[i] = min(max(point[i], 0.0), 1.0)
        if z[i] >= 1.0:
            status[i] = Status.AT_ONE
        elif z[i] > 0.0 and not stop[0]:
            grown = insert(matrix, inverse, centre, members, size, i, work)
            if grown > size:
                size, status[i] = grown, Status.FRACTIONAL
            else:
                z[i] = 0.0
    return Face(
        matrix, linear, sums, earlier, later, status, z, np.empty(n), inverse, centre, members, work, stop
    ), size


@numba.njit(cache=True, nogil=True)
def release(face: Face, size: int, var: int) -> int:
    """Put a weight at a bound into F; the new size, or the old one where that is impossible."""
    grown = insert(face.matrix, face.inverse, face.centre, face.members, size, var, face.work)
    if grown > size:
        face.status[var] = Status.FRACTIONAL
    return grown


@numba.njit(cache=True, nogil=True)
def decide(face: Face, size: int, var: int, to: int) -> int:
    """Fix an open weight to 0 or 1, whether it is in F or not; the new size."""
    if face.status[var] == Status.FRACTIONAL:
        for q in range(size):
            if face.members[q] == var:
                size = remove(face.inverse, face.centre, face.members, size, q, face.z, float(to))
                break
    face.z[var] = float(to)
    face.status[var] = to
    return size


@numba.njit(cache=True, nogil=True)
def branch(face: Face, size: int, q: int, to: int) -> int:
    """Fix the weight at position q of F, and its chain with it; the new size, −1 where the chain forbids it."""
    var = face.members[q]
    size = remove(face.inverse, face.centre, face.members, size, q, face.z, float(to))
    face.status[var] = to
    links = face.later if to == Status.KEPT else face.earlier
    var = links[var]
    while var >= 0:
        if face.status[var] >= Status.AT_ZERO:
            size = decide(face, size, var, to)
        elif face.status[var] != to:
            return -1
        var = links[var]
    return size


@numba.njit(cache=True, nogil=True)
def restore_sum(face: Face, size: int, count: int) -> int:
    """Bring Σ z back to k along a; the new size of F."""
    z, g, status = face.z, face.g, face.status
    missing = float(count)
    for i in range(z.shape[0]):
        missing -= z[i]
    if abs(missing) <= 1e-13:
        return size
    if size == 0:
        # The sum can only be repaired by a free weight at a bound: the cheapest.
        gradient(face.matrix, face.linear, z, g)
        var, cheapest = -1, np.inf
        for i in range(z.shape[0]):
            if missing > 0.0 and status[i] == Status.AT_ZERO and g[i] < cheapest:
                var, cheapest = i, g[i]
            elif missing < 0.0 and status[i] == Status.AT_ONE and -g[i] < cheapest:
                var, cheapest = i, -g[i]
        size = release(face, size, var)
    for t in range(size):
        z[face.members[t]] += missing * face.centre[t]
    return size


@numba.njit(cache=True, nogil=True)
def newton(face: Face, size: int) -> None:
    """A Newton step on F, and the gradient after it."""
    z, g, step = face.z, face.g, face.work
    gradient(face.matrix, face.linear, z, g)
    if size <= 1:
        return
    for t in range(size):
        step[t] = 0.0
    for i in range(size):
        gi = g[face.members[i]]
        for t in range(size):
            step[t] -= gi * face.inverse[i, t]
    for t in range(size):
        z[face.members[t]] += step[t]
    gradient(face.matrix, face.linear, z, g)


@numba.njit(cache=True, nogil=True)
def clamp(face: Face, size: int) -> int:
    """Take weights that have left [0, 1] out of F, the worst first; the new size."""
    z, status, members = face.z, face.status, face.members
    while size > 1 and not face.stop[0]:
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
        size = remove(face.inverse, face.centre, members, size, q, z, float(side))
        status[var] = Status.AT_ZERO + side
    return size


@numba.njit(cache=True, nogil=True)
def round_single(face: Face, size: int) -> int:
    """An F of one weight at a bound becomes empty; the new size."""
    if size != 1:
        return size
    var = face.members[0]
    x = face.z[var]
    if 1e-10 < x < 1.0 - 1e-10:
        return size
    side = 0 if x < 0.5 else 1
    face.z[var], face.status[var] = float(side), Status.AT_ZERO + side
    return 0


@numba.njit(cache=True, nogil=True)
def begin_face(face: Face) -> tuple[bool, int]:
    """(whether the integral point is the relaxation's minimum, size of F) for an empty F."""
    one, zero, g_one, g_zero = -1, -1, -np.inf, np.inf
    for i in range(face.z.shape[0]):
        if face.status[i] == Status.AT_ONE and face.g[i] > g_one:
            one, g_one = i, face.g[i]
        if face.status[i] == Status.AT_ZERO and face.g[i] < g_zero:
            zero, g_zero = i, face.g[i]
    if one < 0 or zero < 0 or g_one <= g_zero:
        return True, 0
    return False, release(face, release(face, 0, one), zero)


@numba.njit(cache=True, nogil=True)
def most_wrong(face: Face, size: int, least: float) -> int:
    """The weight at a bound whose partial derivative has the wrong sign by most, and by more than `least`; or −1."""
    level = 0.0
    for t in range(size):
        level += face.g[face.members[t]]
    level /= size
    var, most = -1, least
    for i in range(face.z.shape[0]):
        if face.status[i] == Status.AT_ZERO and level - face.g[i] > most:
            var, most = i, level - face.g[i]
        elif face.status[i] == Status.AT_ONE and face.g[i] - level > most:
            var, most = i, face.g[i] - level
    return var


@numba.njit(cache=True, nogil=True)
def complete(face: Face, left: int, constant: float) -> float:
    """Give all open weights the one value that is left to them; f(z)."""
    n = face.z.shape[0]
    for i in range(n):
        if face.status[i] >= Status.AT_ZERO:
            face.z[i] = 1.0 if left > 0 else 0.0
    gradient(face.matrix, face.linear, face.z, face.g)
    value = constant
    for i in range(n):
        value += 0.5 * face.z[i] * (face.g[i] - face.linear[i])
    return value
