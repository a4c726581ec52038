"""Every solver under every budget and objective: a feasible, verified solution, or an error that names who does it."""

from __future__ import annotations

from pathlib import Path

import pytest

import solvers
from solvers.testing.budget_table import BUDGETS, budget_table, problem_of, way_of

DOCS = Path(__file__).parents[2] / "docs" / "budgets.md"


@pytest.mark.parametrize("name", solvers.available_solvers())
def test_every_solver_keeps_a_budget_or_says_who_does(name: str) -> None:
    about = solvers.describe(name)
    if about.missing:
        pytest.skip(f"{name} needs {about.missing}")
    for kind in BUDGETS:
        for objective in solvers.Objective:
            problem = problem_of(kind, objective, gradient=name == "gradient_magnitude")
            limit = 1.0 if "time_limit" in about.capabilities else None
            try:
                found = solvers.solve(problem, name, time_limit=limit, with_refit=False)
            except solvers.CapabilityError as error:
                assert way_of(name, kind, objective) == "no", error
                says = str(error)
                assert any(words in says for words in ("these do: ", "choose another", "takes costs itself")), error
                continue
            assert way_of(name, kind, objective) != "no"
            assert not problem.budget.violation(found.pruned) and found.bound <= found.objective
            assert (
                found.objective == pytest.approx(problem.value(found.pruned), rel=1e-9) or found.own_weights is not None
            )


def test_the_table_of_the_docs_is_that_of_the_registry() -> None:
    if any(solvers.describe(name).missing for name in solvers.available_solvers()):
        pytest.skip("some solvers are not installed")
    assert budget_table() in DOCS.read_text(), f"docs/budgets.md should hold\n{budget_table()}"
