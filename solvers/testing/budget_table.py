"""Which solver takes which budget, said by the solvers themselves: a table, and the small problems it is made on."""

from __future__ import annotations

import numpy as np

from solvers.budget import NM, Bounded, Budget, Cardinality, Groups, Knapsack, Pattern
from solvers.errors import CBSError
from solvers.problem import Objective, SelectionProblem
from solvers.registry import available_solvers, describe, make_solver
from solvers.routes import route
from solvers.running import check_capabilities
from solvers.testing.instances import random_problem

_N = 12
_LABELS = np.repeat(np.arange(6), 2)
_COSTS = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5, 8.0, 9.7, 9.3, 2.0])
#: A budget of every kind, for 12 weights.
BUDGETS: dict[str, Budget | Pattern] = {
    "number": Cardinality(6),
    "N:M": NM(2, 4),
    "floors": Bounded(6, (4, 8), (2, 1), (3, 8)),
    "groups": Groups(_LABELS, 3),
    "costs": Knapsack(_COSTS, 30.0),
    "two costs": Knapsack(np.stack([_COSTS, _COSTS[::-1]]), [30.0, 35.0]),
    "costs of groups": Knapsack(_COSTS[:6], 11.0, _LABELS),
    "costs and floors": Knapsack(_COSTS, 30.0, sizes=[4, 8], min_kept=[1, 2]),
}


def problem_of(budget: str, objective: Objective | str, gradient: bool = False) -> SelectionProblem:
    """The problem on which a solver is tried."""
    drawn = random_problem(0, objective, n=_N, kinds=("plain",), linear=gradient)
    return drawn.with_budget(BUDGETS[budget])


def way_of(name: str, budget: str, objective: Objective | str) -> str:
    """``yes``: the solver takes it as it is; ``way``: by way of another problem, or mended afterwards; ``no``."""
    solver = make_solver(name)
    problem = problem_of(budget, objective, gradient=name == "gradient_magnitude")
    given = problem
    if isinstance(problem.budget, Bounded) and not isinstance(problem.budget, solver.budgets):
        given = problem.with_budget(problem.budget.relaxed)
    try:
        way = route(solver, given, None)
        check_capabilities(solver, way.problem, None, None)
    except CBSError:
        return "no"
    return "yes" if way.problem is problem else "way"


def budget_table() -> str:
    """A line for each installed solver of single problems, in Markdown."""
    marks = {"yes": "●", "way": "○", "no": "–"}
    lines = [f"| | {' | '.join(BUDGETS)} |", "|---|" + "---|" * len(BUDGETS)]
    for name in available_solvers():
        if not describe(name).missing:
            cells = [" ".join(marks[way_of(name, kind, goal)] for goal in Objective) for kind in BUDGETS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
