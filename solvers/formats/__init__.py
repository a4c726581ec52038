"""Problems as files that MIQP solvers read: what they mean is written once, in `miqp.py`, then one file per format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from solvers.arguments import instance
from solvers.errors import OutputError, ProblemError, UnknownNameError
from solvers.files import write_atomically
from solvers.formats.lp import lp_lines
from solvers.formats.miqp import Program, program_of
from solvers.formats.mps import mps_lines
from solvers.formats.qplib import qplib_lines
from solvers.plain import plainly
from solvers.problem import SelectionProblem

#: By the suffix of the file.
FORMATS: dict[str, Callable[[Program], Iterator[str]]] = {
    "lp": lp_lines,
    "mps": mps_lines,
    "qplib": qplib_lines,
}


@plainly
def export_problem(problem: SelectionProblem, path: str | Path, *, scale: float = 1.0) -> None:
    """Write a problem as an LP, MPS or QPLIB file, whichever the suffix of the path says.

    Its variables x1 … xn are 1 where a weight is removed; those of a joint problem go on with u1 … un, how much is
    taken away of each weight. See `solvers.formats.miqp` for the programs and why they are exact.

    Parameters
    ----------
    problem : SelectionProblem
        With a number of weights to remove.
    path : str or Path
        ``….lp``, ``….mps`` or ``….qplib``.
    scale : float
        Factor of the objective, for solvers whose tolerances are absolute: a power of two that brings the value sought
        to between 1 and 1,000 or so.

    Raises
    ------
    UnknownNameError
        For another suffix.
    CapabilityError, SingularHessianError
        If no such program can be made of it, see `solvers.formats.miqp.program_of`.
    OutputError
        If the file cannot be written.
    """
    instance("problem", problem, SelectionProblem, error=ProblemError)
    target = Path(path)
    format_name = target.suffix.removeprefix(".")
    if format_name not in FORMATS:
        raise UnknownNameError.of("format", format_name, FORMATS, "The suffix of the path says which is meant.")
    program = program_of(problem, re.sub(r"[^\w.-]", "_", target.stem), scale)
    text = "".join(f"{line}\n" for line in FORMATS[format_name](program))
    try:
        write_atomically(target, text.encode())
    except OSError as error:
        raise OutputError(f"cannot write {target} ({error.strerror or error})") from error
