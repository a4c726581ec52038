"""Certified lower bounds for problems nobody can solve exactly: `bound(problem, method=...)`.

* ``frank_wolfe``: convex relaxation of any size, matrix-free (joint objective: perspective relaxation).
* ``diagonal``: joint objective, the best perspective relaxation, of whole layers whose rows share their inputs too.
* ``qcr``: semidefinite bound for up to about a thousand weights; the tightest.
* ``lagrangian``: one semidefinite bound per block, coupled by the multiplier of the common budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from solvers.arguments import instance, number, one_of
from solvers.bounds.certificate import Bound, Certificate
from solvers.bounds.diagonal import diagonal_bound, largest_inputs
from solvers.bounds.frank_wolfe import frank_wolfe_bound
from solvers.bounds.lagrangian import lagrangian_bound
from solvers.bounds.perspective import perspective_bound
from solvers.bounds.qcr import qcr_bound
from solvers.errors import CapabilityError, ProblemError
from solvers.plain import plainly
from solvers.problem import Objective, SelectionProblem
from solvers.running import check_range

_SELECTION: dict[str, Callable[..., Bound]] = {
    "frank_wolfe": frank_wolfe_bound,
    "qcr": qcr_bound,
    "lagrangian": lagrangian_bound,
}
_JOINT: dict[str, Callable[..., Bound]] = {"frank_wolfe": perspective_bound, "diagonal": diagonal_bound}
METHODS = ("auto", "frank_wolfe", "diagonal", "qcr", "lagrangian")
_AUTO_QCR = 400
_AUTO_BLOCK = 300
_AUTO_DIAGONAL = 1600

__all__ = ["METHODS", "Bound", "Certificate", "bound"]


class MaskCertificate(Certificate):
    """For n_prune = 0 or n, where one mask alone is feasible."""

    def value(self, problem: SelectionProblem) -> float:
        """The objective of that mask, less a rounding margin."""
        value = problem.value(np.full(problem.n, problem.n_prune > 0))
        return value - 1e-13 * (problem.scale + abs(value)) if problem.n_prune else value


@plainly
def bound(
    problem: SelectionProblem,
    method: str = "auto",
    *,
    tolerance: float | None = None,
    time_limit: float | None = None,
) -> Bound:
    """A proven lower bound on the optimal objective, with its certificate.

    Parameters
    ----------
    problem : SelectionProblem
    method : {"auto", "frank_wolfe", "diagonal", "qcr", "lagrangian"}
        ``auto`` takes qcr up to 400 weights, lagrangian for several small blocks, frank_wolfe otherwise; for the joint
        objective diagonal where no matrix is larger than 1,600, else frank_wolfe.
    tolerance : float, optional
        How near the method's own optimum to stop, relative; each method has its default.
    time_limit : float, optional
        Seconds of wall time; the bound is valid whenever it ends.

    Returns
    -------
    Bound
        ``bound.verify(problem)`` recomputes it from its certificate.

    Raises
    ------
    UnknownNameError
        For a method that does not exist.
    CapabilityError
        If the method does not take this problem.
    OptionError
        For a tolerance or time limit that is not positive.
    """
    instance("problem", problem, SelectionProblem, error=ProblemError)
    one_of("bound method", method, METHODS)
    check_range(problem)
    limits = {"tolerance": tolerance, "time_limit": time_limit}
    limits = {name: number(name, value, positive=True) for name, value in limits.items() if value is not None}
    if problem.n_prune in (0, problem.n):
        certificate = MaskCertificate()
        return Bound(certificate.value(problem), method, 0.0, 0, certificate)
    joint = problem.objective is Objective.JOINT
    if method == "auto":
        largest = max(block.n for block in problem.blocks)
        if joint:
            method = "diagonal" if largest_inputs(problem) <= _AUTO_DIAGONAL else "frank_wolfe"
        elif problem.n <= _AUTO_QCR:
            method = "qcr"
        else:
            method = "lagrangian" if len(problem.blocks) > 1 and largest <= _AUTO_BLOCK else "frank_wolfe"
    methods = _JOINT if joint else _SELECTION
    if method not in methods:
        own, other = ("joint", "selection") if joint else ("selection", "joint")
        raise CapabilityError(
            f"method={method!r} bounds the {other} objective only; for the {own} one use method="
            f"{' or '.join(map(repr, methods))}{', or the bound of the solver branch_bound' if joint else ''}"
        )
    return methods[method](problem, **limits)
