"""The kept system of a curvature that is a matrix: a Cholesky factor of H_SS, made anew when the mask has changed.

The formulas are those of `solvers.joint.kept.base`.
"""

from __future__ import annotations

import torch

from solvers.block import QuadraticBlock
from solvers.joint.kept.base import KeptSystem
from solvers.linalg import cholesky, cholesky_solve, named
from solvers.moves.reduced import ReducedProblem


class DenseKeptSystem(KeptSystem):
    """H_SS = L Lᵀ, v and N from L."""

    def __init__(self, block: QuadraticBlock, kept: torch.Tensor) -> None:
        self.block, self.kept = block, kept.clone()
        self.n_kept = int(kept.sum())
        self._hessian = block.curvature.dense()
        self._linear = block.multiply(block.weights)
        if block.gradient is not None:
            self._linear = self._linear - block.gradient
        self._ready = False

    def change(self, removed: torch.Tensor | None = None, added: torch.Tensor | None = None) -> None:
        for index, value in ((removed, False), (added, True)):
            if index is not None:
                self.kept[index] = value
        self.n_kept, self._ready = int(self.kept.sum()), False

    def _factorise(self) -> None:
        if self._ready:
            return
        self._index = self.kept.nonzero().squeeze(1)
        with named(self.block.name):
            self._factor = cholesky(self._hessian[self._index][:, self._index], f"H of {self.n_kept} kept weights")
        self._value = cholesky_solve(self._factor, self._linear[self._index])
        self._ready = True

    def solution(self) -> torch.Tensor:
        self._factorise()
        out = torch.zeros_like(self._linear)
        out[self._index] = self._value
        return out

    def objective(self) -> float:
        return self.block.change(self.solution() - self.block.weights)

    def scores(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._factorise()
        value = self.solution() + torch.where(self.kept, 0.0, self._linear - self._hessian @ self.solution())
        spread = torch.empty_like(value)
        spread[self._index] = torch.cholesky_inverse(self._factor).diagonal()
        outside = (~self.kept).nonzero().squeeze(1)
        half = torch.linalg.solve_triangular(self._factor, self._hessian[self._index][:, outside], upper=False)
        spread[outside] = self._hessian.diagonal()[outside] - half.square().sum(0)
        # H_jj − H_jS N H_Sj is at least the damping.
        least = 1.0 / self._hessian.diagonal()
        spread = torch.where(self.kept, torch.maximum(spread, least), spread.clamp_min(self.block.damping))
        return value[index], spread[index]

    def cross(self, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        self._factorise()
        place = torch.searchsorted(self._index, inside)
        return cholesky_solve(self._factor, self._hessian[self._index][:, outside])[place]

    def reduced(self, pool: torch.Tensor) -> ReducedProblem:
        rest = self.kept.clone()
        rest[pool] = False
        others = rest.nonzero().squeeze(1)
        hessian, linear = self._hessian[pool][:, pool], self._linear[pool]
        if others.numel() == 0:
            return ReducedProblem(hessian, linear)
        with named(self.block.name):
            factor = cholesky(self._hessian[others][:, others], f"H of {others.numel()} kept weights")
        half = torch.linalg.solve_triangular(factor, self._hessian[others][:, pool], upper=False)
        whitened = torch.linalg.solve_triangular(factor, self._linear[others].unsqueeze(1), upper=False)
        return ReducedProblem(hessian - half.T @ half, linear - (half.T @ whitened).squeeze(1))
