"""How a solver gets to work under a budget it does not take itself, or which solvers do.

A selection among groups that go whole is one among the weights of a smaller problem (`solvers.aggregate`), which any
solver of the selection objective takes. Rules that look once (`magnitude`, `obd`) choose so under the joint objective,
too; what optimises the joint objective itself must know groups.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from solvers.aggregate import Aggregate, aggregate
from solvers.errors import CapabilityError, CBSError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.registry import available_solvers, solver_class
from solvers.running import run_backend
from solvers.solution import Proposal
from solvers.solver import PROVING, Capability, Context, Solver


def over_groups(solver: Solver, problem: SelectionProblem) -> Aggregate:
    """The problem over groups that `solver` gets; raises CapabilityError, with solvers that do, if it cannot."""
    if not _chooses(solver, problem):
        raise _refusal(solver, problem)
    return aggregate(problem)


def run_over_groups(solver: Solver, whole: Aggregate, problem: SelectionProblem, context: Context) -> Proposal:
    """The proposal of `solver` for the groups, as one for the weights."""
    start, judge = context.start, context.calibration_loss

    def calibration_loss(gone: Mask) -> float:
        assert judge is not None
        return judge(whole.widen(gone))

    inner = replace(
        context,
        start=None if start is None else whole.narrow(start),
        calibration_loss=None if judge is None else calibration_loss,
    )
    found = run_backend(solver, whole.problem, inner)
    proven = problem.objective is Objective.SELECTION and math.isfinite(found.bound)
    note = ("groups: chosen by what each costs alone, the kept weights as they are",)
    return replace(
        found,
        pruned=whole.widen(np.asarray(found.pruned)),
        bound=found.bound - whole.rounding if proven else -math.inf,
        repairs=found.repairs if problem.objective is Objective.SELECTION else (*found.repairs, *note),
        weights=None,
    )


def _chooses(solver: Solver | type[Solver], problem: SelectionProblem) -> bool:
    """Whether a solver may choose among groups through the selection objective."""
    can = solver.capabilities
    if problem.objective is Objective.SELECTION:
        return Capability.SELECTION in can
    return {Capability.SELECTION, Capability.JOINT} <= can and not can & (PROVING | {Capability.WARM_START})


def _refusal(solver: Solver, problem: SelectionProblem) -> CapabilityError:
    kind, names = type(problem.budget), []
    for name in available_solvers():
        with contextlib.suppress(CBSError, ImportError):
            cls = solver_class(name)
            if Capability(problem.objective.value) in cls.capabilities and (
                issubclass(kind, cls.budgets) or _chooses(cls, problem)
            ):
                names.append(name)
    return CapabilityError(
        f"solver {solver.name!r} does not keep a {kind.__name__} budget under the {problem.objective.value} objective; "
        f"these do: {', '.join(names)}"
    )
