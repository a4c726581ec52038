"""The format of QPLIB: a line for each number, comments after ``#``, defaults and what differs from them.

Source: Furini et al., *QPLIB: a library of quadratic programming instances*, Mathematical Programming Computation 2019,
online supplement B. Variables are x1 … xn, then u1 … un. The objective is ½ yᵀLy + cᵀy with a matrix L that *is* lower
triangular, as the library's own instances and their solutions have it: L_ij = 2 Q_ij below the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from solvers.formats.miqp import Program

_INFINITY = 1e20


def qplib_lines(program: Program) -> Iterator[str]:
    """The file, line by line."""
    mixed = program.first > 0
    n, m, rows = len(program.names), len(program.rows), program.rows
    # Many readers know comments after a value only.
    yield f"{program.name} # {'; '.join(program.comments)}"
    yield f"{'CML' if mixed else 'CBL'} # convex objective, {'mixed binary' if mixed else 'binary'}, linear constraints"
    yield "minimize"
    yield f"{n} # variables"
    yield f"{m} # constraints"
    terms = program.terms
    yield f"{len(terms)} # nonzeros of the lower triangular matrix L of 1/2 y'Ly"
    yield from (f"{i + 1} {j + 1} {(value if i == j else 2.0 * value)!r}" for i, j, value in terms)
    linear = [0.0] * program.first + program.linear.tolist()
    yield from _vector(linear, 0.0, "c")
    yield "0.0 # constant"
    yield f"{sum(len(row.terms) for row in rows)} # nonzeros of the constraints"
    for number, row in enumerate(rows, 1):
        yield from (f"{number} {at + 1} {value!r}" for at, value in row.terms)
    yield f"{_INFINITY!r} # infinity"
    yield from _vector([-_INFINITY if row.sense == "<=" else row.right for row in rows], -_INFINITY, "left-hand side")
    yield from _vector([_INFINITY if row.sense == ">=" else row.right for row in rows], _INFINITY, "right-hand side")
    if mixed:
        binary = range(program.n)
        yield from _given([(at, 0.0) for at in binary], -_INFINITY, "lower bound")
        yield from _given([(at, 1.0) for at in binary], _INFINITY, "upper bound")
        yield from _given([(at, 1) for at in binary], 0, "type, 0 continuous, 1 integer")
    for what in ("initial x", "initial dual of constraints", "initial dual of bounds"):
        yield from _given((), 0.0, what)
    yield "0 # names of variables other than the default"
    yield "0 # names of constraints other than the default"


def _vector(values: Sequence[float], default: float, what: str) -> Iterator[str]:
    return _given([(at, value) for at, value in enumerate(values) if value != default], default, what)


def _given(entries: Iterable[tuple[int, float]], default: float, what: str) -> Iterator[str]:
    found = list(entries)
    yield f"{default!r} # default {what}"
    yield f"{len(found)} # that differ"
    yield from (f"{at + 1} {value!r}" for at, value in found)
