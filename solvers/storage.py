"""Problems as .npz files: arrays ``weights``, ``damping``, possibly ``gradient``, and those of the curvature.

A low-rank curvature has ``factor``; a dense one ``matrix``, a diagonal one ``diagonal``, a Kronecker one ``row_scale``
and ``input_moment``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from solvers.block import QuadraticBlock
from solvers.curvature import Dense, Diagonal, Kronecker, LowRank
from solvers.errors import OutputError, ProblemError
from solvers.files import replacing
from solvers.problem import Objective, SelectionProblem

#: Names of the arrays of each kind of curvature, as `Curvature.digest_arrays` gives them.
_ARRAYS: dict[type[Any], tuple[str, ...]] = {
    LowRank: ("factor",),
    Dense: ("matrix",),
    Diagonal: ("diagonal",),
    Kronecker: ("row_scale", "input_moment"),
}


def load_block(path: str | Path, *, use_gradient: bool = True, damping: float | None = None) -> QuadraticBlock:
    """Read one block; its name is the file's stem.

    Raises
    ------
    ProblemError
        If the file is missing, truncated, lacks an array, or holds values that do not form a block.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ProblemError(f"a block is read from a path, not {path!r}")
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise ProblemError(f"no block at {path}; give the path of an .npz file") from None
    except Exception as error:
        # What a damaged archive makes zipfile, zlib and numpy raise is no closed list.
        raise ProblemError(
            f"{path} is not a readable .npz block ({error}); write it with solvers.save_block"
        ) from error
    kinds = [kind for kind, names in _ARRAYS.items() if all(name in arrays for name in names)]
    if "weights" not in arrays or not kinds:
        missing = "weights" if "weights" not in arrays else "factor"
        raise ProblemError(f"{path} has no array {missing!r}; a block needs weights, factor and damping")
    stored = arrays.get("damping", np.float64(0.0))
    if damping is None and (np.size(stored) != 1 or stored.dtype.kind not in "fiu"):
        raise ProblemError(f"{path}: damping must be one number, not {stored.dtype} of shape {np.shape(stored)}")
    ridge = float(np.asarray(stored).reshape(())) if damping is None else damping
    gradient = arrays.get("gradient") if use_gradient else None
    if kinds[0] is LowRank:
        return QuadraticBlock(arrays["weights"], arrays["factor"], ridge, gradient, path.stem)
    parts = [arrays[name] for name in _ARRAYS[kinds[0]]]
    return QuadraticBlock(arrays["weights"], curvature=kinds[0](*parts, ridge), gradient=gradient, name=path.stem)


def load_problem(
    path: str | Path,
    n_prune: int,
    objective: Objective | str = Objective.SELECTION,
    use_gradient: bool = True,
) -> SelectionProblem:
    """Read a one-block problem from an .npz file; raises ProblemError, UnknownNameError."""
    return SelectionProblem([load_block(path, use_gradient=use_gradient)], n_prune, objective)


def block_digest(block: QuadraticBlock) -> str:
    """A digest of the numbers of a block, whatever it is called."""
    digest = hashlib.sha256()
    for tensor in (block.weights, *block.curvature.digest_arrays(), block.gradient):
        digest.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
    digest.update(repr(block.damping).encode())
    return digest.hexdigest()[:16]


def save_block(path: str | Path, block: QuadraticBlock, *, compress: bool = False) -> None:
    """Write one block, so that `load_block` reads back the same values; raises OutputError, or ProblemError."""
    if type(block.curvature) not in _ARRAYS:
        raise ProblemError(f"block {block.name!r}: a {type(block.curvature).__name__} curvature cannot be saved")
    stored = zip(_ARRAYS[type(block.curvature)], block.curvature.digest_arrays(), strict=True)
    arrays = {
        "weights": block.weights.cpu().numpy(),
        **{name: array.cpu().numpy() for name, array in stored},
        "damping": np.float64(block.damping),
    }
    if block.gradient is not None:
        arrays["gradient"] = block.gradient.cpu().numpy()
    try:
        with replacing(path) as part, part.open("wb") as handle:
            (np.savez_compressed if compress else np.savez)(handle, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
