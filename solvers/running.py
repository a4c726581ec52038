"""Running one backend: refuse what it does not declare, translate what it throws."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from solvers.budget import Partitioned
from solvers.errors import BackendError, CapabilityError, CBSError, ProblemError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.separate import parts_for
from solvers.solution import Proposal
from solvers.solver import Capability, Context, Deadline, Need, Solver

#: Objectives below lose digits to underflow.
_LEAST_SCALE = 1e-250


def run_backend(solver: Solver, problem: SelectionProblem, context: Context) -> Proposal:
    """Run a backend, translating whatever it throws into a BackendError; trivial budgets never reach it."""
    only = problem.budget.only_mask(problem.n)
    if only is not None:
        return Proposal(only)
    try:
        return solver.run(problem, context)
    except CBSError:
        raise
    except MemoryError as error:
        raise BackendError(f"solver {solver.spec!r} ran out of memory on {problem!r}") from error
    except Exception as error:
        raise BackendError(f"solver {solver.spec!r} failed on {problem!r}: {type(error).__name__}: {error}") from error


def check_capabilities(solver: Solver, problem: SelectionProblem, time_limit: float | None, start: Mask | None) -> None:
    """Raise CapabilityError, with the remedy, for what the solver does not declare to support.

    A problem that falls apart (`solvers.separate`) is supported if its parts are.
    """
    parts = parts_for(solver, problem)
    if parts != [problem]:
        for part in parts:
            check_capabilities(solver, part, time_limit, start)
        return
    can, name = solver.capabilities, solver.name
    wanted = Capability(problem.objective.value)
    if wanted not in can:
        other = Objective.JOINT if wanted is Capability.SELECTION else Objective.SELECTION
        raise CapabilityError(
            f"solver {name!r} does not optimise the {wanted.value} objective; choose another solver or a problem "
            f"with objective={other.value!r}"
        )
    _check_kinds(solver, problem)
    if len(problem.blocks) > 1 and Capability.GLOBAL_BUDGET not in can:
        raise CapabilityError(
            f"solver {name!r} cannot share one budget over {len(problem.blocks)} blocks; pass allocation='uniform' "
            "(or another of solvers.allocation.ALLOCATIONS) to give each block its own"
        )
    if problem.has_gradient and Capability.LINEAR_TERM not in can:
        raise CapabilityError(
            f"solver {name!r} ignores the gradient of the problem; use problem.without_gradient() or another solver"
        )
    if solver.max_weights is not None and problem.n > solver.max_weights:
        raise CapabilityError(
            f"solver {name!r} takes at most {solver.max_weights} weights, the problem has {problem.n}; "
            "use smaller blocks or a heuristic"
        )
    if time_limit is not None and Capability.TIME_LIMIT not in can:
        raise CapabilityError(f"solver {name!r} does not keep a time limit; leave time_limit out")
    if start is not None and Capability.WARM_START not in can:
        raise CapabilityError(f"solver {name!r} cannot start from a given mask; leave start out")


def _check_kinds(solver: Solver, problem: SelectionProblem) -> None:
    """Raise CapabilityError for a kind of curvature or budget that the solver does not take, or one that is missing."""
    for block in problem.blocks:
        curvature = block.curvature
        if curvature.measured and not isinstance(curvature, solver.curvatures):
            takes = ", ".join(kind.__name__ for kind in solver.curvatures)
            raise CapabilityError(
                f"solver {solver.name!r} does not run on the {type(curvature).__name__} curvature of block "
                f"{block.name!r}; it takes {takes}. solvers.describe(name) says what each solver takes"
            )
        if not curvature.measured and Need.CURVATURE in solver.needs:
            raise CapabilityError(
                f"solver {solver.name!r} needs a curvature, and none was measured for block {block.name!r}; measure "
                "one, or use a rule that looks at the weights alone (magnitude, random)"
            )
    if not isinstance(problem.budget, solver.budgets):
        takes = ", ".join(kind.__name__ for kind in solver.budgets)
        why = "; its groups cut blocks, or rows of layers, so they cannot be solved one by one" * isinstance(
            problem.budget, Partitioned
        )
        raise CapabilityError(
            f"solver {solver.name!r} does not keep a {type(problem.budget).__name__} budget; it takes {takes}{why}"
        )


def check_range(problem: SelectionProblem) -> None:
    """Raise ProblemError where float64 cannot hold the terms ½ H_ii w_i² of the objective."""
    if not problem.measured:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        scale = problem.scale
    lost = scale < _LEAST_SCALE and bool((problem.diagonal * np.abs(problem.weights) > 0.0).any())
    if lost or not math.isfinite(scale):
        raise ProblemError(
            f"½ Σ H_ii w_i² + Σ |g_i w_i| is {scale!r}, beyond what float64 resolves; give weights, factor and damping "
            "in other units"
        )


def with_remaining_time(context: Context) -> Context:
    """A context for a nested run: the same seed and callback, what is left of the time, an empty trace."""
    limit = context.deadline.remaining()
    return replace(context, deadline=Deadline(None if math.isinf(limit) else limit), trace=[])
