"""`check_solver`: run every check that applies to a solver's declared capabilities, and report them together."""

from __future__ import annotations

from dataclasses import dataclass

from solvers.errors import CBSError
from solvers.registry import make_solver
from solvers.solver import Solver
from solvers.testing import checks, declaration_checks
from solvers.testing.subject import NotApplicable, Subject


@dataclass(frozen=True)
class CheckResult:
    """One check: `outcome` is "passed", "failed" or "skipped"; `detail` says why, where it did not pass."""

    name: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class ConformanceReport:
    """What `check_solver` found; ``print`` it."""

    solver: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.outcome == "failed")

    def __str__(self) -> str:
        lines = [f"conformance of {self.solver}:"]
        lines += [f"  {r.outcome:7} {r.name}{': ' + r.detail if r.detail else ''}" for r in self.results]
        return "\n".join(lines)


def check_solver(
    solver: Solver | str,
    *,
    seed: int = 0,
    instances: int = 3,
    largest: int = 10,
    time_limit: float = 30.0,
    raises: bool = True,
) -> ConformanceReport:
    """Check a solver against brute force and against what it declares.

    Parameters
    ----------
    solver : Solver or str
        An instance, or what `solvers.make_solver` accepts.
    seed : int
        Of the random problems.
    instances : int
        Random problems per kind and objective.
    largest : int
        Most weights of a problem that is checked against brute force; at most 14.
    time_limit : float
        Seconds for each small problem, for solvers that keep a limit.
    raises : bool
        Whether to raise at the end; otherwise look at the report.

    Returns
    -------
    ConformanceReport

    Raises
    ------
    AssertionError
        Naming every check that failed, with the problem it failed on and how to make that problem again.
    """
    chosen = make_solver(solver)
    subject = Subject(chosen, seed, instances, min(largest, 14), time_limit)
    results = []
    for check in (*declaration_checks.CHECKS, *checks.CHECKS):
        name = check.__name__.removeprefix("check_")
        try:
            check(subject)
        except NotApplicable as reason:
            results.append(CheckResult(name, "skipped", str(reason)))
        except AssertionError as failure:
            results.append(CheckResult(name, "failed", str(failure)))
        except CBSError as error:
            results.append(CheckResult(name, "failed", f"{type(error).__name__}: {error}"))
        else:
            results.append(CheckResult(name, "passed"))
    report = ConformanceReport(chosen.spec, tuple(results))
    if raises and not report.passed:
        raise AssertionError(
            f"solver {chosen.spec!r} failed {len(report.failures)} of {len(results)} checks:\n"
            + "\n".join(f"- {failure.name}: {failure.detail}" for failure in report.failures)
        )
    return report
