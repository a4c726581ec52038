"""Small random problems that are nasty on purpose, reproducible from a seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from solvers.block import QuadraticBlock
from solvers.curvature import Curvature, Dense, Diagonal, Kronecker, LowRank
from solvers.problem import Objective, SelectionProblem

#: What a random problem may be afflicted with; `random_problem` combines up to two.
KINDS = (
    "plain",
    "ties",
    "duplicate_columns",
    "opposite_columns",
    "zero_weights",
    "zero_columns",
    "rank_one",
    "heavy_tailed",
    "huge",
    "tiny",
    "undamped",
)


#: Kinds of curvature that `with_curvature` makes.
CURVATURES: tuple[type[Curvature], ...] = (LowRank, Dense, Diagonal, Kronecker)


def with_curvature(problem: SelectionProblem, kind: type[Curvature]) -> SelectionProblem:
    """A problem of like weights and scale whose blocks have another kind of curvature.

    A Kronecker block takes its input moment from the first weights of the block, and as many rows as there is room for;
    weights that are left over go, so that it may be a little smaller.
    """
    blocks = []
    for block in problem.blocks:
        hessian, n = block.curvature.dense(), block.n
        curvature: Curvature = block.curvature
        if kind is Dense:
            curvature = Dense(hessian)
        elif kind is Diagonal:
            curvature = Diagonal(hessian.diagonal())
        elif kind is Kronecker:
            rows = 2 if n >= 4 else 1
            inputs = n // rows
            n = rows * inputs
            moment = hessian[:inputs, :inputs] - block.damping * torch.eye(inputs, dtype=torch.float64)
            curvature = Kronecker(torch.linspace(1.0, 2.0, rows), moment, block.damping)
        gradient = None if block.gradient is None else block.gradient[:n]
        blocks.append(QuadraticBlock(block.weights[:n], curvature=curvature, gradient=gradient, name=block.name))
    n = sum(block.n for block in blocks)
    return SelectionProblem(blocks, min(problem.n_prune, n - 1) if n > 1 else 0, problem.objective)


def random_problem(
    seed: int,
    objective: Objective | str = Objective.SELECTION,
    *,
    n: int | None = None,
    linear: bool | None = None,
    n_blocks: int = 1,
    kinds: tuple[str, ...] | None = None,
    largest: int = 14,
) -> SelectionProblem:
    """A random problem with 0 < n_prune < n.

    Parameters
    ----------
    seed : int
        The same seed and arguments give the same problem.
    objective : {"selection", "joint"}
    n : int, optional
        Number of weights; drawn from 2 … `largest` by default.
    linear : bool, optional
        Whether there is a gradient; drawn by default. With a joint objective and no damping there is none, so that
        the objective is bounded below.
    n_blocks : int
    kinds : tuple of names in `KINDS`, optional
        Drawn by default.
    largest : int
        Largest n drawn.
    """
    rng = np.random.default_rng([seed, n_blocks, 0 if Objective.parse(objective) is Objective.SELECTION else 1])
    size = int(rng.integers(max(2, n_blocks), largest + 1)) if n is None else n
    chosen = tuple(rng.choice(KINDS, size=int(rng.integers(1, 3)), replace=False)) if kinds is None else kinds
    with_gradient = bool(rng.random() < 0.35) if linear is None else linear
    ends = np.linspace(0, size, n_blocks + 1).round().astype(int)
    blocks = [
        _block(rng, int(stop - start), chosen, with_gradient, Objective.parse(objective), f"{seed}-{index}")
        for index, (start, stop) in enumerate(pairwise(ends))
    ]
    return SelectionProblem(blocks, int(rng.integers(1, size)) if size > 1 else 0, objective)


def _block(
    rng: np.random.Generator, n: int, kinds: tuple[str, ...], linear: bool, objective: Objective, name: str
) -> QuadraticBlock:
    rows = int(rng.integers(1, 2 * n + 2))
    factor = rng.standard_normal((rows, n)) / np.sqrt(rows)
    weights = rng.standard_normal(n)
    damping = float(10.0 ** rng.uniform(-5, -1))
    unit = 1.0
    if "ties" in kinds:
        factor = rng.integers(-1, 2, (rows, n)).astype(np.float64)
        weights = rng.choice([-1.0, 1.0], n)
    if "rank_one" in kinds:
        factor = rng.standard_normal((1, n)) if "ties" not in kinds else np.ones((1, n))
    if "heavy_tailed" in kinds:
        factor = factor * np.exp(1.5 * rng.standard_normal(n))
        weights = weights * np.exp(rng.standard_normal(n))
    if n > 1 and "duplicate_columns" in kinds:
        source, target = rng.choice(n, 2, replace=False)
        factor[:, target], weights[target] = factor[:, source], weights[source]
    if n > 1 and "opposite_columns" in kinds:
        source, target = rng.choice(n, 2, replace=False)
        factor[:, target] = -factor[:, source]
        weights[target] = weights[source]
    if "zero_weights" in kinds:
        weights[rng.random(n) < 0.4] = 0.0
    if "zero_columns" in kinds:
        factor[:, rng.random(n) < 0.3] = 0.0
    if "undamped" in kinds:
        damping = 0.0
    if "huge" in kinds:
        unit = 1e5
    if "tiny" in kinds:
        unit = 1e-5 if "huge" not in kinds else 1.0
    gradient = None
    if linear and not (objective is Objective.JOINT and damping == 0.0):
        # Of the size of H w, so that neither term drowns the other.
        gradient = 0.3 * rng.standard_normal(n) * float(np.sqrt((factor**2).sum() / n * max(np.mean(weights**2), 1e-6)))
        gradient = gradient * unit**2
    return QuadraticBlock(
        torch.from_numpy(weights),
        torch.from_numpy(factor * unit),
        damping * unit**2,
        None if gradient is None else torch.from_numpy(gradient),
        name,
    )
