"""Brute force: look at every mask. The oracle the other exact backends are tested against.

With B = [A; √λ I] reduced to n rows by QR, the selection objective of P is ½ ‖Σ_{i∈P} B_i w_i‖² − g_Pᵀ w_P: the
sum is carried down a depth-first walk over the subsets in lexicographic order. For the joint objective let
H d₀ = −g; completing the square turns CBS into best-subset regression,

    min over v with v_P = 0 of  ½ ‖B v − y‖² − ½ ‖B d₀‖²,     y = B (w + d₀),

and the walk over the kept sets S carries modified Gram–Schmidt of [B_S, y], whose residual is the value. Both
walks work on vectors, never on H, so a value far below the problem's scale keeps its digits.

Ties within rounding go to the mask that is lexicographically first (as a sorted list of removed weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numba
import numpy as np
import numpy.typing as npt

from solvers.exact.completion import complete_square
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Capability, Context, Solver

#: Masks whose values differ by less than this fraction of the problem's scale are ties.
TIE_TOLERANCE = 1e-14
_DEPENDENT = 1e-13
_SHORT_LIST = 64


@dataclass(frozen=True)
class BruteForceSolver(Solver):
    """Every mask of at most 20 weights."""

    name = "brute_force"
    summary = "look at every mask (at most 20 weights): the oracle"
    reference = ""
    capabilities = frozenset(
        {
            Capability.SELECTION,
            Capability.JOINT,
            Capability.GLOBAL_BUDGET,
            Capability.LINEAR_TERM,
            Capability.BOUND,
            Capability.EXACT,
        }
    )
    max_weights = 20

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The best of all masks; its value is the bound."""
        codes, values = enumerate_masks(problem)
        # Unbounded masks (−inf) tie with one another; nothing finite ties with them.
        limit = values.min() + TIE_TOLERANCE * problem.scale
        tied = np.flatnonzero(values <= limit)
        short = tied[np.argsort(-codes[tied], kind="stable")][:_SHORT_LIST]
        masks = [_decode(int(codes[i]), problem.n) for i in short]
        exact = [problem.value(mask) for mask in masks]
        best = min(exact)
        chosen = next(i for i, value in enumerate(exact) if value <= best + TIE_TOLERANCE * problem.scale)
        context.record(exact[chosen], best)
        return Proposal(masks[chosen], bound=min(best, exact[chosen]), statistics={"masks": float(values.size)})


def enumerate_masks(problem: SelectionProblem) -> tuple[npt.NDArray[np.int64], Array]:
    """All masks with `n_prune` removed, and their values under the problem's objective.

    Returns
    -------
    codes : numpy int64 (masks,)
        Bit n − 1 − i is set where weight i is removed, so that the lexicographically first mask has the
        largest code.
    values : numpy float64 (masks,)
        −inf where the joint objective is unbounded below.
    """
    n, n_prune = problem.n, problem.n_prune
    arrays = problem.arrays()
    count = math.comb(n, n_prune)
    codes = np.zeros(count, dtype=np.int64)
    values = np.zeros(count)
    if problem.objective is Objective.SELECTION:
        columns = _reduced(np.vstack([arrays.factor, np.diag(np.sqrt(arrays.damping))]) * arrays.weights)
        _walk_selection(np.ascontiguousarray(columns.T), arrays.gradient * arrays.weights, n_prune, codes, values)
        return codes, values
    square = complete_square(arrays)
    if square is None:
        for index, removed in enumerate(combinations(range(n), n_prune)):
            mask = np.zeros(n, dtype=bool)
            mask[list(removed)] = True
            codes[index] = sum(1 << (n - 1 - i) for i in removed)
            values[index] = problem.joint_value(mask)
        return codes, values
    extended = np.column_stack([square.root, square.target])
    extended = _reduced(extended)
    _walk_joint(np.ascontiguousarray(extended.T), n - n_prune, codes, values)
    codes[:] = ((1 << n) - 1) ^ codes
    return codes, values + square.constant


def _reduced(columns: Array) -> Array:
    """The triangular factor: the same inner products with no more rows than columns."""
    rows, n = columns.shape
    return np.asarray(np.linalg.qr(columns, mode="r")) if rows > n else columns


def _decode(code: int, n: int) -> Mask:
    return np.array([bool(code >> (n - 1 - i) & 1) for i in range(n)])


@numba.njit(cache=True)
def _walk_selection(columns, linear, size, codes, values):  # type: ignore[no-untyped-def]
    """Fill codes and values; `columns` is (n, rows), one row per weight."""
    n, rows = columns.shape
    sums = np.zeros((size + 1, rows))
    partial = np.zeros(size + 1)
    chosen = np.zeros(size, dtype=np.int64)
    at, depth, item = 0, 0, 0
    while depth >= 0:
        if item <= n - (size - depth):
            for row in range(rows):
                sums[depth + 1, row] = sums[depth, row] + columns[item, row]
            partial[depth + 1] = partial[depth] + linear[item]
            chosen[depth] = item
            if depth == size - 1:
                total = 0.0
                for row in range(rows):
                    total += sums[size, row] * sums[size, row]
                code = 0
                for position in range(size):
                    code |= 1 << (n - 1 - chosen[position])
                codes[at] = code
                values[at] = 0.5 * total - partial[size]
                at += 1
                item += 1
            else:
                depth += 1
                item += 1
        else:
            depth -= 1
            if depth >= 0:
                item = chosen[depth] + 1


@numba.njit(cache=True)
def _walk_joint(columns, size, codes, values):  # type: ignore[no-untyped-def]
    """As above for kept sets; the last row of `columns` (n + 1, rows) is the target. Values without the constant."""
    n, rows = columns.shape[0] - 1, columns.shape[1]
    stack = np.zeros((size + 1, n + 1, rows))
    stack[0] = columns
    original = np.zeros(n)
    for item in range(n):
        original[item] = np.sum(columns[item] ** 2)
    chosen = np.zeros(size, dtype=np.int64)
    at, depth, item = 0, 0, 0
    while depth >= 0:
        if item <= n - (size - depth):
            chosen[depth] = item
            last = depth == size - 1
            norm = 0.0
            for row in range(rows):
                norm += stack[depth, item, row] ** 2
            first = n if last else item + 1
            for other in range(first, n + 1):
                for row in range(rows):
                    stack[depth + 1, other, row] = stack[depth, other, row]
                if norm > 1e-26 * original[item] and norm > 0.0:
                    inner = 0.0
                    for row in range(rows):
                        inner += stack[depth, item, row] * stack[depth, other, row]
                    for row in range(rows):
                        stack[depth + 1, other, row] -= inner / norm * stack[depth, item, row]
            if last:
                total = 0.0
                for row in range(rows):
                    total += stack[size, n, row] ** 2
                code = 0
                for position in range(size):
                    code |= 1 << (n - 1 - chosen[position])
                codes[at] = code
                values[at] = 0.5 * total
                at += 1
            else:
                depth += 1
            item += 1
        else:
            depth -= 1
            if depth >= 0:
                item = chosen[depth] + 1
