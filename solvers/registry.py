"""Names of solvers: built-in ones loaded lazily, third-party ones through entry points.

A third-party package declares, in its pyproject.toml,

    [project.entry-points."cbs_opt.solvers"]
    my_solver = "my_package.my_module:MySolver"

and ``solvers.solve(problem, "my_solver[option=value]")`` finds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from solvers.curvature import Curvature
from solvers.errors import BackendError, OptionError, UnknownNameError
from solvers.solver import Solver

ENTRY_POINT_GROUP = "cbs_opt.solvers"
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}

_BUILT_IN = {
    "random": "solvers.baselines.random:RandomSolver",
    "magnitude": "solvers.baselines.magnitude:MagnitudeSolver",
    "gradient_magnitude": "solvers.baselines.gradient_magnitude:GradientMagnitudeSolver",
    "obd": "solvers.baselines.obd:OptimalBrainDamageSolver",
    "woodfisher": "solvers.baselines.woodfisher:WoodFisherSolver",
    "rmp": "solvers.baselines.rmp:RandomisedMagnitudeSolver",
    "greedy_ls": "solvers.local_search.greedy_ls:GreedyLocalSearchSolver",
    "best_swap": "solvers.local_search.best_swap:BestSwapSolver",
    "tabu": "solvers.local_search.tabu:TabuSolver",
    "annealing": "solvers.local_search.annealing:AnnealingSolver",
    "obs": "solvers.joint.obs:OptimalBrainSurgeonSolver",
    "joint_ls": "solvers.joint.joint_ls:JointLocalSearchSolver",
    "sweep": "solvers.joint.sweep:SweepSolver",
    "iht": "solvers.joint.iht:HardThresholdingSolver",
    "admm": "solvers.joint.admm:AdmmSolver",
    "brute_force": "solvers.exact.brute_force:BruteForceSolver",
    "branch_bound": "solvers.exact.branch_bound:BranchBoundSolver",
    "ortools_miqp": "solvers.exact.ortools_miqp:OrtoolsMiqpSolver",
    "ortools_cpsat": "solvers.exact.ortools_cpsat:OrtoolsCpSatSolver",
    "cvxpy_miqp": "solvers.exact.cvxpy_miqp:CvxpyMiqpSolver",
    "restarts": "solvers.composites.restarts:RestartsSolver",
    "portfolio": "solvers.composites.portfolio:PortfolioSolver",
    "lns": "solvers.composites.lns:LargeNeighbourhoodSolver",
    "by_component": "solvers.composites.by_component:ByComponentSolver",
}


@dataclass(frozen=True)
class OptionDescription:
    """One option of a solver."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class SolverDescription:
    """What a solver does, needs and guarantees; ``print`` it."""

    name: str
    summary: str
    reference: str
    capabilities: tuple[str, ...]
    curvatures: tuple[str, ...]
    budgets: tuple[str, ...]
    needs: tuple[str, ...]
    max_weights: int | None
    requires: tuple[str, ...]
    missing: tuple[str, ...]
    options: tuple[OptionDescription, ...]

    @property
    def available(self) -> bool:
        """Whether every module it needs is installed."""
        return not self.missing

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.summary}"]
        if self.reference:
            lines.append(f"  source: {self.reference}")
        lines.append(f"  can: {', '.join(self.capabilities)}")
        lines.append(f"  curvatures: {', '.join(self.curvatures)}; budgets: {', '.join(self.budgets)}")
        lines.append(f"  looks at: {', '.join(('weights', *self.needs))}")
        if self.max_weights is not None:
            lines.append(f"  at most {self.max_weights} weights")
        if self.requires:
            state = f" (not installed: {', '.join(self.missing)})" if self.missing else ""
            lines.append(f"  needs: {', '.join(self.requires)}{state}")
        lines.extend(f"  [{o.name}={o.default}] {o.type}: {o.help}" for o in self.options)
        return "\n".join(lines)


@cache
def _third_party() -> dict[str, EntryPoint]:
    """Entry points by name; built-in names cannot be taken over."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in _BUILT_IN:
            raise BackendError(
                f"entry point {entry.value!r} wants the name {entry.name!r}, which is built in; rename it"
            )
        found[entry.name] = entry
    return found


def available_solvers() -> list[str]:
    """Names of all solvers, built-in and third-party, sorted; nothing is imported."""
    return sorted([*_BUILT_IN, *_third_party()])


def solver_class(name: str) -> type[Solver]:
    """The class behind a name.

    Raises
    ------
    UnknownNameError
        With the nearest known name.
    BackendError
        If a third-party solver cannot be imported or is not a `Solver`.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        return typing.cast("type[Solver]", getattr(importlib.import_module(module), attribute))
    entry = _third_party().get(name)
    if entry is None:
        raise UnknownNameError.of("solver", name, available_solvers())
    try:
        loaded = entry.load()
    except Exception as error:
        raise BackendError(f"solver {name!r} ({entry.value}) cannot be imported: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Solver)):
        raise BackendError(f"entry point {name!r} ({entry.value}) is not a subclass of solvers.Solver")
    return loaded


@cache
def _hints(cls: type[Solver]) -> dict[str, Any]:
    """Types of the options of a solver."""
    return typing.get_type_hints(cls)


def describe(name: str) -> SolverDescription:
    """What a solver does, needs and guarantees; raises UnknownNameError."""
    cls = solver_class(name)
    hints = _hints(cls)
    options = tuple(
        OptionDescription(f.name, _type_name(hints[f.name]), _plain(f.default), f.metadata.get("help", ""))
        for f in dataclasses.fields(cls)
    )
    return SolverDescription(
        name=name,
        summary=cls.summary,
        reference=cls.reference,
        capabilities=tuple(sorted(c.value for c in cls.capabilities)),
        curvatures=tuple("all" if kind is Curvature else kind.__name__ for kind in cls.curvatures),
        budgets=tuple(kind.__name__ for kind in cls.budgets),
        needs=tuple(sorted(need.value for need in cls.needs)),
        max_weights=cls.max_weights,
        requires=cls.requires,
        missing=_missing(cls),
        options=options,
    )


def _missing(cls: type[Solver]) -> tuple[str, ...]:
    """Modules it requires that are not installed."""
    return tuple(m for m in cls.requires if importlib.util.find_spec(m) is None)


def make_solver(spec: str | Solver) -> Solver:
    """A solver from ``"name"`` or ``"name[option=value,...]"``; brackets may nest for composites.

    Raises
    ------
    UnknownNameError
        For a name or option nobody knows.
    OptionError
        For brackets that do not match or a value of the wrong type or range.
    """
    if isinstance(spec, Solver):
        return spec
    if not isinstance(spec, str):
        raise OptionError(f"a solver is a name such as 'greedy_ls[window=20]' or a Solver, not {spec!r}")
    name, _, rest = spec.strip().partition("[")
    name = name.strip()
    if rest and not rest.endswith("]"):
        raise OptionError(f"solver {spec!r}: the bracket is not closed; write name[option=value,...]")
    cls = solver_class(name)
    if modules := " ".join(_missing(cls)):
        raise BackendError(f"solver {name!r} needs {modules}, which is not installed; pip install {modules}")
    hints, known = _hints(cls), [f.name for f in dataclasses.fields(cls)]
    options: dict[str, Any] = {}
    body = rest[:-1].strip().removesuffix(",")
    for part in split_outside_brackets(body, ",") if body else ():
        key, equals, text = (s.strip() for s in part.partition("="))
        if not equals:
            raise OptionError(f"solver {spec!r}: {part!r} must be option=value")
        if key not in known:
            raise UnknownNameError.of(f"option of {name}", key, known)
        if key in options:
            raise OptionError(f"solver {spec!r}: option {key!r} is given twice")
        options[key] = _convert(text, hints[key], f"{name}: option {key}")
    return cls(**options)


def split_outside_brackets(text: str, separator: str) -> Iterator[str]:
    """The parts of ``a=1,b=x[c=2,d=3]`` between separators outside brackets, stripped."""
    depth, current = 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if depth < 0:
            break
        if character == separator and depth == 0:
            yield current.strip()
            current = ""
        else:
            current += character
    if depth:
        raise OptionError(f"unbalanced brackets in {text!r}")
    yield current.strip()


def _convert(text: str, kind: Any, what: str) -> Any:
    """`text` as a value of type `kind`: a simple type, an enum, a Literal, or any of several."""
    several = typing.get_origin(kind) in (typing.Union, types.UnionType)
    members = typing.get_args(kind) if several else (kind,)
    if types.NoneType in members and text.lower() == "none":
        return None
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            return text
        if not isinstance(member, type) or not issubclass(member, (bool, int, float, str, Enum)):
            continue
        with contextlib.suppress(ValueError, KeyError):
            return _BOOLEANS[text.lower()] if member is bool else member(text)
    raise OptionError(f"{what}={text!r} is not a valid {_type_name(kind)}")


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
