"""All masks of a small problem with their values, and how far each value may be off.

With d_P = −w_P both objectives are f(d) = gᵀd + ½ dᵀHd, at d_S = 0 or minimised over d_S. A depth-first walk decides
one weight after another and carries H, g and the constant of the undecided weights: removing i adds w_i²H_ii − 2w_i g_i
to twice the constant and −w_i H_:i to g; keeping i (joint) takes the Schur complement. All sums are in double-double
arithmetic, so that a value far below the scale of what is kept has its digits; the error allowed for grows with
the terms that cancelled and with the loss of the smallest pivot. What even that cannot decide is evaluated in
rational arithmetic (`solvers.rational`).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from solvers.arrays import Array, Mask, ProblemArrays
from solvers.budget import Budget, Cardinality, Partitioned, as_partition
from solvers.exact.double_double import EPSILON, add, divide, multiply, product
from solvers.problem import Objective
from solvers.rational import ExactProblem

#: Most weights, as C(20, 10) masks fit in memory and take about a second.
MOST_WEIGHTS = 20
#: Masks that are evaluated in rational arithmetic before "not proven" is the answer.
_MOST_EXACT = 2000
#: A pivot below this fraction of its diagonal entry may be zero.
_DEPENDENT = 2.0**-94
#: Masks whose values differ by less than this fraction are ties.
_TIE = 1e-13


class AllMasks(NamedTuple):
    """Every mask that keeps a budget.

    Attributes
    ----------
    codes : int64 (masks,)
        Bit n − 1 − i is set where weight i is removed, so that the lexicographically first mask has the largest
        code; in falling order.
    values : float64 (masks,)
        −inf where the joint objective is unbounded below.
    errors : float64 (masks,)
        How far the value may be off; inf where nothing is known.
    """

    codes: npt.NDArray[np.int64]
    values: Array
    errors: Array


class Optimum(NamedTuple):
    """The best mask (n,), its value, a lower bound on all masks; how many there are, and were evaluated exactly."""

    pruned: Mask
    value: float
    bound: float
    exact: int
    masks: int


def enumerate_masks(arrays: ProblemArrays, objective: Objective, budget: Budget) -> AllMasks:
    """All masks that keep a budget; n ≤ `MOST_WEIGHTS`. Kinds other than numbers are looked for among all 2ⁿ."""
    n = arrays.weights.size
    if not isinstance(budget, (Cardinality, Partitioned)):
        parts = [enumerate_masks(arrays, objective, Cardinality(k)) for k in range(n + 1)]
        kept = [
            np.array([not budget.violation(_decode(code, n)) for code in part.codes.tolist()], dtype=bool)
            for part in parts
        ]
        whole = [np.concatenate([field[some] for field, some in zip(fields, kept, strict=True)])
                 for fields in zip(*parts, strict=True)]  # fmt: skip
        order = np.argsort(-whole[0], kind="stable")
        return AllMasks(whole[0][order], whole[1][order], whole[2][order])
    # Powers of two, so that nothing is rounded: columns of the size of one, and the weights to match.
    size = np.sqrt(np.square(arrays.factor).sum(0) + arrays.damping)
    units = np.exp2(np.round(np.log2(np.where(size > 0.0, size, 1.0))))
    high, low = _hessian(arrays.factor / units, arrays.damping / units**2)
    partition = as_partition(budget, n)
    count = math.prod(map(math.comb, partition.sizes, partition.counts))
    codes, values, errors = np.zeros(count, dtype=np.int64), np.zeros(count), np.zeros(count)
    _walk(
        high, low, arrays.weights * units, arrays.gradient / units,
        partition.quotas[partition.group_of], partition.starts[partition.group_of + 1], objective is Objective.JOINT,
        codes, values, errors,
    )  # fmt: skip
    return AllMasks(codes, values, errors)


def best_mask(arrays: ProblemArrays, objective: Objective, budget: Budget) -> Optimum:
    """The best of all masks; of masks that tie, the lexicographically first (as a sorted list of removed weights)."""
    found = enumerate_masks(arrays, objective, budget)
    values = np.where(np.isnan(found.values), np.inf, found.values)
    # Values are rounded to nearest; a bound must not be above.
    lower = np.nextafter(found.values - found.errors, -np.inf)
    lower[np.isnan(lower)] = -np.inf
    if not arrays.gradient.any():
        # Sums of squares.
        values, lower = np.maximum(values, 0.0), np.maximum(lower, 0.0)
    best = float(values.min())
    exact = 0
    if float(lower.min()) < best - 1e-10 * abs(best) and math.isfinite(best):
        exact = _settle(arrays, objective, found.codes, values, lower)
        best = float(values.min())
    least = float(lower.min())
    limit = best + _TIE * abs(best) if math.isfinite(best) else best
    chosen = int(np.flatnonzero(values <= limit)[0])
    value = float(values[chosen])
    return Optimum(_decode(int(found.codes[chosen]), arrays.weights.size), value, min(least, value), exact, values.size)


def _settle(
    arrays: ProblemArrays, objective: Objective, codes: npt.NDArray[np.int64], values: Array, lower: Array
) -> int:
    """Evaluate exactly, in place, the masks that may be better than the best; how many that took."""
    problem, done = ExactProblem(arrays, objective), 0
    best = math.inf
    for at in np.argsort(lower, kind="stable"):
        if done == _MOST_EXACT or lower[at] >= best - 1e-12 * abs(best):
            break
        done += 1
        value = problem.value(_decode(int(codes[at]), arrays.weights.size))
        if value is None:
            values[at] = lower[at] = -math.inf
        else:
            values[at] = float(value)
            lower[at] = values[at] if Fraction(values[at]) <= value else np.nextafter(values[at], -math.inf)
        best = min(best, float(values[at]))
    # A value whose error is too large must not be taken for the best.
    values[(values < best) & (lower < best)] = math.inf
    return done


def _decode(code: int, n: int) -> Mask:
    return np.array([bool(code >> (n - 1 - i) & 1) for i in range(n)])


@numba.njit(cache=True)
def _hessian(factor, damping):  # type: ignore[no-untyped-def]
    """H = AᵀA + diag(λ) in double-double: two (n, n) arrays."""
    n = damping.size
    high, low = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            total = (damping[i] if i == j else 0.0, 0.0)
            for row in range(factor.shape[0]):
                total = add(total, product(factor[row, i], factor[row, j]))
            high[i, j], low[i, j] = total
            high[j, i], low[j, i] = total
    return high, low


@numba.njit(cache=True)
def _remove(high, low, above, under, at, i, weight):  # type: ignore[no-untyped-def]
    """Fill level `at` + 1 with what the removal of i leaves; the size of the terms added to the constant."""
    n = weight.size
    minus = (-weight[i], 0.0)
    for j in range(i + 1, n):
        above[at + 1, j], under[at + 1, j] = add(
            (above[at, j], under[at, j]), multiply(minus, (high[at, i, j], low[at, i, j]))
        )
        for k in range(i + 1, j + 1):
            high[at + 1, k, j], low[at + 1, k, j] = high[at, k, j], low[at, k, j]
    linear = multiply((2.0 * minus[0], 0.0), (above[at, i], under[at, i]))
    square = multiply(product(weight[i], weight[i]), (high[at, i, i], low[at, i, i]))
    above[at + 1, n], under[at + 1, n] = add((above[at, n], under[at, n]), add(linear, square))
    return abs(linear[0]) + abs(square[0])


@numba.njit(cache=True)
def _keep(high, low, above, under, at, i, joint):  # type: ignore[no-untyped-def]
    """As above when i is kept: a Schur complement for the joint objective."""
    n = above.shape[1] - 1
    pivot = (high[at, i, i], low[at, i, i])
    above[at + 1, i + 1 :], under[at + 1, i + 1 :] = above[at, i + 1 :], under[at, i + 1 :]
    own = (-above[at, i], -under[at, i])
    for j in range(i + 1, n):
        if joint:
            ratio = divide((high[at, i, j], low[at, i, j]), pivot)
            minus = (-ratio[0], -ratio[1])
            above[at + 1, j], under[at + 1, j] = add((above[at, j], under[at, j]), multiply(ratio, own))
            for k in range(i + 1, j + 1):
                high[at + 1, k, j], low[at + 1, k, j] = add(
                    (high[at, k, j], low[at, k, j]), multiply(minus, (high[at, i, k], low[at, i, k]))
                )
        else:
            for k in range(i + 1, j + 1):
                high[at + 1, k, j], low[at + 1, k, j] = high[at, k, j], low[at, k, j]
    if not joint:
        return 0.0
    gain = multiply(own, divide(own, pivot))
    above[at + 1, n], under[at + 1, n] = add((above[at, n], under[at, n]), (-gain[0], -gain[1]))
    return abs(gain[0])


@numba.njit(cache=True, error_model="numpy")
def _walk(hessian, rest, weight, gradient, quota, end, joint, codes, values, errors):  # type: ignore[no-untyped-def]
    """Fill codes, values and errors; the last entry of `above` and `under` is twice the constant.

    `quota` (n,) is what the group of each weight loses, `end` (n,) the weight after its last.
    """
    n = weight.size
    high, low = np.zeros((n + 1, n, n)), np.zeros((n + 1, n, n))
    above, under = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1))
    high[0], low[0], above[0, :n] = hessian, rest, gradient
    # Terms added so far, the smallest pivot beside its diagonal entry, weights removed of a group, next fate to try.
    terms, loss, gone = np.zeros(n + 1), np.ones(n + 1), np.zeros(n + 1, np.int64)
    todo, code, found = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64), 0
    at = 0
    while at >= 0:
        if at == n:
            codes[found], values[found] = code[n], 0.5 * above[n, n]
            errors[found] = n * EPSILON * terms[n] / loss[n] ** 2
            if loss[n] < 0.0:
                values[found], errors[found] = -np.inf, 0.0
            found += 1
            at -= 1
            continue
        fate, i = todo[at], at
        todo[at] += 1
        if fate > 1:
            at -= 1
            continue
        code[at + 1], gone[at + 1], loss[at + 1] = code[at], gone[at] + (fate == 0), loss[at]
        if gone[at + 1] > quota[i] or quota[i] - gone[at + 1] > end[i] - i - 1:
            continue
        if i + 1 == end[i]:
            gone[at + 1] = 0
        if fate == 0:
            code[at + 1] |= 1 << (n - 1 - i)
            terms[at + 1] = terms[at] + _remove(high, low, above, under, at, i, weight)
        else:
            share = high[at, i, i] / hessian[i, i] if hessian[i, i] > 0.0 else 1.0
            flat = joint and (hessian[i, i] == 0.0 or share <= _DEPENDENT)
            terms[at + 1] = terms[at] + _keep(high, low, above, under, at, i, joint and not flat)
            if flat and hessian[i, i] == 0.0 and above[at, i] != 0.0:
                # A gradient without curvature.
                loss[at + 1] = -1.0
            elif joint and hessian[i, i] > 0.0:
                loss[at + 1] = min(loss[at], 0.0 if flat else share)
        at += 1
        todo[at] = 0
