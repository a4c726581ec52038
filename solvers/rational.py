"""The objective of a mask in exact rational arithmetic: the last word where float64 cannot decide.

Weights, factor, damping and gradient are floats, hence rationals. With d_P = −w_P both objectives are what is left of
f(d) = gᵀd + ½ dᵀHd: at d_S = 0 for the selection objective, at the minimum over d_S for the joint one. Exactly that is
the Schur complement of H_SS in

    [ H_SS   b ]       b = g_S − H_SP w_P ,      c = w_Pᵀ H_PP w_P − 2 g_Pᵀ w_P ,
    [ bᵀ     c ]

twice the value, found by fraction-free elimination over the integers (Bareiss, 1968); a pivot of zero belongs to a
direction without curvature, in which b vanishes, too, or the objective falls without end.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from solvers.arrays import Array, Mask, ProblemArrays
from solvers.problem import Objective, SelectionProblem

Integers = list[list[int]]


class ExactProblem:
    """A small problem over the integers, made once for any number of masks.

    H is held in units of 2^(−2e), w in units of 2^(−e'), so that H, Hw, g and wᵀHw are integers in units of
    2^(−2e), 2^(−2e − e') and 2^(−2e − 2e').

    Parameters
    ----------
    arrays : ProblemArrays
    objective : Objective
    """

    def __init__(self, arrays: ProblemArrays, objective: Objective) -> None:
        self.joint = objective is Objective.JOINT
        fine = _digits(arrays.weights)
        unit = max(
            _digits(arrays.factor), (_digits(arrays.damping) + 1) // 2, (_digits(arrays.gradient) - fine + 1) // 2
        )
        self._one = 1 << (2 * unit + 2 * fine)
        self.weights = _integers(arrays.weights, fine)
        columns = [_integers(column, unit) for column in arrays.factor.T]
        damping = _integers(arrays.damping, 2 * unit)
        self.gradient = _integers(arrays.gradient, 2 * unit + fine)
        self.hessian: Integers = [
            [
                sum(a * b for a, b in zip(x, y, strict=True)) + (damping[i] if i == j else 0)
                for j, y in enumerate(columns)
            ]
            for i, x in enumerate(columns)
        ]

    def value(self, pruned: Mask) -> Fraction | None:
        """The objective of a mask (n,); None where the joint objective is unbounded below."""
        gone, kept = np.flatnonzero(pruned).tolist(), np.flatnonzero(~pruned).tolist()
        w, g, h = self.weights, self.gradient, self.hessian
        pull = [sum(h[i][j] * w[j] for j in gone) for i in range(len(w))]
        twice = sum(w[i] * (pull[i] - 2 * g[i]) for i in gone)
        if not self.joint:
            return Fraction(twice, 2 * self._one)
        rows = [[h[i][j] for j in kept] + [g[i] - pull[i]] for i in kept]
        rows.append([row[-1] for row in rows] + [twice])
        reduced = _schur(rows)
        return None if reduced is None else reduced / (2 * self._one)


def exact_value(problem: SelectionProblem, pruned: Mask) -> Fraction | None:
    """The problem's own objective of a mask (n,), exactly; None where it is unbounded below.

    Cost: for the joint objective |S|³/3 multiplications of integers of up to |S| times 200 bits.
    """
    return ExactProblem(problem.arrays(), problem.objective).value(pruned)


def _digits(values: Array) -> int:
    """The least e for which all values are multiples of 2^(−e); may be negative."""
    nonzero = values[values != 0.0]
    if nonzero.size == 0:
        return 0
    mantissas, exponents = np.frexp(nonzero)
    whole = (mantissas * 2.0**53).astype(np.int64)
    lowest = np.log2((whole & -whole).astype(np.float64)).astype(np.int64)
    return int((53 - exponents - lowest).max())


def _integers(values: Array, digits: int) -> list[int]:
    """The values as integers in units of 2^(−digits)."""
    found = []
    for value in values.tolist():
        above, below = float(value).as_integer_ratio()
        found.append((above << digits) // below if digits >= 0 else above // (below << -digits))
    return found


def _schur(rows: Integers) -> Fraction | None:
    """What the last diagonal entry of a symmetric matrix becomes when all others are eliminated."""
    last, previous = len(rows) - 1, 1
    for k in range(last):
        pivot = rows[k][k]
        if pivot == 0:
            # H is positive semidefinite: the row is zero.
            if rows[k][last] != 0:
                return None
            continue
        for i in range(k + 1, last + 1):
            factor, row = rows[k][i], rows[i]
            for j in range(i, last + 1):
                row[j] = (row[j] * pivot - factor * rows[k][j]) // previous
        previous = pivot
    return Fraction(rows[last][last], previous)
