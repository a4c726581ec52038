"""Where the calls of the commands are carried out; what all commands share is in `cbs_opt.cli.shell`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import joblib

from solvers.errors import OptionError


def on_backend(backend: str | None) -> AbstractContextManager[object]:
    """Where the calls of `experiments.runs.parallel.completed` go: None is this process, the rest are joblib's names.

    Parameters
    ----------
    backend
        ``dask`` takes the scheduler in ``DASK_SCHEDULER_ADDRESS``, ``ray`` the cluster in ``RAY_ADDRESS``.

    Raises
    ------
    OptionError
        The backend is unknown, or its library is not installed.
    """
    if backend is None:
        return nullcontext()
    try:
        if backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        host = {"scheduler_host": os.environ.get("DASK_SCHEDULER_ADDRESS")} if backend == "dask" else {}
        return joblib.parallel_config(backend=backend, **host)
    except (ImportError, ValueError) as error:
        raise OptionError(f"--backend {backend}: {error}; leave it out to stay on this machine") from error
