"""OR-Tools and CVXPY each bring a libhighs; both orders must leave both of them working, HiGHS included."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ORTOOLS = """
import numpy, solvers
problem = solvers.testing.random_problem(3, n=6, kinds=("plain",), linear=False)
from ortools.linear_solver import pywraplp
from ortools.math_opt.python import mathopt
assert solvers.solve(problem, "ortools_miqp").status is solvers.Status.OPTIMAL
"""
_CVXPY = """
import cvxpy
problem = solvers.testing.random_problem(3, n=6, kinds=("plain",), linear=False)
assert solvers.solve(problem, "cvxpy_miqp").status is solvers.Status.OPTIMAL
x = cvxpy.Variable(2, nonneg=True)
program = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(x)), [x[0] + 2 * x[1] >= 2])
program.solve(solver="HIGHS")
assert abs(program.value - 1.0) < 1e-6, program.value
"""


@pytest.mark.parametrize("parts", [(_ORTOOLS, _CVXPY), (_CVXPY, _ORTOOLS)], ids=["ortools first", "cvxpy first"])
def test_both_orders_work(parts: tuple[str, str]) -> None:
    code = "import solvers, solvers.testing\n" + "".join(parts) + "print('done')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.strip().endswith("done"), result.stderr[-2000:]


def test_neither_is_imported_with_the_package() -> None:
    code = "import sys, solvers, solvers.exact.ortools_miqp, solvers.exact.cvxpy_miqp; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert not loaded & {"ortools", "cvxpy", "highspy", "pyscipopt"}
