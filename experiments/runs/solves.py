"""Solvers × blocks × budgets × objectives: the solves of a comparison."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch

from experiments.runs.parallel import Call, completed
from experiments.runs.rows import ResultsFile, key_of, versions
from solvers import Capability, Objective, QuadraticBlock, SelectionProblem, Solver, load_block, make_solver, solve
from solvers.budget import parse
from solvers.errors import BackendError, CapabilityError, CBSError, OptionError, ProblemError
from solvers.routes import route
from solvers.running import check_capabilities
from solvers.storage import block_digest
from solvers.testing import random_problem

#: Most points of a trace that a row keeps.
TRACE_POINTS = 60
#: Shares of the weights removed where nothing is asked for.
FRACTIONS = (0.5, 0.8, 0.9)


#: Digest of a block, n_prune, objective, whether with its gradient, budget where that is no number.
Instance = tuple[str, int, str, bool, str]


@dataclass(frozen=True)
class Task:
    """One solve. `digest` identifies the numbers of the block, whatever its file is called."""

    block: str
    digest: str
    n: int
    n_prune: int
    objective_kind: str
    solver: str
    seed: int
    time_limit: float | None
    gradient: bool
    budget: str = ""

    @property
    def key(self) -> str:
        """Digest of all of it: rows of equal keys are the same measurement."""
        settings = asdict(self)
        if not self.budget:
            del settings["budget"]
        return key_of(settings)

    @property
    def instance(self) -> Instance:
        """What is solved, whoever solves it."""
        return self.digest, self.n_prune, self.objective_kind, self.gradient, self.budget

    def problem(self, block: QuadraticBlock) -> SelectionProblem:
        """The problem of its block."""
        return SelectionProblem([block], self.budget or self.n_prune, self.objective_kind)


@dataclass(frozen=True)
class BlockFile:
    """A block on disk."""

    path: Path
    name: str
    n: int
    digest: str
    has_gradient: bool


def find_blocks(folder: Path, names: Collection[str] | None = None) -> list[BlockFile]:
    """The blocks of a folder, all or those of some names, smallest first.

    Raises
    ------
    ProblemError
        If the folder holds none, or one that cannot be read.
    """
    paths = sorted(p for p in folder.expanduser().glob("*.npz") if names is None or p.stem in names)
    if not paths:
        raise ProblemError(f"no .npz blocks in {folder}; give another --blocks, or cut some with --from EXPERIMENT")
    found = []
    for path in paths:
        block = load_block(path)
        found.append(BlockFile(path, path.stem, block.n, block_digest(block), block.gradient is not None))
    return sorted(found, key=lambda b: (b.n, b.name))


@dataclass(frozen=True)
class SolveOptions:
    """What is solved, by whom: every combination."""

    solver: Annotated[tuple[str, ...], "Solvers, e.g. greedy_ls 'branch_bound[node_limit=1000]'."]
    fraction: Annotated[tuple[float, ...], "Shares of the weights removed; default: 0.5 0.8 0.9."] = ()
    n_prune: Annotated[tuple[int, ...], "Numbers of weights removed, besides."] = ()
    objective: Annotated[
        tuple[str, ...], "selection, joint; default: selection, of instances of the package both."
    ] = ()
    seed: Annotated[tuple[int, ...], "Of randomised solvers; the first also cuts blocks."] = (0,)
    time_limit: Annotated[float | None, "Seconds per solve, for solvers that keep a limit."] = 60.0
    gradient: Annotated[bool, "Keep the linear term of the blocks."] = False
    budget: Annotated[
        tuple[str, ...], "Patterns, besides: 2:4 of a block as one row, 1x4:0.5 of its groups; sizes it fits."
    ] = ()

    def __post_init__(self) -> None:
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise OptionError(f"--time-limit must be positive seconds, not {self.time_limit!r}")
        for text in self.budget:
            parse(text)
        if not self.fraction and not self.n_prune and not self.budget:
            object.__setattr__(self, "fraction", FRACTIONS)
        for share in self.fraction:
            if not 0.0 <= share <= 1.0:
                raise OptionError(f"--fraction must lie between 0 and 1, not {share!r}")


def plan(
    blocks: Sequence[BlockFile], options: SolveOptions, chosen: Collection[str] | None = None
) -> tuple[list[Task], list[str]]:
    """The tasks, and in words what was left out because a solver does not declare it.

    A fraction f of n weights is round(f·n) of them. Solvers that ignore the seed run with the first one only.

    Parameters
    ----------
    chosen
        Names of instances of the package, if it is these that are solved and no others.

    Raises
    ------
    UnknownNameError, OptionError, BackendError
        For a solver that cannot be made.
    """
    tasks: list[Task] = []
    left_out: dict[str, None] = {}
    for spec in options.solver:
        solver = make_solver(spec)
        usable = options.seed if Capability.RANDOMISED in solver.capabilities else options.seed[:1]
        limit = options.time_limit if Capability.TIME_LIMIT in solver.capabilities else None
        for block in blocks:
            loaded = load_block(block.path, use_gradient=options.gradient)
            for n_prune, budget in _limits(block, loaded, options, left_out):
                for objective in _objectives(options, chosen):
                    if chosen is not None and f"{block.name}-{objective}-k{n_prune}" not in chosen:
                        continue
                    task = Task(
                        block=block.name,
                        digest=block.digest,
                        n=block.n,
                        n_prune=n_prune,
                        objective_kind=objective.value,
                        solver=solver.spec,
                        seed=0,
                        time_limit=limit,
                        gradient=options.gradient and block.has_gradient,
                        budget=budget,
                    )
                    try:
                        _check(solver, task.problem(loaded), limit)
                    except CapabilityError as error:
                        left_out[f"{solver.name}, n={block.n}, {objective}: {error}"] = None
                        continue
                    tasks.extend(replace(task, seed=seed) for seed in usable)
    # By instance, so that after an interruption whole instances can be compared.
    order = {task.instance: at for at, task in reversed(list(enumerate(tasks)))}
    tasks.sort(key=lambda task: (task.n, order[task.instance]))
    return list(dict.fromkeys(tasks)), list(left_out)


def _objectives(options: SolveOptions, chosen: Collection[str] | None) -> list[Objective]:
    usual = [Objective.SELECTION] if chosen is None else list(Objective)
    return [Objective.parse(name) for name in options.objective] or usual


def _limits(
    block: BlockFile, loaded: QuadraticBlock, options: SolveOptions, left_out: dict[str, None]
) -> list[tuple[int, str]]:
    """(n_prune, budget) of a block; n_prune of a budget is how many weights go."""
    wanted = {round(f * block.n) for f in options.fraction} | {k for k in options.n_prune if k <= block.n}
    limits = [(n_prune, "") for n_prune in sorted(wanted)]
    for text in options.budget:
        try:
            limits.append((SelectionProblem([loaded], text).n_prune, text))
        except (ProblemError, CapabilityError) as error:
            left_out[f"{text}, n={block.n}: {error}"] = None
    return limits


def _check(solver: Solver, problem: SelectionProblem, limit: float | None) -> None:
    """Raise CapabilityError, for what the solver does not take."""
    way = route(solver, problem, None)
    check_capabilities(solver, way.problem, limit, None)


def stored_optima(folder: Path, blocks: Sequence[BlockFile]) -> dict[Instance, float]:
    """Best-known values from ``optima.json`` of a folder, by instance; empty where there is no such file.

    Raises
    ------
    ProblemError
        If the file is there but is not a list of such values.
    """
    path = folder.expanduser() / "optima.json"
    if not path.is_file():
        return {}
    digests = {block.name: block.digest for block in blocks}
    known: dict[Instance, float] = {}
    try:
        for entry in json.loads(path.read_text()):
            if entry["block"] in digests:
                gradient = bool(entry.get("gradient", False))
                instance = digests[entry["block"]], int(entry["n_prune"]), str(entry["objective"]), gradient, ""
                known[instance] = min(float(entry["best"]), known.get(instance, math.inf))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"{path} is not a list of best-known values ({error!r}); repair or remove it") from error
    return known


class Comparison:
    """Runs tasks and appends their rows; finished rows are not made again, failed ones are.

    Parameters
    ----------
    tasks
    paths
        File of each block by digest.
    results
    best_known
        By instance; rows improve on it as they come in.
    workers
        Solves at a time, see `completed`. Each is on one thread, so that times do not depend on their number more than
        they must.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        paths: dict[str, Path],
        results: ResultsFile,
        best_known: dict[Instance, float],
        workers: int | None,
    ) -> None:
        self.tasks, self.paths, self.results, self.workers = tasks, paths, results, workers
        self.best_known = dict(best_known)
        done = {row["key"]: row for row in results.rows if row.get("error") is None and "key" in row}
        self.finished = [done[task.key] for task in tasks if task.key in done]
        self.missing = [task for task in tasks if task.key not in done]

    def run(self) -> Iterator[dict[str, Any]]:
        """Make the rows that are missing; each is on disk when it is yielded."""
        calls = [Call(measure, (task, self.paths[task.digest]), _hard_limit(task)) for task in self.missing]
        with closing(completed(calls, self.workers)) as outcomes:
            for at, outcome in outcomes:
                if isinstance(outcome, CBSError):
                    outcome = {"error": f"{type(outcome).__name__}: {outcome}"}
                row = self._judged(self.missing[at], outcome)
                self.results.append(row)
                self.finished.append(row)
                yield row

    def _judged(self, task: Task, figures: dict[str, Any]) -> dict[str, Any]:
        """The row: task, figures, and how far they are from the best value known by now."""
        value = figures.get("objective")
        if value is not None:
            self.best_known[task.instance] = min(value, self.best_known.get(task.instance, math.inf))
        best = self.best_known.get(task.instance)
        row = {**asdict(task), "key": task.key, "error": None, **figures, "versions": versions()}
        row["best_known"] = best
        row["gap_to_best"] = None if value is None or best is None else gap_between(value, best)
        return row


def _hard_limit(task: Task) -> float | None:
    """Seconds after which the child of a task is killed: imports and compilation come on top of its limit."""
    return None if task.time_limit is None else 3.0 * task.time_limit + 120.0


def gap_between(value: float, best: float) -> float:
    """(value − best)/|best|, not below 0; inf where the best is 0 and the value is not."""
    if value <= best:
        return 0.0
    return (value - best) / abs(best) if best != 0.0 else math.inf


@lru_cache(maxsize=8)
def _loaded(path: Path, gradient: bool) -> QuadraticBlock:
    return load_block(path, use_gradient=gradient)


@lru_cache(maxsize=256)
def warm_up(solver: str, objective: str, gradient: bool) -> None:
    """Solve something small first: imports and compilation, half a minute at worst, are no solver's merit or fault."""
    chosen = make_solver(solver)
    limit = 5.0 if Capability.TIME_LIMIT in chosen.capabilities else None
    n = 12 if chosen.max_weights is None else min(12, chosen.max_weights)
    problem = random_problem(0, objective, n=n, linear=gradient, kinds=("plain",)).with_n_prune(n // 2)
    try:
        solve(problem, chosen, time_limit=limit)
    except CBSError:
        # What is wrong will show, and be recorded, in the solve that counts.
        return


def measure(task: Task, path: Path) -> dict[str, Any]:
    """Solve one task, in a child process; the figures of its row."""
    torch.set_num_threads(1)
    problem = task.problem(_loaded(path, task.gradient))
    warm_up(task.solver, task.objective_kind, task.gradient)
    cpu = time.process_time()
    solution = solve(problem, task.solver, time_limit=task.time_limit, seed=task.seed)
    cpu = time.process_time() - cpu
    row = solution.as_row()
    row["seconds"] = row.pop("seconds_solve")
    if not math.isfinite(solution.objective):
        raise BackendError(f"the objective of {task.block} is {solution.objective}; it has no optimum to compare with")
    row["seconds_cpu"] = cpu
    row["trace"] = [[p.seconds, _finite(p.objective), _finite(p.bound)] for p in _thinned(solution.trace)]
    row["statistics"] = {name: _finite(float(value)) for name, value in solution.statistics.items()}
    return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _thinned(points: Sequence[Any]) -> list[Any]:
    """At most TRACE_POINTS of them, the last included."""
    if len(points) <= TRACE_POINTS:
        return list(points)
    step = (len(points) - 1) / (TRACE_POINTS - 1)
    return [points[round(i * step)] for i in range(TRACE_POINTS)]
