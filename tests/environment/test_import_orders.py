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


def _loaded(code: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, {code}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_neither_is_imported_with_the_package() -> None:
    loaded = _loaded("solvers, solvers.exact.ortools_miqp, solvers.exact.cvxpy_miqp")
    assert not loaded & {"ortools", "cvxpy", "highspy", "pyscipopt"}


@pytest.mark.parametrize("package", ["solvers", "cbs_opt", "cbs_opt.cli.main"])
def test_what_only_some_calls_need_is_not_imported_with_the_package(package: str) -> None:
    """An import costs what torch costs, and little more."""
    loaded = _loaded(package)
    on_use = {"ortools", "cvxpy", "highspy", "pyscipopt", "numba", "networkx", "scipy.linalg", "scipy.optimize"}
    on_use |= {"scipy.sparse", "matplotlib", "datasets", "pandas", "pyarrow", "sklearn", "joblib", "PIL", "sympy"}
    on_use |= {"onnx", "onnxruntime", "torch_pruning", "transformers", "torch._dynamo", "torch._inductor"}
    assert package in loaded and not loaded & on_use
