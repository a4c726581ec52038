"""Real instances that come with the package, each with the best value known and who proved it.

    instance = solvers.load_instance("mlpnet-60-joint-k48")
    instance.problem()          # a SelectionProblem, as any other
    instance.best, instance.proven, instance.bound, instance.mask

Blocks are .npz files in ``data/`` (`solvers.storage`) in float32, which is exactly what they are: H is AᵀA + λI of the
rounded A. ``blocks.json`` says where each was cut and holds its digest; ``optima.json`` has a record for each instance.
How they were made, and how to add one: docs/instances.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from solvers.arguments import instance as of_type
from solvers.errors import BackendError, OptionError, ProblemError, UnknownNameError
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.solution import Solution
from solvers.storage import load_block

#: Where the instances of the package lie.
FOLDER = Path(__file__).resolve().parent / "data"
OPTIMA, BLOCKS = "optima.json", "blocks.json"
#: A gap within which a bound proves a value, as for `Status.OPTIMAL`.
PROVEN = 1e-6
#: Relative difference of two values of one mask that rounding can make.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Claim:
    """Who found a value or proved a bound, and at what cost.

    Attributes
    ----------
    solver
        With its options, as `solvers.solve` takes it.
    version
        Of this package, or of what else did it.
    seconds, limit
        Wall time it took, and that it was given; None for no limit.
    cpu
        Processor seconds: what counts where a machine did other things meanwhile.
    machine, date
    """

    solver: str
    version: str
    seconds: float
    cpu: float
    limit: float | None
    machine: str
    date: str


@dataclass(frozen=True)
class Instance:
    """A block, how many of its weights go, an objective, and the best that is known.

    Attributes
    ----------
    block
        Name of the block: its file is ``data/<block>.npz``.
    n, n_prune, objective
    best
        Objective of `pruned`, the best mask known, as the package computes it.
    bound
        The highest lower bound that was proven; -inf where there is none.
    pruned
        The weights that this mask removes, ascending.
    found, bounded
        Who found the mask, and who proved the bound; None as long as nobody has.
    folder
        Where the block lies.
    """

    block: str
    n: int
    n_prune: int
    objective: str
    best: float = math.inf
    bound: float = -math.inf
    pruned: tuple[int, ...] = ()
    found: Claim | None = None
    bounded: Claim | None = None
    folder: Path = FOLDER

    @property
    def name(self) -> str:
        """``<block>-<objective>-k<n_prune>``."""
        return f"{self.block}-{self.objective}-k{self.n_prune}"

    @property
    def path(self) -> Path:
        """File of the block."""
        return self.folder / f"{self.block}.npz"

    @property
    def gap(self) -> float:
        """(best − bound) / |best|; inf without a bound."""
        if self.best <= self.bound:
            return 0.0
        return (self.best - self.bound) / abs(self.best) if 0.0 < abs(self.best) < math.inf else math.inf

    @property
    def proven(self) -> bool:
        """Whether nothing better exists: the bound meets the value within 1e-6 of it."""
        return self.gap <= PROVEN

    @property
    def mask(self) -> Mask:
        """The best mask known, bool (n,), True = removed."""
        mask = np.zeros(self.n, dtype=np.bool_)
        mask[list(self.pruned)] = True
        return mask

    def problem(self) -> SelectionProblem:
        """The problem; raises ProblemError where the block is missing or damaged."""
        return SelectionProblem([load_block(self.path, use_gradient=False)], self.n_prune, self.objective)

    def improved(self, solution: Solution, claim: Claim) -> Instance:
        """With the mask of a solution where that is better, and its bound where that is higher.

        Raises
        ------
        BackendError
            If what is known and what was found cannot both be true: a value below a proven bound.
        """
        best, bound = min(self.best, solution.objective), max(self.bound, solution.bound)
        if bound - best > PROVEN * abs(best):
            raise BackendError(
                f"{self.name}: {claim.solver} says {solution.objective!r} and at least {solution.bound!r}, the record "
                f"{self.best!r} and at least {self.bound!r}; one of the bounds is wrong"
            )
        known = self
        if self.found is None or solution.objective < self.best - _ROUNDING * abs(self.best):
            removed = tuple(np.flatnonzero(solution.pruned).tolist())
            known = replace(known, best=solution.objective, pruned=removed, found=claim)
        if solution.bound > self.bound and not self.proven:
            known = replace(known, bound=solution.bound, bounded=claim)
        return known

    def as_record(self) -> dict[str, Any]:
        """As ``optima.json`` holds it."""
        record = {name: value for name, value in asdict(self).items() if name != "folder"}
        record["bound"] = self.bound if math.isfinite(self.bound) else None
        return {**record, "proven": self.proven, "gradient": False}


def available_instances(pattern: str = "*") -> tuple[str, ...]:
    """Names of the instances that match, as file names do (``"resnet20-*-joint-*"``), smallest first."""
    of_type("the pattern of instances", pattern, str, error=OptionError)
    return tuple(name for name in _records() if fnmatchcase(name, pattern))


def load_instance(name: str) -> Instance:
    """An instance by its name; raises UnknownNameError."""
    known = _records()
    if name not in known:
        raise UnknownNameError.of("instance", name, known)
    return known[name]


def read_instances(folder: Path = FOLDER) -> dict[str, Instance]:
    """All records of a folder by name, smallest first; raises ProblemError where the file is not one of records."""
    path = folder / OPTIMA
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        found = [_instance(entry, folder) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"{path} is not a list of records of instances ({error!r}); install again") from error
    found.sort(key=lambda one: (one.n, one.block, one.objective != Objective.SELECTION.value, one.n_prune))
    return {one.name: one for one in found}


_records = cache(read_instances)


def _instance(entry: Mapping[str, Any], folder: Path) -> Instance:
    bounded = entry["bounded"]
    return Instance(
        block=entry["block"],
        n=entry["n"],
        n_prune=entry["n_prune"],
        objective=entry["objective"],
        best=entry["best"],
        bound=-math.inf if entry["bound"] is None else entry["bound"],
        pruned=tuple(entry["pruned"]),
        found=Claim(**entry["found"]),
        bounded=None if bounded is None else Claim(**bounded),
        folder=folder,
    )
