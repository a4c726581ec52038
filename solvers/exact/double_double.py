"""Double-double arithmetic: numbers as unevaluated sums of two float64, some 32 decimal digits.

Sources: Dekker (1971); Knuth, *The Art of Computer Programming* 2, 4.2.2; Hida, Li & Bailey, "Library for
double-double and quad-double arithmetic", 2000.
"""

from __future__ import annotations

import numba

Pair = tuple[float, float]

#: Relative error of one operation, with room.
EPSILON = 2.0**-100


@numba.njit(cache=True, nogil=True)
def add(a: Pair, b: Pair) -> Pair:
    """a + b."""
    high = a[0] + b[0]
    part = high - a[0]
    low = (a[0] - (high - part)) + (b[0] - part)
    low += a[1] + b[1]
    total = high + low
    return total, low - (total - high)


@numba.njit(cache=True, nogil=True)
def product(x: float, y: float) -> Pair:
    """x·y of two floats, exactly."""
    high = x * y
    t = 134217729.0 * x
    xh = t - (t - x)
    t = 134217729.0 * y
    yh = t - (t - y)
    xl, yl = x - xh, y - yh
    return high, ((xh * yh - high) + xh * yl + xl * yh) + xl * yl


@numba.njit(cache=True, nogil=True)
def multiply(a: Pair, b: Pair) -> Pair:
    """a·b."""
    high, low = product(a[0], b[0])
    low += a[0] * b[1] + a[1] * b[0]
    total = high + low
    return total, low - (total - high)


@numba.njit(cache=True, nogil=True)
def divide(a: Pair, b: Pair) -> Pair:
    """a/b."""
    first = a[0] / b[0]
    rest = add(a, multiply((-first, 0.0), b))
    second = rest[0] / b[0]
    rest = add(rest, multiply((-second, 0.0), b))
    return add((first, second), (rest[0] / b[0], 0.0))
