"""What all tests share: the optional data folder beside the repository, and small random problems."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from solvers import QuadraticBlock, SelectionProblem

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data sets, checkpoints and proven optima; tests that need it skip without it."""
    if not (SHARED / "blocks").is_dir():
        pytest.skip("the optional folder ../shared is not here")
    return SHARED


def random_block(
    seed: int, n: int, rows: int, damping: float = 0.1, gradient: bool = False, scale: float = 1.0
) -> QuadraticBlock:
    """A dense random block."""
    rng = np.random.default_rng(seed)
    return QuadraticBlock(
        weights=rng.normal(size=n) * scale,
        factor=rng.normal(size=(rows, n)) / np.sqrt(rows),
        damping=damping,
        gradient=rng.normal(size=n) if gradient else None,
        name=f"random-{seed}",
    )


def random_problem(
    seed: int, sizes: tuple[int, ...], n_prune: int, objective: str = "selection", gradient: bool = False
) -> SelectionProblem:
    """A random problem with one block per size."""
    blocks = [random_block(seed + i, n, max(2, n // 2), gradient=gradient) for i, n in enumerate(sizes)]
    return SelectionProblem(blocks, n_prune, objective)
