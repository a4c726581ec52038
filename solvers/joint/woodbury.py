"""The kept system of one block in row space: everything the joint solvers need to know about a mask.

With S the kept weights, K_S = λI + A_SA_Sᵀ (r × r), y = Aw, and u = w − g/λ the centre of the damping term,
the joint objective of a mask is a ridge regression of y centred at u, so that with

    z = K_S⁻¹(y − A_S u_S) ,     t_j = u_j + a_jᵀz ,     q_j = a_jᵀK_S⁻¹a_j      for *every* weight j

one has, for weights that are kept and weights that are not,

    i in S:  v_i = t_i ,  [H_SS⁻¹]_ii = (1 − q_i)/λ ,   removing i costs     ½ v_i²/[H_SS⁻¹]_ii = ½ λ t_i²/(1 − q_i)
    j in P:  ρ_j = λ t_j (minus the gradient of the model at v),  Schur complement λ(1 + q_j),
             and putting j back gains                                        ½ ρ_j²/(λ(1 + q_j)) = ½ λ t_j²/(1 + q_j)

For a small pool Q of weights, the others in S being re-optimised without being named (R = S minus Q), the joint
problem over the pool is again a dense one, exactly:

    H̃ = λ(I + A_QᵀK_R⁻¹A_Q) ,      c̃ = λ(u_Q + A_QᵀK_R⁻¹(y − A_R u_R)) ,      minimise ½ vᵀH̃v − c̃ᵀv .

Source: Woodbury's identity; the saliency is that of Hassibi and Stork (Optimal Brain Surgeon, 1993).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from solvers import linalg
from solvers.errors import SingularHessianError
from solvers.problem import QuadraticBlock

#: Smallest λ relative to the scale of AAᵀ for which float32 products still rank saliencies.
_SINGLE_PRECISION_FLOOR = 3e-7
#: Damping put in place of none (relative to the mean of H_ii) where H is singular; always reported.
_REPAIR = 1e-9


@dataclass(frozen=True)
class ReducedProblem:
    """The joint problem over a pool of weights: minimise ½ vᵀH̃v − c̃ᵀv (float64; (q, q) and (q,))."""

    hessian: torch.Tensor
    linear: torch.Tensor


def effective_damping(block: QuadraticBlock) -> tuple[float, str]:
    """(λ as used, repair or ""): a tiny damping where there is none to speak of and H may be singular.

    The framework judges the mask with the damping as given; only the search uses the repaired one. Raises
    SingularHessianError where factor and damping are all zero.
    """
    floor = _REPAIR * float(block.diagonal.mean())
    if block.damping >= floor > 0.0:
        return block.damping, ""
    if floor <= 0.0:
        raise SingularHessianError(
            f"block {block.name!r}: the factor and the damping are all zero, so no weight matters more than another; "
            "pass a damping > 0 or another factor"
        )
    return floor, (
        f"block {block.name!r}: damping {block.damping:g} with {block.n_rows} rows for {block.n} weights does not "
        f"keep H from being singular; the search used {floor:.3g}"
    )


def dense_problem(block: QuadraticBlock, index: torch.Tensor, damping: float) -> ReducedProblem:
    """The joint problem over the weights `index` (m,) alone, all others pruned: H_QQ and c_Q, c = Hw − g."""
    columns = block.columns(index)
    hessian = columns.T @ columns
    hessian.diagonal().add_(damping)
    linear = columns.T @ block.project(block.weights) + damping * block.weights[index]
    if block.gradient is not None:
        linear = linear - block.gradient[index]
    return ReducedProblem(hessian, linear)


class KeptSystem:
    """K_S, z, t and q of one block while its mask changes.

    K_S is float64 and updated by the columns that come or go; it is built afresh whenever the kept set has halved
    since it last was, which bounds the cancellation. Products with A run in float32 where the factor is float32
    and λ is large enough for that to leave the ranking alone, else in float64; t is always float64.

    Parameters
    ----------
    block : QuadraticBlock
    kept : bool tensor (n,)
    damping : float > 0
        See `effective_damping`.
    """

    def __init__(self, block: QuadraticBlock, kept: torch.Tensor, damping: float) -> None:
        self.block, self.damping = block, damping
        self.kept = kept.clone()
        self.centre = block.weights.clone()
        if block.gradient is not None:
            self.centre -= block.gradient / damping
        # The largest eigenvalue of AAᵀ lies between its mean row and its trace.
        largest = float(block.diagonal.sum()) / math.sqrt(block.n_rows)
        single = block.factor.dtype == torch.float32 and damping >= _SINGLE_PRECISION_FLOOR * largest
        self.dtype = torch.float32 if single else torch.float64
        self._rebuild()

    @property
    def n_kept(self) -> int:
        """|S|."""
        return self._n_kept

    def _rebuild(self) -> None:
        """K_S without λ (its lower triangle is what counts), and y − A_S u_S, from the kept columns."""
        index = self.kept.nonzero().squeeze(1)
        self._n_kept = self._n_fresh = int(index.numel())
        block = self.block
        if "gram" in block.__dict__ and 2 * self._n_kept > block.n:
            self._gram = block.gram - self._gram_of((~self.kept).nonzero().squeeze(1))
        else:
            self._gram = self._gram_of(index)
        self._right = block.project(block.weights - torch.where(self.kept, self.centre, 0.0))
        self._factorised = False

    def _gram_of(self, index: torch.Tensor) -> torch.Tensor:
        """Lower triangle of A_Q A_Qᵀ in float64, products in the working precision over few columns at a time."""
        rows = self.block.n_rows
        total = torch.zeros((rows, rows), dtype=torch.float64, device=self.block.device)
        for part in torch.split(index, max(1, min(4096, linalg.CHUNK_ENTRIES // rows))):
            total += linalg.lower_gram(self.block.factor.index_select(1, part).to(self.dtype), panel=256)
        return total

    def change(self, removed: torch.Tensor | None = None, added: torch.Tensor | None = None) -> None:
        """Take weights (positions) out of S and put others in."""
        moves = [
            (index, sign) for index, sign in ((removed, -1), (added, 1)) if index is not None and index.numel() > 0
        ]
        for index, sign in moves:
            self.kept[index] = sign > 0
            self._n_kept += sign * int(index.numel())
        if 2 * self._n_kept <= self._n_fresh or self._n_kept >= 2 * self._n_fresh:
            self._rebuild()
            return
        for index, sign in moves:
            self._gram.add_(self._gram_of(index), alpha=sign)
            self._right -= sign * (self.block.columns(index) @ self.centre[index])
        self._factorised = False

    def factorise(self) -> None:
        """Cholesky factor of K_S and z; raises SingularHessianError."""
        if self._factorised:
            return
        kernel = self._gram.clone()
        kernel.diagonal().add_(self.damping)
        self._factor = linalg.cholesky(kernel, f"block {self.block.name!r}: λI + A_S A_Sᵀ")
        self._dual = torch.cholesky_solve(self._right.unsqueeze(1), self._factor).squeeze(1)
        self._factorised = True

    def measure(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, q) of the weights `index` (m,), float64 (m,) each."""
        self.factorise()
        factor = self._factor.to(self.dtype)
        values, shrinks = [], []
        for part in torch.split(index, max(1, linalg.CHUNK_ENTRIES // self.block.n_rows)):
            columns = self._gather(part)
            values.append(self.centre[part] + columns.double().T @ self._dual)
            half = torch.linalg.solve_triangular(factor, columns.to(self.dtype), upper=False)
            shrinks.append(half.square_().sum(0).double())
        if not values:
            empty = torch.zeros(0, dtype=torch.float64, device=self.block.device)
            return empty, empty
        return torch.cat(values), torch.cat(shrinks)

    def _gather(self, index: torch.Tensor) -> torch.Tensor:
        if index.numel() == self.block.n:
            return self.block.factor
        return self.block.factor.index_select(1, index)

    def removal_costs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions of S, cost of removing each alone), (s,) each."""
        index = self.kept.nonzero().squeeze(1)
        return index, self.costs(index, *self.measure(index))

    def costs(self, index: torch.Tensor, value: torch.Tensor, shrink: torch.Tensor) -> torch.Tensor:
        """½ λ t²/(1 − q), the cost of removing each of `index` (m,) alone, from their t and q."""
        # λ[H_SS⁻¹]_ii = 1 − q_i is at least λ/H_ii; rounding must not push it below.
        floor = self.damping / (self.block.diagonal[index] - self.block.damping + self.damping)
        return 0.5 * self.damping * value.square() / torch.maximum(1.0 - shrink, floor)

    def insertion_gains(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions of P, what putting each back alone gains), (n − s,) each."""
        index = (~self.kept).nonzero().squeeze(1)
        value, shrink = self.measure(index)
        return index, 0.5 * self.damping * value.square() / (1.0 + shrink)

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
        return torch.where(self.kept, self.centre + self.block.back_project(self._dual), 0.0)

    def cross(self, index: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """a_iᵀK_S⁻¹a_j for i in `index` (m,) and j in `others` (k,): (m, k) in the working precision."""
        self.factorise()
        right = torch.cholesky_solve(self.block.columns(others), self._factor).to(self.dtype)
        parts = [
            self._gather(part).to(self.dtype).T @ right
            for part in torch.split(index, max(1, linalg.CHUNK_ENTRIES // self.block.n_rows))
        ]
        return torch.cat(parts) if parts else right.new_zeros((0, right.shape[1]))

    def reduced(self, pool: torch.Tensor) -> ReducedProblem:
        """The joint problem over the weights `pool` (m,), all other kept weights being re-optimised."""
        columns = self.block.columns(pool)
        inside = self.kept[pool]
        own = columns[:, inside]
        kernel = torch.addmm(self._gram, own, own.T, alpha=-1.0)
        kernel.diagonal().add_(self.damping)
        factor = linalg.cholesky(kernel, f"block {self.block.name!r}: λI + A_R A_Rᵀ")
        right = self._right + own @ self.centre[pool][inside]
        half = torch.linalg.solve_triangular(factor, columns, upper=False)
        whitened = torch.linalg.solve_triangular(factor, right.unsqueeze(1), upper=False).squeeze(1)
        hessian = half.T @ half
        hessian.diagonal().add_(1.0)
        linear = self.centre[pool] + half.T @ whitened
        return ReducedProblem(hessian.mul_(self.damping), linear.mul_(self.damping))
