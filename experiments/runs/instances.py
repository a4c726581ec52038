"""Making the instances of the package: blocks of four networks, cut anew, and the best that is known of each.

A block is rounded to float32 before anything is proven, so that the file is the instance and not an approximation of
it; its factor is upper triangular, which halves it.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from experiments.networks import get_experiment
from experiments.networks.load import Say, Source, open_network
from experiments.runs.cutting import CutOptions, drawing, measured_as
from experiments.runs.rows import versions
from experiments.runs.solves import FRACTIONS, warm_up
from solvers import (
    Capability,
    Objective,
    QuadraticBlock,
    Solver,
    available_instances,
    export_problem,
    load_instance,
    make_solver,
    save_block,
    solve,
)
from solvers.errors import OptionError, OutputError, ProblemError
from solvers.files import write_atomically
from solvers.instances import BLOCKS, OPTIMA, Claim, Instance, read_instances
from solvers.storage import block_digest

#: Weights of the blocks of a family, one block each.
SIZES = (20, 40, 60, 80, 100, 150, 200, 300)
#: Most weights, and seconds of the proof, of instances that are compared where none are asked for.
QUICK = (100, 2.0)
#: Family: experiment, and samples its curvature is measured on.
FAMILIES = {
    "mlpnet": ("mlpnet-mnist", 2000),
    "cifarnet": ("cifarnet-cifar10", 1000),
    "resnet20": ("resnet20-cifar10", 1000),
    "smollm2": ("smollm2-wikitext2", 8),
}


@dataclass(frozen=True)
class ProofOptions:
    """Who works on which instances."""

    solver: Annotated[tuple[str, ...], "One after the other, each from the best mask so far if it takes a start."] = (
        "branch_bound[threads=1]",
    )
    time_limit: Annotated[float | None, "Seconds for each, for solvers that keep a limit."] = 60.0
    instances: Annotated[str, "Names, as a pattern of file names: 'mlpnet-*-joint-*'."] = "*"
    again: Annotated[bool, "Those too that are proven."] = False
    seed: Annotated[int, "Of randomised solvers."] = 0
    machine: Annotated[str | None, "In words, for the record; default: what the processor is called."] = None


def cut_instances(
    families: Sequence[str], folder: Path, *, source: Source, seed: int, say: Say = lambda message: None
) -> None:
    """Cut one block of every size from each family's network, in place of those there are; raises CBSError."""
    for family in families:
        if family not in FAMILIES:
            raise OptionError(f"--family is one of {', '.join(FAMILIES)}, not {family!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for family in families:
        experiment, samples = FAMILIES[family]
        network = open_network(get_experiment(experiment), source, say)
        options = CutOptions(min(SIZES), 1, samples)
        draw = drawing(network, options, seed=seed, say=say)
        kind, rows, _ = measured_as(network.experiment, options)
        rng = np.random.default_rng(seed)
        about = _about(folder)
        for size in SIZES:
            name = f"{family}-{size}"
            cut = draw(rng, size, name)
            block = QuadraticBlock(cut.block.weights.float(), cut.block.factor.float(), cut.block.damping, None, name)
            save_block(folder / f"{name}.npz", block, compress=True)
            about[name] = {
                "n": size,
                "network": experiment,
                "place": cut.place,
                "curvature": kind,
                "samples": rows,
                "damping": block.damping,
                "seed": seed,
                "digest": block_digest(block),
            }
            say(f"{name}: {cut.place}")
        write_atomically(folder / BLOCKS, (json.dumps(about, indent=1) + "\n").encode())


def matching(patterns: Sequence[str]) -> tuple[str, ...]:
    """Names of the instances of the package that match any of the patterns; without any, of those that are quick.

    Raises
    ------
    OptionError
        For a pattern that nothing matches.
    """
    if not patterns:
        return tuple(name for name in available_instances() if _quick(load_instance(name)))
    found: dict[str, None] = {}
    for pattern in patterns:
        names = available_instances(pattern)
        if not names:
            raise OptionError(
                f"--instances {pattern}: no instance is called so; `python -m experiments.instances list` names them"
            )
        found.update(dict.fromkeys(names))
    return tuple(found)


def _quick(one: Instance) -> bool:
    return one.n <= QUICK[0] and one.proven and one.bounded is not None and one.bounded.seconds <= QUICK[1]


def _about(folder: Path) -> dict[str, Any]:
    path = folder / BLOCKS
    return json.loads(path.read_text()) if path.is_file() else {}


def improve(folder: Path, options: ProofOptions, say: Say = lambda message: None) -> Iterator[Instance]:
    """Run solvers on instances; each is on disk when it is yielded. New blocks get their records here.

    Raises
    ------
    ProblemError
        If no instance matches.
    BackendError
        If a value falls below a bound that was proven before.
    """
    known = read_instances(folder)
    wanted = [one for one in possible(folder) if fnmatchcase(one.name, options.instances)]
    if not wanted:
        raise ProblemError(f"--instances {options.instances}: no instance of {folder} is called so")
    torch.set_num_threads(1)
    for one in wanted:
        for spec in options.solver:
            record = known.get(one.name, one)
            solver = make_solver(spec)
            takes = Capability.SELECTION if one.objective == Objective.SELECTION.value else Capability.JOINT
            if (record.proven and not options.again) or takes not in solver.capabilities:
                continue
            known[one.name] = _tried(record, solver, options)
            write_atomically(folder / OPTIMA, _as_text(known.values()))
            say(f"{one.name}: {spec}: {known[one.name].best:.9g}, gap {known[one.name].gap:.3g}")
            yield known[one.name]


def export_instances(
    instances: Iterable[Instance], target: Path, suffix: str, *, scaled: bool, say: Say = lambda message: None
) -> Path:
    """Write instances for other solvers, and ``index.csv`` with what is known of each; returns that file's path.

    Raises
    ------
    UnknownNameError
        If nothing writes files of that suffix.
    OutputError
        If the folder cannot be written.
    """
    index = target / "index.csv"
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(index, b"")
    except OSError as error:
        raise OutputError(f"cannot write {index} ({error.strerror or error}); give another folder") from error
    lines = ["file,scale,best,bound,proven,best_in_file"]
    for one in instances:
        scale = scale_of(one.best) if scaled else 1.0
        path = target / f"{one.name}.{suffix}"
        export_problem(one.problem(), path, scale=scale)
        bound = one.bound if math.isfinite(one.bound) else ""
        lines.append(f"{path.name},{scale!r},{one.best!r},{bound},{one.proven},{scale * one.best!r}")
        say(str(path))
    write_atomically(index, ("\n".join(lines) + "\n").encode())
    return index


def scale_of(value: float) -> float:
    """The power of two that brings a value to between 500 and 1,000; 1 for zero."""
    return 2.0 ** (10 - math.frexp(value)[1]) if value else 1.0


def possible(folder: Path) -> list[Instance]:
    """The instances that the blocks of a folder make, without what is known of them, smallest first."""
    return [
        Instance(name, about["n"], round(share * about["n"]), objective.value, folder=folder)
        for name, about in sorted(_about(folder).items(), key=lambda item: item[1]["n"])
        for objective in Objective
        for share in FRACTIONS
    ]


def _tried(record: Instance, solver: Solver, options: ProofOptions) -> Instance:
    """The record after one more solver."""
    limit = options.time_limit if Capability.TIME_LIMIT in solver.capabilities else None
    start = record.mask if record.pruned and Capability.WARM_START in solver.capabilities else None
    problem = record.problem()
    warm_up(solver.spec, record.objective, False)
    cpu = time.process_time()
    solution = solve(problem, solver, time_limit=limit, seed=options.seed, start=start)
    claim = Claim(
        solver=solver.spec,
        version=f"cbs-opt {versions()['cbs-opt']}",
        seconds=round(solution.seconds, 2),
        cpu=round(time.process_time() - cpu, 2),
        limit=limit,
        machine=options.machine or _processor(),
        date=datetime.date.today().isoformat(),
    )
    return record.improved(solution, claim)


def _as_text(records: Iterable[Instance]) -> bytes:
    """A line for each."""
    lines = ",\n".join(json.dumps(one.as_record(), allow_nan=False) for one in records)
    return f"[\n{lines}\n]\n".encode()


def _processor() -> str:
    """What the processor is called, where the system says so."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return str(names[0] if names else platform.processor() or platform.machine())
