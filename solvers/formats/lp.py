"""The LP format, as CPLEX, Gurobi, SCIP, Xpress and HiGHS read it: ``[ … ] / 2`` around the quadratic terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from solvers.formats.miqp import Program

#: Readers cut lines off beyond a few hundred characters.
_WIDTH = 200


def lp_lines(program: Program) -> Iterator[str]:
    """The file, line by line."""
    names = program.names
    yield from (f"\\ {comment}" for comment in program.comments)
    yield "Minimize"
    linear = zip(names[program.first :], program.linear.tolist(), strict=True)
    costs = [f"{_signed(c)} {name}" for name, c in linear if c != 0.0]
    squares = list(_squares(program))
    if squares:
        costs += ["+ [" if costs else "[", *squares, "] / 2"]
    yield from _wrapped((" cost:", *(costs or [f"0 {names[0]}"])))
    yield "Subject To"
    for row in program.rows:
        terms = (f"{_signed(value)} {names[at]}" for at, value in row.terms if value != 0.0)
        yield from _wrapped((f" {row.name}:", *terms, f"{row.sense} {row.right!r}"))
    if program.first:
        yield "Bounds"
        yield from (f" {name} free" for name in names[program.first :])
    yield "Binaries"
    yield from _wrapped(("", *names[: program.n]))
    yield "End"


def _squares(program: Program) -> Iterator[str]:
    """Terms of yᵀQy: both halves of what is off the diagonal together. SCIP wants ``^2`` in one piece."""
    for i, j, value in program.terms:
        if i == j:
            yield f"{_signed(value)} {program.names[i]} ^2"
        else:
            yield f"{_signed(2.0 * value)} {program.names[j]} * {program.names[i]}"


def _signed(value: float) -> str:
    return f"- {-value!r}" if value < 0.0 else f"+ {value!r}"


def _wrapped(words: Iterable[str]) -> Iterator[str]:
    """Words on as few lines as fit."""
    line = ""
    for word in words:
        if len(line) + len(word) > _WIDTH:
            yield line
            line = ""
        line += f"{' ' if line else ''}{word}" if line or word else " "
    yield line
