"""Running code in a child process that can be killed: for backends that clash, crash or overstay.

`Worker` is a child (``python -m solvers.exact.isolation``) that answers pickled calls over its standard pipes, so
that it needs neither fork nor a guarded ``__main__``, and whatever a C library prints cannot end up in the
answers. A call that exceeds its limit kills the child; a child that dies (a crash, ``abort()``, the out-of-memory
killer) is reported as BackendError with its exit code, and the next call starts a fresh one.

loky, the executor of joblib, is not used: it pools workers and takes the death of one for the death of the pool
(`TerminatedWorkerError`, without the exit code of the one that died), it cannot kill the worker of a single task that
overstays its limit, nor that worker's own children (it has timeouts for idle workers only), and what C code prints in
its workers goes to this process's own streams. A pool is also not wanted here: solvers whose shared
libraries clash must each meet a process in which nothing was imported before.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import IO, Any, BinaryIO

from solvers.errors import BackendError, CBSError
from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Context, Deadline, Solver

#: Seconds beyond the time limit after which the child is killed, besides half the limit itself.
GRACE = 15.0
_HEADER = struct.Struct("<Q")


class HardLimitError(BackendError):
    """The child did not come back within the hard limit and was killed."""


class Worker:
    """A child process that runs functions, one at a time; a context manager.

    Functions and arguments travel as pickles, so functions must be importable by name in the child, which
    sees this process's ``sys.path``.

    Parameters
    ----------
    quiet : bool
        Keep what the child writes to stderr, and whatever its libraries print, for the message about its death.
    """

    def __init__(self, quiet: bool = True) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._quiet = quiet
        self._noise: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        """``function(*arguments)`` in the child.

        Parameters
        ----------
        limit : float, optional
            Seconds after which the child is killed.

        Raises
        ------
        HardLimitError
            If the limit was exceeded.
        BackendError
            If the child died, or what was sent or returned cannot be pickled.
        CBSError
            Whatever error of this package the function raised.
        """
        try:
            request = pickle.dumps((function, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise BackendError(f"cannot be run in a child process, because it cannot be pickled: {error}") from error
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        expired = threading.Event()
        timer = None
        if limit is not None and math.isfinite(limit):

            def expire() -> None:
                expired.set()
                _kill(process)

            timer = threading.Timer(limit, expire)
            timer.daemon = True
            timer.start()
        try:
            _send(process.stdin, request)
            answer = _receive(process.stdout)
        except (OSError, EOFError) as error:
            code = _reap(process)
            self._process = None
            last_words = self._last_words()
            if expired.is_set():
                raise HardLimitError(f"the child process was killed after its hard limit of {limit:g} s") from error
            raise BackendError(f"the child process died: {_exit_text(code)}{last_words}") from error
        except BaseException:
            self.close()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        succeeded, value = pickle.loads(answer)
        if succeeded:
            return value
        if isinstance(value, CBSError):
            raise value
        raise BackendError(f"failed in the child process: {value}")

    def close(self) -> None:
        """Kill the child, if any."""
        if self._process is not None:
            _kill(self._process)
            _reap(self._process)
            self._process = None
        if self._noise is not None:
            self._noise.close()
            self._noise = None

    def _last_words(self) -> str:
        """The end of what the child wrote, for a message; empty if nothing was kept."""
        if self._noise is None:
            return ""
        self._noise.seek(0)
        text = " ".join(self._noise.read().decode(errors="replace").split())
        self._noise.close()
        self._noise = None
        return f"; it last wrote: …{text[-300:]}" if text else ""

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        if self._quiet and self._noise is None:
            # Lives as long as the child, so no block can enclose it.
            self._noise = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "solvers.exact.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            env=environment,
            # Its own group: Ctrl-C reaches the parent alone, and grandchildren die with the child.
            start_new_session=True,
        )
        return self._process


def run_isolated(solver: Solver, problem: SelectionProblem, context: Context) -> Proposal:
    """`solver.run` in a child process; the solver's own option ``isolated`` is switched off there.

    The child gets the time that remains, its start-up included, and is killed half that time plus `GRACE` later.
    Calibration losses are not passed on.

    Raises
    ------
    BackendError
        If the child crashed or had to be killed.
    """
    inner = replace(solver, isolated=False)  # type: ignore[call-arg]
    remaining = context.deadline.remaining()
    ends = None if math.isinf(remaining) else time.time() + remaining
    limit = None if math.isinf(remaining) else 1.5 * remaining + GRACE
    plain = SelectionProblem([_on_cpu(block) for block in problem.blocks], problem.budget, problem.objective)
    offset = context.deadline.elapsed()
    with Worker(quiet=not getattr(solver, "log", False)) as worker:
        try:
            proposal, trace = worker.call(_run, inner, plain, context.seed, context.start, ends, limit=limit)
        except BackendError as error:
            raise type(error)(f"solver {solver.spec!r}: {error}") from error
    context.trace.extend(replace(point, seconds=point.seconds + offset) for point in trace)
    assert isinstance(proposal, Proposal)
    return proposal


def _on_cpu(block: Any) -> Any:
    return block if block.device.type == "cpu" else replace(block, factor=block.factor.cpu())


def _run(solver: Solver, problem: SelectionProblem, seed: int, start: Any, ends: float | None) -> Any:
    """In the child: (proposal, trace)."""
    deadline = Deadline(None if ends is None else max(ends - time.time(), 0.0))
    context = Context(seed=seed, deadline=deadline, start=start)
    return solver.run(problem, context), context.trace


def _send(stream: BinaryIO | Any, payload: bytes) -> None:
    stream.write(_HEADER.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes:
    (length,) = _HEADER.unpack(_exactly(stream, _HEADER.size))
    return _exactly(stream, length)


def _exactly(stream: BinaryIO | Any, count: int) -> bytes:
    payload = stream.read(count)
    if payload is None or len(payload) < count:
        raise EOFError("the pipe was closed")
    return bytes(payload)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except ProcessLookupError:
        # It is gone already, which is what was wanted.
        return


def _reap(process: subprocess.Popen[bytes]) -> int:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue
    return process.wait()


def _exit_text(code: int) -> str:
    if code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _follow(parent: int) -> None:
    """In the child: end, with whatever it has started, when the parent is gone; a call can last for hours."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def _serve() -> None:
    """The child: answer calls until the pipe closes."""
    if hasattr(os, "killpg"):
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    channel_in = os.fdopen(os.dup(0), "rb")
    channel_out = os.fdopen(os.dup(1), "wb")
    # Anything printed, from C as well, must not end up in the answers.
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    while True:
        try:
            request = _receive(channel_in)
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(request)
            answer = pickle.dumps((True, function(*arguments)), protocol=pickle.HIGHEST_PROTOCOL)
        except CBSError as error:
            answer = pickle.dumps((False, error), protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            answer = pickle.dumps((False, f"{type(error).__name__}: {error}"), protocol=pickle.HIGHEST_PROTOCOL)
        _send(channel_out, answer)


if __name__ == "__main__":
    # Run as the module of that name, so that what it pickles can be found by the parent.
    from solvers.exact import isolation

    isolation._serve()
