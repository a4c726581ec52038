"""The error tree of the package.

Every message says what was wrong, with which value, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CBSError(Exception):
    """Root of every error raised on purpose by ``solvers``, ``cbs_opt`` and ``experiments``."""


class ProblemError(CBSError, ValueError):
    """Arrays or values that do not form a valid problem (NaN, wrong shape, n_prune > n, ...)."""


class SingularHessianError(CBSError, ArithmeticError):
    """An inverse of H, or of a principal sub-matrix, is needed and does not exist."""


class UnknownNameError(CBSError, LookupError):
    """A solver, option, experiment, method or layer pattern that nobody knows."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str], remedy: str = "") -> UnknownNameError:
        """Build the error with a did-you-mean taken from `known`."""
        names = sorted(known)
        name = name if isinstance(name, str) else repr(name)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        listing = f" Known: {', '.join(names)}." if names else ""
        return cls(f"unknown {kind} {name!r}.{hint}{listing}{' ' + remedy if remedy else ''}")


class OptionError(CBSError, ValueError):
    """An option of a solver or command whose value is out of range or of the wrong type."""


class CapabilityError(CBSError, ValueError):
    """A solver was asked for something it does not declare to support."""


class BackendError(CBSError, RuntimeError):
    """A backend is not installed, crashed, or returned something that is not true."""


class DataError(CBSError, ValueError):
    """Calibration data or a data set that is missing, unreadable, not finite or not repeatable."""


class ModelError(CBSError, ValueError):
    """A network that cannot be pruned as it is (no prunable layer, train-mode batch norm, ...)."""


class CheckpointError(CBSError, OSError):
    """A checkpoint that is missing, truncated or does not fit the network."""


class OutputError(CBSError, OSError):
    """An output folder or file that cannot be written."""
