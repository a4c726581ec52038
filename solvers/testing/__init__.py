"""The conformance kit: what every solver must do, checked against brute force. Third parties run it in their own tests.

from solvers.testing import check_solver

def test_my_solver():
    check_solver(MySolver())
"""

from __future__ import annotations

from solvers.testing.conformance import CheckResult, ConformanceReport, check_solver
from solvers.testing.instances import KINDS, random_problem

__all__ = ["KINDS", "CheckResult", "ConformanceReport", "check_solver", "random_problem"]
