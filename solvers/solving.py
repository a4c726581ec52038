"""`solve`: the one way to run a backend."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from solvers.errors import BackendError, CapabilityError, CBSError, OptionError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.registry import make_solver
from solvers.solution import Proposal, Solution
from solvers.solver import CalibrationLoss, Capability, Context, Deadline, Solver
from solvers.verify import certify, check_support, evaluate


def solve(
    problem: SelectionProblem,
    solver: str | Solver = "greedy_ls",
    *,
    time_limit: float | None = None,
    seed: int = 0,
    start: Mask | None = None,
    calibration_loss: CalibrationLoss | None = None,
    allocation: str | None = None,
    with_refit: bool = True,
) -> Solution:
    """Choose the weights to remove, and verify the result.

    Parameters
    ----------
    problem : SelectionProblem
    solver : str or Solver
        ``"greedy_ls"``, ``"greedy_ls[window=20,min_gain=1e-5]"``, or an instance.
    time_limit : float, optional
        Seconds of wall time; only for solvers that declare they keep one.
    seed : int
        Randomised solvers return the same mask for the same seed.
    start : numpy bool (n,), optional
        A feasible mask to start from; only for solvers that declare a warm start.
    calibration_loss : callable, optional
        Mask → loss of the network on training data. Used by solvers that pick among several masks and
        ignored by the others.
    allocation : str, optional
        How to split the budget over the blocks for a solver that cannot share one: see
        `solvers.allocation.ALLOCATIONS`. With it, any solver is run block by block.
    with_refit : bool
        Also judge a selection problem's mask by the joint objective.

    Returns
    -------
    Solution

    Raises
    ------
    UnknownNameError, OptionError
        For the solver's name or options.
    CapabilityError
        If the solver does not support the problem; the message says which solvers do or what to pass.
    ProblemError
        If `start` does not fit.
    BackendError
        If the backend crashed or returned something that is not true.
    """
    chosen = make_solver(solver)
    if time_limit is not None and not (time_limit > 0 and math.isfinite(time_limit)):
        raise OptionError(f"time_limit must be positive and finite seconds, not {time_limit!r}; None means no limit")
    if start is not None:
        start = problem.check_mask(start)
    if allocation is None:
        check_capabilities(chosen, problem, time_limit, start)
    context = Context(seed=seed, deadline=Deadline(time_limit), start=start, calibration_loss=calibration_loss)
    if problem.n_prune in (0, problem.n):
        only = np.full(problem.n, problem.n_prune > 0)
        value, _ = evaluate(problem, only, with_refit=False)
        proposal = Proposal(only, bound=value)
    elif allocation is not None:
        from solvers.allocation import solve_blockwise

        proposal = solve_blockwise(problem, chosen, context, allocation, time_limit)
    else:
        proposal = run_backend(chosen, problem, context)
    seconds = context.deadline.elapsed()
    name = chosen.spec if allocation is None else f"{chosen.spec}@{allocation}"
    pruned = check_support(problem, proposal, name)
    objective, refitted = evaluate(problem, pruned, with_refit)
    bound, gap, status = certify(problem, objective, proposal.bound, name)
    return Solution(
        pruned=pruned,
        objective=objective,
        bound=bound,
        gap=gap,
        status=status,
        reason=proposal.reason,
        refit_objective=math.nan if refitted is None else refitted.value,
        refit_weights=None if refitted is None else refitted.weights,
        seconds=seconds,
        solver=name,
        trace=tuple(context.trace),
        repairs=(*proposal.repairs, *(refitted.repairs if refitted else ())),
        statistics=dict(proposal.statistics),
    )


def run_backend(solver: Solver, problem: SelectionProblem, context: Context) -> Proposal:
    """Run a backend, translating whatever it throws into a BackendError; trivial budgets never reach it."""
    if problem.n_prune in (0, problem.n):
        return Proposal(np.full(problem.n, problem.n_prune > 0))
    try:
        return solver.run(problem, context)
    except CBSError:
        raise
    except MemoryError as error:
        raise BackendError(f"solver {solver.spec!r} ran out of memory on {problem!r}") from error
    except Exception as error:
        raise BackendError(f"solver {solver.spec!r} failed on {problem!r}: {type(error).__name__}: {error}") from error


def check_capabilities(solver: Solver, problem: SelectionProblem, time_limit: float | None, start: Mask | None) -> None:
    """Raise CapabilityError, with the remedy, for what the solver does not declare to support."""
    can, name = solver.capabilities, solver.name
    wanted = Capability(problem.objective.value)
    if wanted not in can:
        other = Objective.JOINT if wanted is Capability.SELECTION else Objective.SELECTION
        raise CapabilityError(
            f"solver {name!r} does not optimise the {wanted.value} objective; choose another solver or a problem "
            f"with objective={other.value!r}"
        )
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


def with_remaining_time(context: Context) -> Context:
    """A context for a nested run: the same seed and callback, what is left of the time, an empty trace."""
    limit = context.deadline.remaining()
    return replace(context, deadline=Deadline(None if math.isinf(limit) else limit), trace=[])
