"""The kept system of a diagonal curvature: nothing interacts, so v, N, ρ and σ never change."""

from __future__ import annotations

import torch

from solvers.block import QuadraticBlock
from solvers.joint.kept.base import KeptSystem
from solvers.moves.reduced import ReducedProblem


class DiagonalKeptSystem(KeptSystem):
    """v_i = w_i − g_i/h_i, N_ii = 1/h_i, ρ_j = h_j v_j, σ_j = h_j."""

    def __init__(self, block: QuadraticBlock, kept: torch.Tensor) -> None:
        self.block, self.kept = block, kept.clone()
        self.n_kept = int(kept.sum())
        self._centre = block.weights if block.gradient is None else block.weights - block.gradient / block.diagonal

    def change(self, removed: torch.Tensor | None = None, added: torch.Tensor | None = None) -> None:
        for index, value in ((removed, False), (added, True)):
            if index is not None:
                self.kept[index] = value
        self.n_kept = int(self.kept.sum())

    def solution(self) -> torch.Tensor:
        return torch.where(self.kept, self._centre, 0.0)

    def objective(self) -> float:
        return self.block.change(self.solution() - self.block.weights)

    def scores(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, kept = self.block.diagonal[index], self.kept[index]
        return torch.where(kept, self._centre[index], h * self._centre[index]), torch.where(kept, 1.0 / h, h)

    def cross(self, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        return torch.zeros((inside.numel(), outside.numel()), dtype=self.dtype, device=self.kept.device)

    def reduced(self, pool: torch.Tensor) -> ReducedProblem:
        h = self.block.diagonal[pool]
        return ReducedProblem(torch.diag(h), h * self._centre[pool])
