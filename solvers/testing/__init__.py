"""The conformance kit: what every solver must do, checked against brute force. Third parties run it in their own tests.

from solvers.testing import check_solver

def test_my_solver():
    check_solver(MySolver())
"""

from __future__ import annotations

from solvers.testing.conformance import CheckResult, ConformanceReport, check_solver
from solvers.testing.curvature_checks import check_curvature
from solvers.testing.instances import CURVATURES, KINDS, random_problem, with_curvature

__all__ = [
    "CURVATURES",
    "KINDS",
    "CheckResult",
    "ConformanceReport",
    "check_curvature",
    "check_solver",
    "random_problem",
    "with_curvature",
]
