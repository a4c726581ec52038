"""The kept system of a block, one file per kind of curvature behind one interface (`solvers.joint.kept.base`)."""

from __future__ import annotations

import torch

from solvers.block import QuadraticBlock
from solvers.curvature import Dense, Diagonal, Kronecker, LowRank
from solvers.joint.kept.base import KeptSystem
from solvers.joint.kept.dense import DenseKeptSystem
from solvers.joint.kept.diagonal import DiagonalKeptSystem
from solvers.joint.kept.low_rank import LowRankKeptSystem
from solvers.moves.reduced import ReducedProblem

__all__ = ["KEPT_SYSTEMS", "KeptSystem", "dense_problem", "kept_system"]

#: Kinds of curvature whose components have a kept system.
KEPT_SYSTEMS = (LowRank, Dense, Diagonal, Kronecker)


def kept_system(block: QuadraticBlock, kept: torch.Tensor) -> KeptSystem:
    """The kept system of a block as `search_blocks` gives them; `kept` is a bool mask (n,)."""
    if isinstance(block.curvature, LowRank):
        return LowRankKeptSystem(block, kept)
    return DiagonalKeptSystem(block, kept) if isinstance(block.curvature, Diagonal) else DenseKeptSystem(block, kept)


def dense_problem(block: QuadraticBlock, index: torch.Tensor) -> ReducedProblem:
    """The joint problem over the weights `index` (m,) alone, all others pruned: H_QQ and c_Q, c = Hw − g."""
    linear = block.multiply(block.weights)[index]
    if block.gradient is not None:
        linear = linear - block.gradient[index]
    return ReducedProblem(block.curvature.submatrix(index, index), linear)
