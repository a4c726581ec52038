"""The kept system of a low-rank curvature, in row space.

With S the kept weights, K_S = λI + A_SA_Sᵀ (r × r), y = Aw, and u = w − g/λ the centre of the damping term,
the joint objective of a mask is a ridge regression of y centred at u, so that with

    z = K_S⁻¹(y − A_S u_S) ,     t_j = u_j + a_jᵀz ,     q_j = a_jᵀK_S⁻¹a_j      for *every* weight j

the quantities of `solvers.joint.kept.base` are

    i in S:  v_i = t_i ,  N_ii = (1 − q_i)/λ      j in P:  ρ_j = λ t_j ,  σ_j = λ(1 + q_j)      T_ij = a_iᵀK_S⁻¹a_j

    H̃ = λ(I + A_QᵀK_R⁻¹A_Q) ,      c̃ = λ(u_Q + A_QᵀK_R⁻¹(y − A_R u_R)) .

Source: Woodbury's identity.
"""

from __future__ import annotations

import math

import torch

from solvers.block import QuadraticBlock
from solvers.curvature.factor_products import CHUNK_ENTRIES
from solvers.joint.kept.base import KeptSystem
from solvers.linalg import cholesky, lower_gram, named
from solvers.moves.reduced import ReducedProblem

#: Smallest λ relative to the scale of AAᵀ for which float32 products still rank saliencies.
_SINGLE_PRECISION_FLOOR = 3e-7


class LowRankKeptSystem(KeptSystem):
    """K_S, z, t and q of one block while its mask changes.

    K_S is float64 and updated by the columns that come or go; it is built afresh whenever the kept set has halved
    since it last was, which bounds the cancellation. Products with A run in float32 where the factor is float32
    and λ is large enough for that to leave the ranking alone, else in float64; t is always float64.

    Parameters
    ----------
    block : QuadraticBlock
        With damping > 0.
    kept : bool tensor (n,)
    """

    def __init__(self, block: QuadraticBlock, kept: torch.Tensor) -> None:
        self.block, self.curvature, self.damping = block, block.low_rank, block.damping
        self.kept = kept.clone()
        self.centre = block.weights.clone()
        if block.gradient is not None:
            self.centre -= block.gradient / self.damping
        # The largest eigenvalue of AAᵀ lies between its mean row and its trace.
        largest = float(block.diagonal.sum()) / math.sqrt(self.curvature.rank)
        single = block.factor.dtype == torch.float32 and self.damping >= _SINGLE_PRECISION_FLOOR * largest
        self.dtype = torch.float32 if single else torch.float64
        self._rebuild()

    def _rebuild(self) -> None:
        """K_S without λ (its lower triangle is what counts), and y − A_S u_S, from the kept columns."""
        index = self.kept.nonzero().squeeze(1)
        self.n_kept = self._n_fresh = int(index.numel())
        block = self.block
        if "gram" in self.curvature.__dict__ and 2 * self.n_kept > block.n:
            self._gram = self.curvature.gram - self._gram_of((~self.kept).nonzero().squeeze(1))
        else:
            self._gram = self._gram_of(index)
        self._right = self.curvature.project(block.weights - torch.where(self.kept, self.centre, 0.0))
        self._factorised = False

    def _gram_of(self, index: torch.Tensor) -> torch.Tensor:
        """Lower triangle of A_Q A_Qᵀ in float64, products in the working precision over few columns at a time."""
        rows = self.curvature.rank
        total = torch.zeros((rows, rows), dtype=torch.float64, device=self.block.device)
        for part in torch.split(index, max(1, min(4096, CHUNK_ENTRIES // rows))):
            total += lower_gram(self.block.factor.index_select(1, part).to(self.dtype), panel=256)
        return total

    def change(self, removed: torch.Tensor | None = None, added: torch.Tensor | None = None) -> None:
        """Take weights (positions) out of S and put others in."""
        moves = [
            (index, sign) for index, sign in ((removed, -1), (added, 1)) if index is not None and index.numel() > 0
        ]
        for index, sign in moves:
            self.kept[index] = sign > 0
            self.n_kept += sign * int(index.numel())
        if 2 * self.n_kept <= self._n_fresh or self.n_kept >= 2 * self._n_fresh:
            self._rebuild()
            return
        for index, sign in moves:
            self._gram.add_(self._gram_of(index), alpha=sign)
            self._right -= sign * (self._columns(index) @ self.centre[index])
        self._factorised = False

    def factorise(self) -> None:
        """Cholesky factor of K_S and z; raises SingularHessianError."""
        if self._factorised:
            return
        kernel = self._gram.clone()
        kernel.diagonal().add_(self.damping)
        with named(self.block.name):
            self._factor = cholesky(kernel, "λI + A_S A_Sᵀ")
        self._dual = torch.cholesky_solve(self._right.unsqueeze(1), self._factor).squeeze(1)
        self._factorised = True

    def _measure(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, q) of the weights `index` (m,), float64 (m,) each."""
        self.factorise()
        factor = self._factor.to(self.dtype)
        values, shrinks = [], []
        for part in torch.split(index, max(1, CHUNK_ENTRIES // self.curvature.rank)):
            columns = self._gather(part)
            values.append(self.centre[part] + columns.double().T @ self._dual)
            half = torch.linalg.solve_triangular(factor, columns.to(self.dtype), upper=False)
            shrinks.append(half.square_().sum(0).double())
        if not values:
            empty = torch.zeros(0, dtype=torch.float64, device=self.block.device)
            return empty, empty
        return torch.cat(values), torch.cat(shrinks)

    def _columns(self, index: torch.Tensor) -> torch.Tensor:
        """A of some weights in float64."""
        return self.curvature.factor_columns(index).double()

    def _gather(self, index: torch.Tensor) -> torch.Tensor:
        if index.numel() == self.block.n:
            return self.block.factor
        return self.block.factor.index_select(1, index)

    def scores(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, shrink = self._measure(index)
        kept = self.kept[index]
        # λN_ii = 1 − q_i is at least λ/H_ii; rounding must not push it below.
        least = self.damping / self.block.diagonal[index]
        spread = torch.where(kept, torch.maximum(1.0 - shrink, least) / self.damping, self.damping * (1.0 + shrink))
        return torch.where(kept, value, self.damping * value), spread

    def objective(self) -> float:
        """The joint objective of the mask: ½ λ (y − A_S u_S)ᵀz + ½ λ|u_P|² − |g|²/(2λ)."""
        self.factorise()
        value = self._right @ self._dual + torch.where(self.kept, 0.0, self.centre).square().sum()
        if self.block.gradient is not None:
            value = value - (self.block.gradient / self.damping).square().sum()
        return 0.5 * self.damping * float(value)

    def solution(self) -> torch.Tensor:
        """v, float64 (n,), zero where pruned."""
        self.factorise()
        return torch.where(self.kept, self.centre + self.curvature.back_project(self._dual), 0.0)

    def cross(self, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        self.factorise()
        right = torch.cholesky_solve(self._columns(outside), self._factor).to(self.dtype)
        parts = [
            self._gather(part).to(self.dtype).T @ right
            for part in torch.split(inside, max(1, CHUNK_ENTRIES // self.curvature.rank))
        ]
        return torch.cat(parts) if parts else right.new_zeros((0, right.shape[1]))

    def reduced(self, pool: torch.Tensor) -> ReducedProblem:
        """The joint problem over the weights `pool` (m,), all other kept weights being re-optimised."""
        columns = self._columns(pool)
        inside = self.kept[pool]
        own = columns[:, inside]
        kernel = torch.addmm(self._gram, own, own.T, alpha=-1.0)
        kernel.diagonal().add_(self.damping)
        with named(self.block.name):
            factor = cholesky(kernel, "λI + A_R A_Rᵀ")
        right = self._right + own @ self.centre[pool][inside]
        half = torch.linalg.solve_triangular(factor, columns, upper=False)
        whitened = torch.linalg.solve_triangular(factor, right.unsqueeze(1), upper=False).squeeze(1)
        hessian = half.T @ half
        hessian.diagonal().add_(1.0)
        linear = self.centre[pool] + half.T @ whitened
        return ReducedProblem(hessian.mul_(self.damping), linear.mul_(self.damping))
