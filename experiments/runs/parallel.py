"""Independent calls through joblib, each in a child process that can be killed.

Inside ``joblib.parallel_config(backend="dask")`` (or ``"ray"``) the calls go to a cluster; else threads of this process
each mind a child. A child that crashes or overstays its limit costs its call, never the run.
"""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import joblib

from solvers.errors import BackendError, CBSError
from solvers.exact.isolation import Worker


@dataclass(frozen=True)
class Call:
    """A call of a function that a child can import, with a hard limit in seconds and perhaps a call before it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    limit: float | None = None
    before: Call | None = None


class _Mine(threading.local):
    """The child of this thread."""

    worker: Worker | None = None


_mine = _Mine()
#: Children of the runs that this process has begun, and runs that it has ended.
_children: dict[str, list[Worker]] = {}
_ended: set[str] = set()


def completed(calls: Sequence[Call], workers: int | None = 1) -> Iterator[tuple[int, Any]]:
    """(position, what the call returned or the CBSError it ended with) of every call, as they finish.

    When the iterator is closed, by an interruption too, what is under way in this process is killed and what waits is
    dropped; what is under way on a cluster ends with its call.

    Parameters
    ----------
    workers
        Calls at a time; None is what ``joblib.parallel_config`` says, else 1. A cluster has a number of its own.

    Raises
    ------
    ValueError
        The backend of ``joblib.parallel_config`` is not there.
    """
    run = uuid.uuid4().hex
    _children[run] = []
    outcomes = _submitted([joblib.delayed(_isolated)(run, at, call) for at, call in enumerate(calls)], workers)
    try:
        yield from outcomes
    finally:
        _ended.add(run)
        for child in _children.pop(run):
            child.close()


def _submitted(tasks: Sequence[Any], workers: int | None) -> Iterator[Any]:
    """What joblib makes of the tasks, as it comes."""
    try:
        pool = joblib.Parallel(workers, prefer="threads", return_as="generator_unordered", batch_size=1)
    except ValueError:
        # Not every backend hands results out one by one (Ray does not): then a few at a time.
        pool = joblib.Parallel(workers, batch_size=1)
        step = max(pool._effective_n_jobs(), 1)
        for start in range(0, len(tasks), step):
            yield from pool(tasks[start : start + step])
        return
    outcomes = pool(tasks)
    try:
        for outcome in outcomes:  # noqa: UP028
            yield outcome
    finally:
        with warnings.catch_warnings():
            # It counts the calls that are dropped, as they should be.
            warnings.simplefilter("ignore", UserWarning)
            outcomes.close()


def _isolated(run: str, position: int, call: Call) -> tuple[int, Any]:
    """In a thread or process of joblib's."""
    if run in _ended:
        return position, BackendError("the run was ended before this call began")
    if _mine.worker is None:
        _mine.worker = Worker()
    if _mine.worker not in _children.setdefault(run, []):
        _children[run].append(_mine.worker)
    try:
        if call.before is not None:
            _mine.worker.call(call.before.function, *call.before.arguments, limit=call.before.limit)
        return position, _mine.worker.call(call.function, *call.arguments, limit=call.limit)
    except CBSError as error:
        return position, error
