"""Problems as .npz files: arrays ``weights``, ``factor``, ``damping`` and possibly ``gradient``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from solvers.errors import OutputError, ProblemError
from solvers.problem import Objective, QuadraticBlock, SelectionProblem


def load_block(path: str | Path, *, use_gradient: bool = True, damping: float | None = None) -> QuadraticBlock:
    """Read one block; its name is the file's stem.

    Raises
    ------
    ProblemError
        If the file is missing, truncated, lacks an array, or holds values that do not form a block.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise ProblemError(f"no block at {path}; give the path of an .npz file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        raise ProblemError(
            f"{path} is not a readable .npz block ({error}); write it with solvers.save_block"
        ) from error
    missing = [key for key in ("weights", "factor") if key not in arrays]
    if missing:
        raise ProblemError(f"{path} has no array {missing[0]!r}; a block needs weights, factor and damping")
    stored = arrays.get("damping", np.float64(0.0))
    if damping is None and np.size(stored) != 1:
        raise ProblemError(f"{path}: damping must be one number, not shape {np.shape(stored)}")
    return QuadraticBlock(
        weights=arrays["weights"],
        factor=arrays["factor"],
        damping=float(np.asarray(stored).reshape(())) if damping is None else damping,
        gradient=arrays.get("gradient") if use_gradient else None,
        name=path.stem,
    )


def load_problem(
    path: str | Path,
    n_prune: int,
    objective: Objective | str = Objective.SELECTION,
    use_gradient: bool = True,
) -> SelectionProblem:
    """Read a one-block problem from an .npz file; raises ProblemError, UnknownNameError."""
    return SelectionProblem([load_block(path, use_gradient=use_gradient)], n_prune, objective)


def save_block(path: str | Path, block: QuadraticBlock) -> None:
    """Write one block, so that `load_block` reads back the same values; raises OutputError."""
    arrays = {
        "weights": block.weights.cpu().numpy(),
        "factor": block.factor.cpu().numpy(),
        "damping": np.float64(block.damping),
    }
    if block.gradient is not None:
        arrays["gradient"] = block.gradient.cpu().numpy()
    try:
        with Path(path).open("wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
