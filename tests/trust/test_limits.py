"""Whatever its options, a solver that takes a time limit ends by it."""

from __future__ import annotations

import dataclasses

import pytest

import solvers
from solvers.solution import Reason
from solvers.solver import Capability
from tests.conftest import random_problem

LIMITED = [
    name
    for name in solvers.available_solvers()
    if "time_limit" in solvers.describe(name).capabilities and "miqp" not in name and name != "ortools_cpsat"
]


@pytest.mark.parametrize("name", LIMITED)
def test_huge_options_end_at_the_time_limit(name: str) -> None:
    solver = solvers.make_solver(name)
    huge = {
        field.name: field.metadata["maximum"] or 10**9
        for field in dataclasses.fields(solver)
        if type(getattr(solver, field.name)) is int and field.name not in ("threads", "dense_limit", "exact_below")
    }
    objective = "selection" if Capability.SELECTION in solver.capabilities else "joint"
    problem = random_problem(0, (120,), 60, objective)
    solution = solvers.solve(problem, dataclasses.replace(solver, **huge), time_limit=0.2, with_refit=False)
    assert solution.n_pruned == 60
    # With a thousand million rounds to make, the end is that of the time, or that nothing is left to be done.
    assert solution.reason in (Reason.TIME_LIMIT, Reason.COMPLETED)
