"""Running a solver inside a solver: specs, capabilities, time and bounds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from solvers.errors import OptionError
from solvers.problem import Mask, SelectionProblem
from solvers.registry import make_solver
from solvers.running import check_capabilities, run_backend
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Deadline, Solver


def make_inner(spec: str, outer: str) -> Solver:
    """The solver named by an option of `outer`; raises OptionError where it would nest itself endlessly."""
    inner = make_solver(spec)
    if inner.name == outer:
        raise OptionError(f"{outer}: the inner solver {spec!r} is {outer} again; name another one")
    return inner


def adopt(outer: Solver, members: Sequence[Solver], from_members: Iterable[Capability]) -> None:
    """Narrow what `outer` declares to what all its `members` can do, for the capabilities in `from_members`.

    The class declares what a composite can do at best; an instance knows its members, and so is refused with a
    CapabilityError before work starts where one of them would be.
    """
    lacking = {c for c in from_members if any(c not in member.capabilities for member in members)}
    # The instance's value hides the class's; the dataclass is frozen, hence this way of setting it.
    object.__setattr__(outer, "capabilities", type(outer).capabilities - lacking)


def adopt_limit(outer: Solver, members: Sequence[Solver]) -> None:
    """Let `outer`, which hands whole problems to its `members`, take no more weights than each of them."""
    limits = [member.max_weights for member in members if member.max_weights is not None]
    object.__setattr__(outer, "max_weights", min(limits, default=None))


PROBLEM_CAPABILITIES = (
    Capability.SELECTION,
    Capability.JOINT,
    Capability.GLOBAL_BUDGET,
    Capability.LINEAR_TERM,
)


def split_plus(text: str) -> Iterator[str]:
    """Split ``a+b[x=1]+c`` at the plus signs outside brackets."""
    depth, current = 0, ""
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "+" and depth == 0:
            yield current.strip()
            current = ""
        else:
            current += character
    yield current.strip()


def run_inner(
    inner: Solver, problem: SelectionProblem, context: Context, *, seed: int, seconds: float, start: Mask | None = None
) -> Proposal:
    """Run `inner` for at most `seconds` (if it keeps a limit) on a problem whose capabilities are checked first.

    A start is handed over only to solvers that take one. The trace of the inner run is dropped: its times and
    objectives are not the outer problem's.
    """
    warm = start if Capability.WARM_START in inner.capabilities else None
    check_capabilities(inner, problem, None, warm)
    limit = None if seconds == float("inf") else max(seconds, 1e-3)
    return run_backend(inner, problem, replace(context, seed=seed, deadline=Deadline(limit), start=warm, trace=[]))


def combined_reason(proposals: Iterable[Proposal], expired: bool) -> Reason:
    """TIME_LIMIT where the time ran out, else the first reason that is not COMPLETED."""
    if expired:
        return Reason.TIME_LIMIT
    return next((p.reason for p in proposals if p.reason is not Reason.COMPLETED), Reason.COMPLETED)
