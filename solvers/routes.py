"""How a solver gets to work under a budget it does not take itself, or which solvers do.

A selection among groups that go whole is one among the weights of a smaller problem (`solvers.aggregate`), which any
solver of the selection objective takes. Rules that look once (`magnitude`, `obd`) choose so under the joint objective,
too; what optimises the joint objective itself must know groups. Costs are turned into counts of weights that cost the
same (`solvers.allocation.split`) for solvers that prove nothing; those that do must take costs themselves. Where the
objective is a sum over weights, the linear relaxation of a knapsack bounds whatever mask was found.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.aggregate import Aggregate, aggregate
from solvers.allocation import split
from solvers.baselines.obd import diagonal_saliency
from solvers.budget import Groups, Knapsack, Partitioned
from solvers.curvature import Diagonal
from solvers.errors import CapabilityError, CBSError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.registry import available_solvers, solver_class
from solvers.separate import parts_for
from solvers.solution import Proposal
from solvers.solver import PROVING, Capability, Context, Solver


@dataclass(frozen=True, eq=False)
class Route:
    """What a solver is given instead of a problem, and the way back.

    Attributes
    ----------
    given, problem : SelectionProblem
        What was to be solved, and what the solver gets: the same where it takes it.
    start : bool or None
        A mask to start from, of `problem`.
    groups : Aggregate, optional
    costed : SelectionProblem
        With the budget before it was turned into counts.
    notes : tuple of str
        What the way there decided.
    """

    given: SelectionProblem
    problem: SelectionProblem
    start: Mask | None
    groups: Aggregate | None
    costed: SelectionProblem
    notes: tuple[str, ...]

    def context(self, context: Context) -> Context:
        """For the solver: the start, and the loss as one of its masks."""
        judge, groups = context.calibration_loss, self.groups
        if judge is not None and groups is not None:
            whole = judge
            return replace(context, start=self.start, calibration_loss=lambda gone: whole(groups.widen(gone)))
        return replace(context, start=self.start)

    def back(self, found: Proposal) -> Proposal:
        """The proposal for what was given."""
        if self.problem is self.given and not isinstance(self.given.budget, Knapsack):
            return found
        pruned, bound = np.asarray(found.pruned), found.bound if self.problem is self.costed else -math.inf
        if _adds_up(self.costed) and not self.costed.budget.violation(pruned):
            assert isinstance(self.costed.budget, Knapsack)
            bound = max(bound, self.costed.budget.least_sum(diagonal_saliency(self.costed)))
        if self.groups is not None:
            pruned = self.groups.widen(pruned)
            bound = bound - self.groups.rounding if self.given.objective is Objective.SELECTION else -math.inf
        return replace(
            found,
            pruned=pruned,
            bound=bound,
            repairs=(*found.repairs, *self.notes),
            weights=None if self.groups is not None else found.weights,
        )


def route(solver: Solver, given: SelectionProblem, start: Mask | None) -> Route:
    """The way of `solver` to a problem; raises CapabilityError, naming solvers that have one, if there is none."""
    budget, groups, notes = given.budget, None, []
    costed = problem = given
    check_budget(solver, given)
    grouped = getattr(budget, "labels", None) is not None
    # Of more weights than a solver takes there may be few groups.
    many = solver.as_items or (solver.max_weights is not None and given.n > solver.max_weights)
    many = many and grouped and given.objective is Objective.SELECTION and _finds(solver, given)
    if many or not _takes(solver, given):
        if grouped:
            groups = aggregate(given)
            costed = problem = groups.problem
            start = None if start is None else groups.narrow(start)
            if given.objective is Objective.JOINT:
                notes.append("groups: chosen by the selection objective, the kept weights as they are")
        if isinstance(problem.budget, Knapsack) and not _takes(solver, problem):
            problem = split(problem, None, start)
            assert isinstance(problem.budget, Partitioned)
            notes.append(f"costs: turned into counts for {len(problem.budget.sizes)} ranges of weights that cost alike")
    return Route(given, problem, start, groups, costed, tuple(notes))


def check_budget(solver: Solver, problem: SelectionProblem) -> None:
    """Raise CapabilityError, naming solvers that do, if a solver neither takes the budget nor has a way to it."""
    if not _takes(solver, problem) and not _finds(solver, problem):
        raise _refusal(solver, problem)
    cut = isinstance(problem.budget, Partitioned) and not isinstance(problem.budget, solver.budgets)
    if cut and Capability(problem.objective.value) in solver.capabilities and parts_for(solver, problem) == [problem]:
        raise _refusal(solver, problem, " (its groups cut blocks, or rows of layers: they cannot be solved one by one)")


def _takes(solver: Solver | type[Solver], problem: SelectionProblem) -> bool:
    """Whether a solver takes a budget itself, or is left to `solvers.running` to refuse it."""
    budget = problem.budget
    if not isinstance(budget, (Groups, Knapsack)):
        return True
    whole = getattr(budget, "labels", None) is None or any(issubclass(Groups, kind) for kind in solver.budgets)
    return whole and isinstance(budget, solver.budgets) and problem.n <= solver.most_items.get(type(budget), problem.n)


def _finds(solver: Solver | type[Solver], problem: SelectionProblem) -> bool:
    """Whether a solver may choose by way of another problem."""
    can, budget = solver.capabilities, problem.budget
    if Capability(problem.objective.value) not in can:
        return False
    scored = any(issubclass(Knapsack, kind) for kind in solver.budgets)
    if isinstance(budget, Knapsack) and not scored and Capability.EXACT in can:
        return False
    if getattr(budget, "labels", None) is None:
        return any(issubclass(Partitioned, kind) for kind in solver.budgets)
    if problem.objective is Objective.SELECTION:
        return True
    return Capability.SELECTION in can and not can & (PROVING | {Capability.WARM_START})


def _refusal(solver: Solver, problem: SelectionProblem, why: str = "") -> CapabilityError:
    kind, names = type(problem.budget), []
    for name in available_solvers():
        with contextlib.suppress(CBSError, ImportError):
            cls = solver_class(name)
            objective = Capability(problem.objective.value) in cls.capabilities
            whole = not isinstance(problem.budget, Partitioned) or isinstance(problem.budget, cls.budgets)
            if objective and whole and (_takes(cls, problem) or _finds(cls, problem)):
                names.append(name)
    return CapabilityError(
        f"solver {solver.name!r} does not keep a {kind.__name__} budget under the {problem.objective.value} "
        f"objective{why}; these do: {', '.join(names)}"
    )


def _adds_up(problem: SelectionProblem) -> bool:
    """Whether the objective under a knapsack is a sum over single weights."""
    alone = all(isinstance(block.curvature, Diagonal) for block in problem.blocks)
    summed = problem.objective is Objective.SELECTION or not problem.has_gradient
    return isinstance(problem.budget, Knapsack) and problem.budget.labels is None and alone and summed
