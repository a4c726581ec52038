"""``cbs-opt doctor``: which solvers work here, and why the others do not."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import numpy as np
import torch
import typer
from rich.table import Table
from rich.text import Text

from cbs_opt.cli.shell import print_json, wide_console
from cbs_opt.engine.estimate import available_memory
from solvers import Capability, QuadraticBlock, SelectionProblem, available_solvers, describe, solve
from solvers.registry import solver_class

_PACKAGES = ("cbs-opt", "torch", "numpy", "scipy", "numba", "ortools", "cvxpy", "highspy", "pyscipopt", "safetensors")
#: What comes with an extra: module, distribution, what it is for.
_EXTRAS = (
    ("onnxruntime", "onnxruntime", "[onnx]: ONNX files, checked"),
    ("onnxscript", "onnxscript", "[onnx]: ONNX files"),
    ("torch_pruning", "torch-pruning", "[structured]: channels and heads removed for good"),
    ("transformers", "transformers", "[llm]: --hf"),
)
#: Weights of the problem that each solver is given.
_N = 8


@dataclass(frozen=True)
class Verdict:
    """What became of one solver."""

    solver: str
    works: bool
    says: str
    seconds: float


def command(json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False) -> None:
    """Let every solver solve a small problem, and say what is installed. Exit code 1 if one does not work."""
    about = dict(_about())
    verdicts = [_tried(name) for name in available_solvers()]
    if json:
        print_json({"here": about, "solvers": [asdict(verdict) for verdict in verdicts]})
    else:
        console, table = (
            wide_console(),
            Table(title=f"{_N} weights for each solver; the first call may compile"),
        )
        for heading in ("solver", "works", "says", "seconds"):
            table.add_column(heading, justify="right" if heading == "seconds" else "left")
        for verdict in verdicts:
            mark = Text("yes", style="green") if verdict.works else Text("no", style="red")
            table.add_row(verdict.solver, mark, Text(verdict.says), f"{verdict.seconds:.2f}")
        for key, value in about.items():
            console.print(Text(f"{key}: {value}"), soft_wrap=True)
        console.print(table)
    if not all(verdict.works for verdict in verdicts):
        raise typer.Exit(1)


def _tried(name: str) -> Verdict:
    missing = describe(name).missing
    if missing:
        return Verdict(name, False, f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}", 0.0)
    started = time.perf_counter()
    kind = solver_class(name)
    objective = "selection" if Capability.SELECTION in kind.capabilities else "joint"
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(_N, _N))
    block = QuadraticBlock(rng.normal(size=_N), factor=factor, damping=0.1, gradient=rng.normal(size=_N))
    try:
        found = solve(SelectionProblem([block], _N // 2, objective), name, seed=0)
    except Exception as error:
        # Whatever a backend does here is what is to be shown.
        return Verdict(name, False, f"{type(error).__name__}: {error}", time.perf_counter() - started)
    says = f"{objective} objective {found.objective:.6g}, {found.status.value}"
    return Verdict(name, True, says, time.perf_counter() - started)


def _about() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        yield name, _version(name)
    for module, name, purpose in _EXTRAS:
        there = importlib.util.find_spec(module) is not None
        yield name, f"{_version(name) if there else 'not installed'} ({purpose})"
    cuda = torch.cuda.is_available()
    yield "device", torch.cuda.get_device_name(0) if cuda else f"cpu, {torch.get_num_threads()} threads"
    yield "memory", f"{available_memory(torch.device('cuda' if cuda else 'cpu')) / 1e9:.1f} GB free"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
