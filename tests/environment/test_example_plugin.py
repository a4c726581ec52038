"""The example plugin is installed, offline, into a folder of its own, and its solver is found and conforms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "cbs_opt_example_plugin"
ROOT = Path(__file__).resolve().parents[2]

_USE = """
import solvers
from solvers.testing import check_solver
assert "backward_greedy" in solvers.available_solvers()
print(solvers.describe("backward_greedy"))
problem = solvers.testing.random_problem(3, n=12, kinds=("plain",))
solution = solvers.solve(problem, "backward_greedy[batch=2]", time_limit=60.0)
assert solution.solver == "backward_greedy[batch=2]"
print(check_solver("backward_greedy", instances=1))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin and its metadata. Copied first: a build leaves files in the source."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False
    )
    if result.returncode != 0 and "No module named pip" in result.stderr:
        pytest.skip("pip is not installed in this environment")
    assert result.returncode == 0, result.stderr[-2000:]
    return target


def _run(code: str, installed: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_the_entry_point_adds_a_solver_that_conforms(installed: Path) -> None:
    result = _run(_USE, installed)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "remove everything, then put the most valuable weights back" in result.stdout
    assert "passed  several_blocks" in result.stdout and "failed" not in result.stdout


def test_without_it_the_name_is_unknown(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import solvers; solvers.make_solver('backward_greedy')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0 and "UnknownNameError" in result.stderr
