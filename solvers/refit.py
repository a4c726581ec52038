"""CBS-U: the best values of the kept weights for a fixed mask, and the joint objective they attain.

With P the removed and S the kept weights, minimising gᵀd + ½ dᵀHd over d_S gives

    H_SS d_S = H_SP w_P − g_S ,

and with g = 0 equally d = −H⁻¹E_P [(H⁻¹)_PP]⁻¹ w_P (Yu et al., ICML 2022, eq. 8). How the system is solved is the
curvature's business (`solvers.curvature.restricted`), which also keeps what can be shared by several masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from solvers.arrays import Array, Mask
from solvers.block import QuadraticBlock
from solvers.curvature.restricted import Restricted, Solved
from solvers.errors import ProblemError
from solvers.linalg import named

#: Right-hand sides below have squares that float64 does not hold, and below the second too few digits.
_SMALL, _LOST = 1e-140, 1e-290


class Blocks(Protocol):
    """What is refitted: a problem, whatever its objective and budget."""

    @property
    def blocks(self) -> tuple[QuadraticBlock, ...]:
        """H is block-diagonal over them."""
        ...

    @property
    def slices(self) -> Sequence[slice]:
        """The range of each in the common numbering."""
        ...

    @property
    def n(self) -> int:
        """Weights in all."""
        ...


@dataclass(frozen=True, eq=False)
class Refit:
    """The combinatorial update of a mask.

    Attributes
    ----------
    weights : numpy float64 (n,)
        v, zero where pruned.
    value : float
        gᵀ(v − w) + ½ (v − w)ᵀH(v − w); −inf where it is unbounded below (λ = 0 and g outside the range of H).
    methods : tuple of str
        How each block was solved.
    residual : float
        Largest ‖H_SS d_S − b‖ / ‖b‖ over the blocks.
    repairs : tuple of str
        Numerical repairs, e.g. a minimum-norm solution where H_SS is singular; empty if none was needed.
    """

    weights: Array
    value: float
    methods: tuple[str, ...]
    residual: float
    repairs: tuple[str, ...] = ()


def refit(problem: Blocks, pruned: Mask) -> Refit:
    """CBS-U for a mask that may remove any number of weights.

    Parameters
    ----------
    problem : SelectionProblem
        Its objective and budget play no role.
    pruned : numpy bool (n,)

    Raises
    ------
    ProblemError
        If the mask does not fit.
    """
    if pruned.shape != (problem.n,) or pruned.dtype != np.bool_:
        raise ProblemError(f"the mask must be bool of shape ({problem.n},), not {pruned.dtype} {pruned.shape}")
    weights = np.empty(problem.n)
    value, residual = 0.0, 0.0
    methods: list[str] = []
    repairs: list[str] = []
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        mask = block.tensor_of(pruned[where])
        removed = torch.where(mask, block.weights, 0.0)
        right = block.multiply(removed)
        if block.gradient is not None:
            right = right - block.gradient
        with named(block.name):
            part = block.curvature.restrict(~mask)
            # H_SP w_P: what lies on the diagonal plays no role, as S and P are disjoint.
            solved = _solve(part, right[part.kept])
        new = torch.where(mask, 0.0, block.weights)
        if solved.x is None:
            value = -math.inf
        else:
            step = -removed
            step[part.kept] = solved.x
            value += block.change(step)
            new[part.kept] += solved.x
        weights[where] = new.cpu().numpy()
        methods.append(solved.method)
        residual = max(residual, solved.residual)
        if solved.repair:
            repairs.append(f"block {block.name!r}: {solved.repair}")
    return Refit(weights, value, tuple(methods), residual, tuple(repairs))


def _solve(part: Restricted, right: torch.Tensor) -> Solved:
    """H_SS x = right, also where ‖right‖ underflows; dividing by a power of two is exact."""
    size = float(right.abs().max()) if right.numel() else 0.0
    if not 0.0 < size < _SMALL:
        return part.solve(right)
    if size < _LOST:
        return Solved(
            torch.zeros_like(right), "none", 1.0, "what the refit makes good lies below what float64 resolves"
        )
    unit = 2.0 ** math.floor(math.log2(size))
    solved = part.solve(right / unit)
    return solved if solved.x is None else replace(solved, x=solved.x * unit)
