"""What a plugin's own tests look like: the conformance kit does the work."""

from __future__ import annotations

from cbs_opt_example_plugin.backward_greedy import BackwardGreedySolver

import solvers
from solvers.testing import check_solver


def test_conformance() -> None:
    print(check_solver(BackwardGreedySolver()))
    check_solver(BackwardGreedySolver(batch=3))


def test_the_entry_point_is_found() -> None:
    assert "backward_greedy" in solvers.available_solvers()
    assert solvers.make_solver("backward_greedy[batch=2]").batch == 2
