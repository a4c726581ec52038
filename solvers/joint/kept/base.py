"""The kept system of a block: everything the joint solvers need to know about a mask, whatever the curvature.

With S the kept weights, N = H_SS⁻¹, c = Hw − g and v = N c_S the refit,

    i in S:  removing i alone costs          v_i² / (2 N_ii)
    j in P:  putting j back alone gains      ρ_j² / (2 σ_j) ,   ρ_j = c_j − H_jS v ,   σ_j = H_jj − H_jS N H_Sj
    swap     i out, j in, changes by         v_i²/(2 N_ii) − (ρ_j + T_ij v_i/N_ii)² / (2 (σ_j + T_ij²/N_ii)) ,
                                             T = N H_SP .

For a small pool Q of weights, the others in S being re-optimised without being named (R = S minus Q), the joint
problem over the pool is again a dense one, exactly:

    H̃ = H_QQ − H_QR H_RR⁻¹ H_RQ ,      c̃ = c_Q − H_QR H_RR⁻¹ c_R ,      minimise ½ vᵀH̃v − c̃ᵀv .

Source: Hassibi and Stork, *Optimal Brain Surgeon*, NeurIPS 1993; Miller, *Subset Selection in Regression*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from solvers.block import QuadraticBlock
from solvers.moves.reduced import ReducedProblem


class KeptSystem(ABC):
    """A mask of one block, its refit and its scores, while the mask changes.

    Attributes
    ----------
    block : QuadraticBlock
        With enough damping for every H_SS to be invertible, see `solvers.regularise`.
    kept : bool (n,)
    n_kept : int
    dtype : torch.dtype
        Precision of `cross`.
    """

    block: QuadraticBlock
    kept: torch.Tensor
    n_kept: int
    dtype: torch.dtype = torch.float64

    @abstractmethod
    def change(self, removed: torch.Tensor | None = None, added: torch.Tensor | None = None) -> None:
        """Take weights (positions) out of S and put others in."""

    @abstractmethod
    def solution(self) -> torch.Tensor:
        """v, float64 (n,), zero where pruned; raises SingularHessianError."""

    @abstractmethod
    def objective(self) -> float:
        """The joint objective of the mask."""

    @abstractmethod
    def scores(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the weights `index` (m,), float64 (m,) each: (v_i, N_ii) where kept, (ρ_j, σ_j) where pruned."""

    def removal_costs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions of S, what removing each alone costs), (s,) each."""
        index = self.kept.nonzero().squeeze(1)
        value, spread = self.scores(index)
        return index, 0.5 * value.square() / spread

    def insertion_gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions of P, what putting each back alone gains), (n − s,) each."""
        index = (~self.kept).nonzero().squeeze(1)
        residual, schur = self.scores(index)
        return index, 0.5 * residual.square() / schur

    @abstractmethod
    def cross(self, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        """T_ij for i of S in `inside` (m,) and j of P in `outside` (k,): (m, k) in `dtype`."""

    @abstractmethod
    def reduced(self, pool: torch.Tensor) -> ReducedProblem:
        """The joint problem over the weights `pool` (m,), all other kept weights being re-optimised."""
