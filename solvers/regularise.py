"""Just enough damping for every H_SS to have an inverse, and said."""

from __future__ import annotations

import torch

from solvers.block import QuadraticBlock
from solvers.curvature import Dense, Diagonal, Kronecker, LowRank
from solvers.errors import SingularHessianError
from solvers.linalg import relative_pivots
from solvers.problem import SelectionProblem

#: Damping put in place of none (relative to the mean of H_ii) where H is singular; always reported.
_REPAIR = 1e-9
#: A relative pivot below which a matrix counts as singular here: its inverse would be noise.
_PIVOT = 1e-12


def regularised(block: QuadraticBlock) -> tuple[QuadraticBlock, str]:
    """(the block with the damping the search uses, repair or ""): a tiny damping where H may be singular without.

    The framework judges the mask with the damping as given; only the search uses the repaired one.

    Raises
    ------
    SingularHessianError
        Where the whole curvature is zero.
    """
    curvature = block.curvature
    floor = _REPAIR * float(block.diagonal.mean())
    if floor <= 0.0:
        raise SingularHessianError(
            f"block {block.name!r}: the curvature and the damping are all zero, so no weight matters more than "
            "another; pass a damping > 0 or another curvature"
        )
    if block.damping >= floor or not _may_be_singular(block):
        return block, ""
    if isinstance(curvature, Kronecker):
        # λ is in units of the input moment.
        floor = _REPAIR * float(curvature.inputs.diagonal.mean())
    if isinstance(curvature, LowRank):
        why = f"with {curvature.rank} rows for {block.n} weights does not keep H from being singular"
    else:
        why = "leaves H singular"
    return block.with_damping(floor), (
        f"block {block.name!r}: damping {block.damping:g} {why}; the search used {floor:.3g}"
    )


def _may_be_singular(block: QuadraticBlock) -> bool:
    """Whether H itself is, to float64; a factor's Gram matrix is not looked at, too little damping is enough."""
    curvature = block.curvature
    if isinstance(curvature, Kronecker):
        return bool((curvature.row_scale == 0.0).any()) or _singular(curvature.inputs)
    if isinstance(curvature, Dense):
        return _singular(curvature)
    return not isinstance(curvature, Diagonal) or bool((curvature.diagonal == 0.0).any())


def _singular(curvature: Dense) -> bool:
    factor, info = torch.linalg.cholesky_ex(curvature.matrix)
    return int(info) != 0 or not bool((relative_pivots(factor, curvature.matrix) > _PIVOT).all())


def search_blocks(problem: SelectionProblem) -> tuple[list[QuadraticBlock], list[str]]:
    """(the problem's blocks, regularised, one per component in the same numbering; repairs)."""
    found: list[QuadraticBlock] = []
    repairs = []
    for given in problem.blocks:
        block, repair = regularised(given)
        repairs += [repair] if repair else []
        found.extend(block.split())
    return found, repairs
