"""The interface every backend implements: one class, one file, declared capabilities, validated options.

A backend is a frozen dataclass deriving from `Solver`. Its fields are its options; declare them with
`option` so that they are documented, validated and can be given as ``name[option=value]``:

    @dataclass(frozen=True)
    class Greedy(Solver):
        name = "greedy"
        summary = "remove the cheapest weight, again and again"
        capabilities = frozenset({Capability.SELECTION, Capability.GLOBAL_BUDGET})

        window: int = option(10, "candidates looked at per step", minimum=1)

        def run(self, problem, context):
            ...
            return Proposal(pruned)
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import threading
import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, ClassVar

import numpy as np

from solvers.budget import Budget, Cardinality, Knapsack, Partitioned
from solvers.curvature import Curvature
from solvers.errors import OptionError
from solvers.problem import Mask, SelectionProblem
from solvers.solution import Proposal, TracePoint

CalibrationLoss = Callable[[Mask], float]


class Capability(str, Enum):
    """What a backend can do; what is not declared is refused by `solvers.solve` before work starts."""

    SELECTION = "selection"
    JOINT = "joint"
    GLOBAL_BUDGET = "global_budget"
    """Several blocks may share n_prune."""
    LINEAR_TERM = "linear_term"
    """The gradient of the problem is taken into account."""
    BOUND = "bound"
    """Returns a lower bound."""
    EXACT = "exact"
    """Proves optimality, given the time."""
    WARM_START = "warm_start"
    TIME_LIMIT = "time_limit"
    RANDOMISED = "randomised"
    """The result depends on the seed."""
    CALIBRATION = "calibration"
    """Can pick among its masks by the calibration loss."""
    OWN_WEIGHTS = "own_weights"
    """Proposes values of the kept weights of its own."""

    def __str__(self) -> str:
        return self.value


#: Any problem of several blocks with a gradient, by either objective or by one of them.
ANY_PROBLEM = frozenset({Capability.SELECTION, Capability.JOINT, Capability.GLOBAL_BUDGET, Capability.LINEAR_TERM})
SELECTION_PROBLEM = ANY_PROBLEM - {Capability.JOINT}
JOINT_PROBLEM = ANY_PROBLEM - {Capability.SELECTION}
#: May be stopped at any time, and goes on from a given mask.
ANYTIME = frozenset({Capability.WARM_START, Capability.TIME_LIMIT})
#: Proves that its mask is the best, given the time.
PROVING = frozenset({Capability.BOUND, Capability.EXACT})


#: What a solver takes that ranks single weights.
RANKED: tuple[type[Budget], ...] = (Cardinality, Partitioned)
#: What a solver takes that ranks them once, so that what they cost can have a say.
SCORED: tuple[type[Budget], ...] = (*RANKED, Knapsack)


class Need(str, Enum):
    """What must be known of a problem before a backend can choose, beside the weights."""

    CURVATURE = "curvature"
    GRADIENT = "gradient"

    def __str__(self) -> str:
        return self.value


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A documented, validated option of a solver; bounds are inclusive."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=metadata)


class Deadline:
    """A wall-clock limit counted from its creation; `None` never expires."""

    def __init__(self, seconds: float | None = None) -> None:
        self._start = time.monotonic()
        self.limit = math.inf if seconds is None else float(seconds)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def remaining(self) -> float:
        """Seconds left, never negative; inf without a limit."""
        return max(0.0, self.limit - self.elapsed())

    def expired(self) -> bool:
        """Whether the limit has passed."""
        return self.elapsed() >= self.limit

    @contextmanager
    def flag(self) -> Iterator[Mask]:
        """bool (1,), set when the limit has passed: compiled loops, which let other threads run, look at it."""
        flag = np.zeros(1, dtype=np.bool_)
        if math.isinf(self.limit):
            yield flag
            return
        timer = threading.Timer(self.remaining(), flag.fill, (True,))
        timer.daemon = True
        timer.start()
        try:
            yield flag
        finally:
            timer.cancel()

    def shares(self, count: int) -> Iterator[float]:
        """Seconds for each of `count` runs: what a quick one leaves goes to those that are left."""
        for left in range(count, 0, -1):
            yield self.remaining() / left


@dataclass
class Context:
    """What a backend is given beside the problem.

    Attributes
    ----------
    seed : int
    deadline : Deadline
    start : numpy bool (n,) or None
        A feasible mask to start from.
    calibration_loss : callable or None
        Loss of the network under a mask (training data, never test data); for backends that pick among
        several masks.
    trace : list of TracePoint
    """

    seed: int = 0
    deadline: Deadline = field(default_factory=Deadline)
    start: Mask | None = None
    calibration_loss: CalibrationLoss | None = None
    trace: list[TracePoint] = field(default_factory=list)

    def rng(self) -> np.random.Generator:
        """A fresh generator for the seed: the same stream at every call."""
        return np.random.default_rng(self.seed)

    def record(self, objective: float, bound: float = -math.inf) -> None:
        """Append a point to the trace."""
        self.trace.append(TracePoint(self.deadline.elapsed(), float(objective), float(bound)))


@dataclass(frozen=True)
class Solver(ABC):
    """Base class of all backends. See the module's docstring for how to write one."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str] = ""
    capabilities: ClassVar[frozenset[Capability]]
    curvatures: ClassVar[tuple[type[Curvature], ...]] = (Curvature,)
    """Kinds of curvature it runs on; all by default, since problems answer the same questions whatever the kind."""
    budgets: ClassVar[tuple[type[Budget], ...]] = (Cardinality,)
    """Kinds of budget it keeps."""
    most_items: ClassVar[Mapping[type[Budget], int]] = {}
    """Of these kinds of budget it takes problems of at most so many weights."""
    as_items: ClassVar[bool] = False
    """Whether a selection among groups comes to it as one among the items of a smaller problem, though it takes groups
    as they are."""
    apart: ClassVar[bool] = False
    """Whether parts of a partitioned problem that share nothing (rows of a layer) are handed to it one by one, even
    though it keeps a partition as a whole."""
    rows_beyond: ClassVar[int | None] = None
    """Layers of more weights than that come to it whole all the same where no row is cut: it goes by rows itself."""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CURVATURE})
    """What it looks at; what no solver and no update needs is not measured."""
    max_weights: ClassVar[int | None] = None
    """Largest n that is accepted; None for any."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that must be importable."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            self._check_option(spec, getattr(self, spec.name))

    def _check_option(self, spec: dataclasses.Field[Any], value: Any) -> None:
        meta, kinds = spec.metadata, _kinds(type(self))[spec.name]
        what = f"{self.name}: option {spec.name}={value!r}"
        if kinds and not any(_fits(value, kind) for kind in kinds):
            raise OptionError(f"{what} must be {' or '.join(_NAMES.get(kind, kind.__name__) for kind in kinds)}")
        choices = meta.get("choices")
        if choices is not None and value not in choices:
            raise OptionError(f"{what} must be one of {', '.join(map(str, choices))}")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return
        if math.isnan(value):
            raise OptionError(f"{what} must be a number")
        low, high = meta.get("minimum"), meta.get("maximum")
        if low is not None and value < low:
            raise OptionError(f"{what} must be at least {low:g}")
        if high is not None and value > high:
            raise OptionError(f"{what} must be at most {high:g}")

    @abstractmethod
    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Choose the weights to remove.

        Called with 0 < n_prune < n and only for problems the declared capabilities cover. Must return a mask
        with exactly n_prune True, and only a bound that is proven. Check ``context.deadline`` where
        `Capability.TIME_LIMIT` is declared, and return the best mask so far when it has expired.
        """

    @property
    def spec(self) -> str:
        """The solver with its options that differ from the defaults, as the registry parses it."""
        changed = [
            f"{f.name}={_format(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default and not isinstance(getattr(self, f.name), np.ndarray)
        ]
        return f"{self.name}[{','.join(changed)}]" if changed else self.name


_NAMES: dict[type, str] = {bool: "True or False", int: "an integer", float: "a number", str: "text", type(None): "None"}


@cache
def _kinds(cls: type[Solver]) -> dict[str, tuple[type, ...]]:
    """The types that each option takes; none where any will do."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        plain = tuple(m for m in members if isinstance(m, type) and typing.get_origin(m) is None)
        found[name] = plain if len(plain) == len(members) else ()
        if typing.get_origin(hint) is typing.Literal:
            found[name] = (str,)
    return found


def _fits(value: Any, kind: type) -> bool:
    """Whether a value is of a type as Python writes numbers: True is none, 3 is a float too."""
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, (bool, np.bool_))
    return isinstance(value, (kind, np.bool_) if kind is bool else kind)


def _format(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else str(value)
