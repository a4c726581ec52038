"""Child processes: results, errors, crashes, hard limits, and backends run in them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import pytest

from solvers import (
    BackendError,
    Capability,
    Context,
    ProblemError,
    Proposal,
    SelectionProblem,
    Solver,
    option,
    solve,
)
from solvers.exact import isolation
from solvers.exact.isolation import HardLimitError, Worker, run_isolated
from solvers.testing import random_problem


def raise_problem_error() -> None:
    raise ProblemError("three is too many")


def raise_lookup_error() -> None:
    raise LookupError("nothing here")


def print_and_return(value: int) -> int:
    print("this must not end up in the pipe")
    os.write(1, b"nor this, written past Python\n")
    return value


def test_one_worker_survives_errors_crashes_and_limits() -> None:
    with Worker() as worker:
        assert worker.call(print_and_return, 7) == 7
        first = worker.call(os.getpid)
        assert first != os.getpid()
        with pytest.raises(ProblemError, match="three is too many"):
            worker.call(raise_problem_error)
        with pytest.raises(BackendError, match="LookupError: nothing here"):
            worker.call(raise_lookup_error)
        assert worker.call(os.getpid) == first
        with pytest.raises(BackendError, match=r"SIGABRT|exit code"):
            worker.call(os.abort)
        with pytest.raises(BackendError, match="exit code 3"):
            worker.call(os._exit, 3)
        second = worker.call(os.getpid)
        assert second != first
        with pytest.raises(HardLimitError, match="hard limit"):
            worker.call(time.sleep, 600.0, limit=0.5)


def write_and_die() -> None:
    os.write(2, b"the last words\n")
    os.abort()


def test_the_last_words_of_a_child_are_reported() -> None:
    with Worker() as worker:
        with pytest.raises(BackendError, match=r"died.*the last words"):
            worker.call(write_and_die)
        assert worker.call(print_and_return, 3) == 3


def test_what_cannot_be_pickled_is_refused() -> None:
    with Worker() as worker, pytest.raises(BackendError, match="pickled"):
        worker.call(lambda: 1)


def test_a_backend_gives_the_same_result_in_a_child() -> None:
    problem = random_problem(6, "joint", n=8, kinds=("plain",), linear=True).with_n_prune(4)
    inside = solve(problem, "ortools_miqp")
    outside = solve(problem, "ortools_miqp[isolated=true]", time_limit=100.0)
    np.testing.assert_array_equal(inside.pruned, outside.pruned)
    assert outside.bound == pytest.approx(inside.bound, rel=1e-6)
    assert outside.trace


@dataclass(frozen=True)
class Aborting(Solver):
    name = "aborting"
    summary = "crash as C libraries do"
    capabilities = frozenset({Capability.SELECTION, Capability.TIME_LIMIT})

    isolated: bool = option(False, "run in a child process")
    hang: bool = option(False, "hang instead")

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        if self.isolated:
            return run_isolated(self, problem, context)
        if self.hang:
            time.sleep(3600.0)
        os.abort()


def test_a_crash_of_a_backend_is_an_error_of_ours() -> None:
    problem = random_problem(6, n=6, kinds=("plain",), linear=False)
    with pytest.raises(BackendError, match=r"aborting\[isolated=True\].*died: signal SIGABRT|died: exit code"):
        solve(problem, Aborting(isolated=True))


def test_a_backend_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "GRACE", 0.2)
    problem = random_problem(6, n=6, kinds=("plain",), linear=False)
    with pytest.raises(HardLimitError, match=r"aborting.*killed"):
        solve(problem, Aborting(isolated=True, hang=True), time_limit=0.2)
