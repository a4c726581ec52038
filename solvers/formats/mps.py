"""The free MPS format with the section QUADOBJ, as CPLEX, Gurobi, SCIP, Xpress and HiGHS read it.

QUADOBJ has each term off the diagonal once; the objective is ½ yᵀQy + cᵀy with the whole symmetric Q.
"""

from __future__ import annotations

from collections.abc import Iterator

from solvers.formats.miqp import Program

_SENSES = {"=": "E", "<=": "L", ">=": "G"}


def mps_lines(program: Program) -> Iterator[str]:
    """The file, line by line."""
    names, rows = program.names, program.rows
    yield from (f"* {comment}" for comment in program.comments)
    yield f"NAME {program.name}"
    yield from ("ROWS", " N cost")
    yield from (f" {_SENSES[row.sense]} {row.name}" for row in rows)
    columns: list[list[tuple[str, float]]] = [[] for _ in names]
    for at, value in enumerate(program.linear.tolist(), program.first):
        columns[at].append(("cost", value))
    for row in rows:
        for at, value in row.terms:
            columns[at].append((row.name, value))
    yield from ("COLUMNS", " MARKER 'MARKER' 'INTORG'")
    yield from _entries(names[: program.n], columns[: program.n])
    yield " MARKER 'MARKER' 'INTEND'"
    yield from _entries(names[program.n :], columns[program.n :])
    yield "RHS"
    yield from (f" RHS {row.name} {row.right!r}" for row in rows if row.right != 0.0)
    yield "BOUNDS"
    yield from (f" UP BOUND {name} 1" for name in names[: program.n])
    yield from (f" FR BOUND {name}" for name in names[program.n :])
    yield "QUADOBJ"
    yield from (f" {names[j]} {names[i]} {value!r}" for i, j, value in program.terms)
    yield "ENDATA"


def _entries(names: tuple[str, ...], columns: list[list[tuple[str, float]]]) -> Iterator[str]:
    for name, entries in zip(names, columns, strict=True):
        kept = [(row, value) for row, value in entries if value != 0.0]
        yield from (f" {name} {row} {value!r}" for row, value in kept)
