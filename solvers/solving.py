"""`solve`: the one way to run a backend."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from solvers.allocation import allocated
from solvers.arguments import instance, seconds, seed_of
from solvers.baselines.obd import diagonal_saliency
from solvers.budget import Bounded
from solvers.composites.nested import merged, run_parts
from solvers.errors import OptionError, ProblemError
from solvers.plain import plainly
from solvers.problem import Mask, SelectionProblem
from solvers.registry import make_solver
from solvers.routes import route
from solvers.running import check_capabilities, check_range, run_backend
from solvers.separate import parts_for
from solvers.solution import Proposal, Solution
from solvers.solver import CalibrationLoss, Context, Deadline, Need, Solver
from solvers.verify import check_support, evaluate, verified


@plainly
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
    as_is: bool = False,
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
        Also judge a selection problem's mask by the joint objective. Without it, the objective of a joint problem whose
        solver proposes weights of its own (`sweep`) is that of those weights.
    as_is : bool
        Solve no system to judge the mask of a joint problem: its objective is that of the solver's own weights, or,
        where it has none, of the kept weights as they are. Both lie above that of the refit, which is not made.

    Returns
    -------
    Solution
        Its objective is nan where no curvature was measured.

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
    instance("problem", problem, SelectionProblem, error=ProblemError)
    limit, seed = seconds(time_limit), seed_of(seed)
    if as_is and with_refit:
        raise OptionError("as_is=True judges a mask without a refit; pass with_refit=False too")
    if calibration_loss is not None and not callable(calibration_loss):
        raise OptionError(f"calibration_loss must be a function of a mask, not {calibration_loss!r}")
    check_range(problem)
    if start is not None:
        start = problem.check_mask(start)
    given = _relaxed(chosen, problem, allocation)
    given = given if allocation is None else allocated(given, allocation)
    context = Context(seed=seed, deadline=Deadline(limit), start=start, calibration_loss=calibration_loss)
    way = route(chosen, given, start)
    warm = way.start
    check_capabilities(
        chosen, way.problem, limit, None if warm is not None and way.problem.budget.violation(warm) else warm
    )
    only = problem.budget.only_mask(problem.n)
    if only is not None:
        value, _ = evaluate(problem, only, with_refit=False)
        proposal = Proposal(only, bound=-math.inf if math.isnan(value) else value)
    else:
        proposal = way.back(_run(chosen, way.problem, way.context(context)))
        if allocation is not None:
            # What is proven for these shares is not proven for others.
            proposal = replace(proposal, bound=-math.inf)
        proposal = _repaired(chosen, problem, proposal)
    name = chosen.spec if allocation is None else f"{chosen.spec}@{allocation}"
    return verified(problem, proposal, context, name, with_refit, as_is)


def _relaxed(solver: Solver, problem: SelectionProblem, allocation: str | None) -> SelectionProblem:
    """The problem without floors and ceilings, where the solver or an allocation cannot keep them.

    Its masks include those of the problem, so a bound proven for it holds; `_repaired` sees to what its mask lacks.
    """
    budget = problem.budget
    if not isinstance(budget, Bounded) or (allocation is None and isinstance(budget, solver.budgets)):
        return problem
    return problem.with_budget(budget.relaxed)


def _repaired(solver: Solver, problem: SelectionProblem, proposal: Proposal) -> Proposal:
    """The proposal with floors and ceilings kept, by swaps of the diagonal saliency, or |w| where no solver needs more.

    For rules that rank by one of the two this is what ranking under the floors gives.
    """
    budget = problem.budget
    if not isinstance(budget, Bounded):
        return proposal
    pruned = check_support(problem.with_budget(budget.relaxed), proposal, solver.spec)
    if not budget.violation(pruned):
        return proposal
    looks = problem.measured and Need.CURVATURE in solver.needs
    mask = budget.repaired(pruned, diagonal_saliency(problem) if looks else np.abs(problem.weights))
    back = int(np.count_nonzero(pruned & ~mask))
    gained = int(np.count_nonzero(budget.kept(mask) > budget.kept(pruned)))
    note = f"floors: {back} weights of {gained} groups were put back, and as many of others removed"
    return replace(proposal, pruned=mask, weights=None, repairs=(*proposal.repairs, note))


def _run(solver: Solver, problem: SelectionProblem, context: Context) -> Proposal:
    """Run a backend on the problem, or on the parts it falls into; a start plays no part where it does not fit one."""
    parts = parts_for(solver, problem)
    if parts == [problem]:
        return run_backend(solver, problem, context)
    ends = np.cumsum([part.n for part in parts])[:-1]
    starts = [None] * len(parts) if context.start is None else np.split(context.start, ends)
    jobs = [
        (part, context.seed + index, None if start is None or part.budget.violation(start) else start)
        for index, (part, start) in enumerate(zip(parts, starts, strict=True))
    ]
    proposals = run_parts(solver, jobs, context)
    weights = None
    if any(proposal.weights is not None for proposal in proposals):
        # A part of which nothing or all goes never reaches the solver.
        weights = np.concatenate(
            [
                np.where(proposal.pruned, 0.0, part.weights) if proposal.weights is None else proposal.weights
                for part, proposal in zip(parts, proposals, strict=True)
            ]
        )
    found = np.concatenate([proposal.pruned for proposal in proposals])
    merge = merged(found, proposals, context, bound=sum(proposal.bound for proposal in proposals))
    return replace(merge, weights=weights)
