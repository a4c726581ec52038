"""Calls in children through joblib: what crashes or hangs costs its call; an end kills what is under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import joblib
import pytest

from experiments.runs.parallel import Call, completed
from solvers.errors import BackendError, DataError
from solvers.exact.isolation import HardLimitError


def refuse(what: str) -> None:
    """A bad input, found in the child."""
    raise DataError(what)


def leave_pid(path: Path) -> None:
    """Hang, with the process's number in a file."""
    path.write_text(str(os.getpid()))
    time.sleep(600)


CALLS = [
    Call(pow, (2, 5)),
    Call(os.abort, ()),
    Call(time.sleep, (600.0,), 0.5),
    Call(refuse, ("no such thing",)),
    Call(pow, (3, 2)),
]


def check(outcomes: dict[int, object]) -> None:
    assert outcomes[0] == 32 and outcomes[4] == 9
    assert isinstance(outcomes[1], BackendError) and "SIGABRT" in str(outcomes[1])
    assert isinstance(outcomes[2], HardLimitError)
    assert isinstance(outcomes[3], DataError) and str(outcomes[3]) == "no such thing"


@pytest.mark.parametrize("workers", [1, 2])
def test_each_call_has_an_outcome_of_its_own(workers: int) -> None:
    check(dict(completed(CALLS, workers)))


def test_the_backend_of_joblib_is_taken() -> None:
    with joblib.parallel_config(backend="loky", n_jobs=2):
        check(dict(completed(CALLS, None)))


def test_a_backend_without_generators_hands_out_a_few_at_a_time() -> None:
    with joblib.parallel_config(backend="multiprocessing", n_jobs=2):
        outcomes = completed(CALLS, None)
        first = [next(outcomes) for _ in range(2)]
        assert [at for at, _ in first] == [0, 1]
        check({**dict(first), **dict(outcomes)})


@pytest.mark.parametrize("workers", [1, 2])
def test_closing_kills_what_is_under_way(workers: int, tmp_path: Path) -> None:
    calls = [Call(pow, (2, 2))] + [Call(leave_pid, (tmp_path / str(i),)) for i in range(4)]
    with closing(completed(calls, workers)) as outcomes:
        assert next(outcomes) == (0, 4)
        if workers > 1:
            while not any(path.read_text() for path in tmp_path.iterdir()):
                time.sleep(0.05)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert len(list(tmp_path.iterdir())) <= workers


_ORPHANING = """
import sys
from pathlib import Path
from experiments.runs.parallel import Call, completed
from tests.experiments.test_parallel import leave_pid
list(completed([Call(leave_pid, (Path(sys.argv[1]),))]))
"""


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", _ORPHANING, str(path)])
    while not (path.exists() and path.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(path.read_text())
    parent.kill()
    parent.wait()
    for _ in range(600):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return
        except OSError:
            # No /proc, or it went this moment.
            state = ""
        # Where nobody reaps orphans, what has ended stays as a zombie.
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child outlived its parent")
