"""A problem as a mixed-integer quadratic program, for solvers that read files.

With x_i = 1 where weight i is removed, s_i = w_i (1 where w_i = 0), Q_ij = s_i H_ij s_j and c = −s∘g:

* selection   min ½ xᵀQx + cᵀx                 Σ x = n_prune,  x binary
* joint       min ½ uᵀQu + cᵀu                 Σ x = n_prune,  x binary,  u free,  u_i = t_i where x_i = 1

u says how much is taken away of each weight, v = w − s∘u; t_i = w_i / s_i is 1, or 0 where the weight is 0. So the
joint program is the selection one with u in the place of x, tied to it by t_i only where weights are removed. Neither
has a constant: nothing cancels.

Files without indicators need big-M. These are exact, for every mask: the best v of a mask costs no more than v = 0,
which every mask allows, so with d = v − w, d₀ = −H⁻¹g and ρ² = (w + d₀)ᵀ H (w + d₀)

    (d − d₀)ᵀ H (d − d₀) ≤ ρ²,   hence   |d_i − d₀_i| ≤ ρ √[H⁻¹]_ii,

which bounds u_i by some lo_i, hi_i; then  u_i ≤ hi_i + (t_i − hi_i) x_i  and  u_i ≥ lo_i + (t_i − lo_i) x_i. They keep
the optimum of every mask, not only the best one, and are loose where H is nearly singular; a solver that has
indicators, or a perspective, does better with those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
import torch

from solvers.arguments import number
from solvers.arrays import Array
from solvers.budget import Cardinality
from solvers.errors import CapabilityError
from solvers.linalg import strict_cholesky
from solvers.problem import Objective, SelectionProblem

#: Relative widening of the bounds, for what rounding did to them.
_SAFETY = 1e-6


@dataclass(frozen=True)
class Row:
    """A linear constraint: Σ coefficient · variable, "=", "<=" or ">=", right-hand side."""

    name: str
    terms: tuple[tuple[int, float], ...]
    sense: str
    right: float


@dataclass(frozen=True, eq=False)
class Program:
    """min ½ yᵀQy + cᵀy over y = x (selection) or y = (x, u) (joint), x binary, u free, under rows.

    Attributes
    ----------
    name
    n
        Number of x.
    names
        Of the variables, x1 … xn and u1 … un.
    quadratic : (n, n)
        Q of the last n variables, symmetric; the others are not in the objective.
    linear : (n,)
        c of them.
    rows
    comments
        What the file is, in lines of words.
    """

    name: str
    n: int
    names: tuple[str, ...]
    quadratic: Array
    linear: Array
    rows: tuple[Row, ...]
    comments: tuple[str, ...]

    @property
    def first(self) -> int:
        """Place of the first variable of the objective."""
        return len(self.names) - self.n

    @property
    def terms(self) -> list[tuple[int, int, float]]:
        """(i, j, Q_ij) for j ≤ i, places among all variables, without zeros."""
        rows, columns = np.nonzero(np.tril(self.quadratic))
        values = self.quadratic[rows, columns]
        first = self.first
        return [(first + int(i), first + int(j), float(q)) for i, j, q in zip(rows, columns, values, strict=True)]


def program_of(problem: SelectionProblem, name: str, scale: float = 1.0) -> Program:
    """The program of a problem, its objective multiplied by `scale`.

    Raises
    ------
    CapabilityError
        For a budget other than a number of weights.
    SingularHessianError
        For a joint problem whose H has no inverse: u has no bounds then.
    """
    scale = number("scale", scale, positive=True)
    if not isinstance(problem.budget, Cardinality):
        raise CapabilityError(
            "files are written of problems with a number of weights to remove, not of a "
            f"{type(problem.budget).__name__} budget"
        )
    n, joint = problem.n, problem.objective is Objective.JOINT
    arrays = problem.arrays()
    step = np.where(arrays.weights == 0.0, 1.0, arrays.weights)
    scaled = arrays.factor * step
    quadratic = scaled.T @ scaled
    quadratic = 0.5 * (quadratic + quadratic.T)
    quadratic[np.diag_indices(n)] += arrays.damping * step**2
    linear = -step * arrays.gradient
    taken = (arrays.weights != 0.0).astype(np.float64)
    if not joint:
        # A zero weight costs nothing to remove.
        quadratic, linear = quadratic * np.outer(taken, taken), linear * taken
    rows = [Row("count", tuple((i, 1.0) for i in range(n)), "=", float(problem.n_prune))]
    names = [f"x{i + 1}" for i in range(n)]
    if joint:
        names += [f"u{i + 1}" for i in range(n)]
        low, high, removed = *_limits(quadratic, linear, taken, name), taken.tolist()
        for i in range(n):
            rows.append(Row(f"high{i + 1}", ((n + i, 1.0), (i, high[i] - removed[i])), "<=", high[i]))
            rows.append(Row(f"low{i + 1}", ((n + i, 1.0), (i, low[i] - removed[i])), ">=", low[i]))
    return Program(
        name, n, tuple(names), scale * quadratic, scale * linear, tuple(rows), _comments(problem, name, joint, scale)
    )


def _limits(quadratic: Array, linear: Array, taken: Array, name: str) -> tuple[list[float], list[float]]:
    """lo and hi of u, in which the best u of every mask lies."""
    lower = strict_cholesky(torch.from_numpy(quadratic), f"{name}: H, whose inverse bounds the kept weights,").numpy()
    inverse = scipy.linalg.cho_solve((lower, True), np.eye(len(linear)))
    centre = -inverse @ linear
    away = taken - centre
    reach = np.sqrt(max(0.0, float(away @ quadratic @ away)) * np.diag(inverse)) * (1.0 + _SAFETY)
    # Either value of x must leave the other's u alone.
    return np.minimum(centre - reach, taken).tolist(), np.maximum(centre + reach, taken).tolist()


def _comments(problem: SelectionProblem, name: str, joint: bool, scale: float) -> tuple[str, ...]:
    lines = [
        f"{name}: prune {problem.n_prune} of {problem.n} weights, {problem.objective.value} objective",
        "x_i = 1 removes weight i; the value is that of cbs-opt" + ("" if scale == 1.0 else f" times {scale!r}"),
    ]
    if joint:
        lines.append("u_i: how much is taken away of weight i, v_i = w_i (1 - u_i); 1 where it is removed")
        lines.append("the bounds on u (rows high and low) hold at the best u of every x, so they cut off no optimum")
    return tuple(lines)
