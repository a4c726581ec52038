"""Backward elimination over all blocks of a problem under one budget: what `obs` and the staged pruning run.

Every block offers its next removals with their costs, and the cheapest over all blocks are taken. A block with
many kept weights (`_Large`) is ranked through its r × r kept system, anew in each round. Once a block is small
enough to hold H_SS it is eliminated one weight at a time down to nothing (`_Path`); blocks do not interact, so
its order does not depend on the others, and the greedy choice over blocks is a merge of the orders by the running
maximum of their costs.

Under a partition a block knows what its groups may still lose: weights of a group that has lost its share are passed
over. Blocks that share one of several groups are eliminated as one, if they are small.

In a round of a large block the weights first ranked are corrected for one another: the elimination is run one at
a time within the cheapest `pool` weights, all others being re-optimised exactly (`KeptSystem.reduced`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from solvers.arrays import Index
from solvers.block import QuadraticBlock
from solvers.budget import Partitioned, as_partition, places
from solvers.curvature import Dense, Diagonal
from solvers.errors import CapabilityError
from solvers.joint.kept import dense_problem, kept_system
from solvers.moves.elimination_path import eliminate_dense
from solvers.problem import Array, Mask, SelectionProblem
from solvers.regularise import search_blocks
from solvers.solution import Reason
from solvers.solver import Deadline

#: Seconds for the elimination of a block of s weights one at a time, over s³, on a slow core.
_SECONDS_OF_CUBE = 2.5e-10
#: Kept weights of a block whose elimination takes no time to speak of.
_QUICK = 300


@dataclass(frozen=True)
class EliminationPlan:
    """How finely to eliminate.

    Attributes
    ----------
    chunks : int
        Rounds, in geometric progression of the kept weights, until blocks are small enough for exact elimination.
    exact_below : int
        Blocks with at most this many kept weights are eliminated one weight at a time (memory 16·s² bytes).
    pool : int
        Weights per round among which interactions are corrected exactly; 0 for none. A round removes at most half
        of its pool one at a time; a larger share goes by its single costs first.
    refresh : float
        The diagonal of H_SS⁻¹, which changes slowly and costs most, is taken anew when a block has shrunk to this
        fraction of what it was when it last was; 1 for every round. The refit is made in every round.
    frozen_zeros : bool
        Weights that are zero already go first and are never put back (staged pruning). Otherwise they are as free
        as all others: the joint objective may well give them a value again.
    """

    chunks: int = 20
    exact_below: int = 3000
    pool: int = 2000
    refresh: float = 0.7
    frozen_zeros: bool = False


@dataclass(frozen=True)
class Elimination:
    """What was removed.

    Attributes
    ----------
    pruned : numpy bool (n,)
    reason : Reason
    repairs : tuple of str
    rounds : int
    order : int64 (n_prune,)
        The weights removed, round by round (within a round block by block).
    costs : tuple of float64 arrays, one per round
        What each of them costs: exactly and in order where weights went one at a time, alone otherwise.
    exact : tuple of bool, one per round
        Whether all its weights went one at a time.
    """

    pruned: Mask
    reason: Reason
    repairs: tuple[str, ...]
    rounds: int
    order: npt.NDArray[np.int64]
    costs: tuple[Array, ...]
    exact: tuple[bool, ...]


class _Shares:
    """What the groups of a block may still lose: a view of `left`, which changes as weights go."""

    def __init__(self, partition: Partitioned, where: slice, left: Index) -> None:
        first, last = (int(partition.group_of[at]) for at in (where.start, where.stop - 1))
        self.group, self.left = partition.group_of[where] - first, left[first : last + 1]

    @property
    def total(self) -> int:
        """Weights that may still go."""
        return int(self.left.sum())

    def allowed(self, index: torch.Tensor) -> slice | torch.Tensor:
        """Which of an ordered list of weights go if they go in this order."""
        if self.left.size == 1:
            return slice(None)
        group = self.group[index.cpu().numpy()]
        return torch.from_numpy(places(group) < self.left[group]).to(index.device)

    def quotas(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """For `eliminate_dense`."""
        if self.left.size == 1:
            return None
        group = torch.from_numpy(self.group[index.cpu().numpy()]).to(index.device)
        return group, torch.from_numpy(self.left).to(index.device)


class _Path:
    """A block eliminated one weight at a time, beforehand; `level` is the running maximum of the costs."""

    def __init__(self, block: QuadraticBlock, kept: torch.Tensor, shares: _Shares) -> None:
        index = kept.nonzero().squeeze(1)
        count = min(shares.total, int(index.numel()))
        if isinstance(block.curvature, Diagonal):
            costs, order = kept_system(block, kept).removal_costs()[1].sort(stable=True)
            allowed = shares.allowed(index[order])
            order, costs = order[allowed][:count], costs[allowed][:count]
        else:
            problem = dense_problem(block, index)
            order, costs = eliminate_dense(problem, count, block.name, shares.quotas(index))
        self._order = index[order].cpu().numpy()
        self._spent = costs.cpu().numpy()
        self._level = costs.cummax(0).values.cpu().numpy() if count else costs.cpu().numpy()
        self._taken = 0
        self.n_kept = int(index.numel())

    def offer(self) -> npt.NDArray[Any]:
        """Costs of the removals to come, in order (non-decreasing)."""
        return self._level[self._taken :]

    def costs(self, count: int) -> Array:
        """What the next `count` removals add, in order."""
        return self._spent[self._taken : self._taken + count]

    def take(self, count: int) -> npt.NDArray[Any]:
        """Remove the first `count` of the last offer; their positions in the block."""
        taken = self._order[self._taken : self._taken + count]
        self._taken += count
        self.n_kept -= count
        return taken


class _Large:
    """A block ranked through its kept system."""

    def __init__(self, block: QuadraticBlock, kept: torch.Tensor, shares: _Shares, refresh: float) -> None:
        self.shares = shares
        self.system = kept_system(block, kept)
        self._spread = torch.zeros(block.n, dtype=torch.float64, device=block.device)
        self._refresh, self._measured = refresh, 0

    @property
    def n_kept(self) -> int:
        """|S|."""
        return self.system.n_kept

    def rank(self) -> npt.NDArray[Any]:
        """Cost of each kept weight alone, ascending."""
        system = self.system
        index = system.kept.nonzero().squeeze(1)
        if system.n_kept <= self._refresh * self._measured or not self._measured:
            _, self._spread[index] = system.scores(index)
            self._measured = system.n_kept
        costs = 0.5 * system.solution()[index].square() / self._spread[index]
        costs, order = costs.sort(stable=True)
        allowed = self.shares.allowed(index[order])
        self._costs, self._index = costs[allowed], index[order][allowed]
        return self._costs.cpu().numpy()

    def refine(self, count: int) -> npt.NDArray[Any]:
        """Costs, as a running maximum, of removing the `count` first ranked one at a time."""
        pool = self._index[:count]
        order, costs = eliminate_dense(self.system.reduced(pool), count, self.system.block.name)
        self._index = pool[order]
        self._costs = costs.cummax(0).values
        return self._costs.cpu().numpy()

    def costs(self, count: int) -> Array:
        """What the last offer's first `count` removals cost."""
        return np.asarray(self._costs[:count].cpu().numpy())

    def take(self, count: int) -> npt.NDArray[Any]:
        """Remove the first `count` of the last offer; their positions in the block."""
        taken = self._index[:count]
        self.system.change(removed=taken)
        return taken.cpu().numpy()


def _cheapest(offers: list[npt.NDArray[Any]], count: int) -> list[int]:
    """How many of each ascending offer are among the `count` cheapest of all (ties to the earlier block)."""
    values = np.concatenate(offers)
    owner = np.repeat(np.arange(len(offers)), [offer.size for offer in offers])
    chosen = owner[np.argsort(values, kind="stable")[:count]]
    return [int(c) for c in np.bincount(chosen, minlength=len(offers))]


def eliminate(problem: SelectionProblem, plan: EliminationPlan, deadline: Deadline | None = None) -> Elimination:
    """Remove exactly ``problem.n_prune`` weights by backward elimination with refit.

    Parameters
    ----------
    problem : SelectionProblem
        One or several blocks, with or without gradients; judged by the joint objective whatever its own is.
    plan : EliminationPlan
    deadline : Deadline, optional
        When it expires, the rest goes in one round by single costs. Blocks too large to be eliminated one weight at a
        time in what is left of it are so only once they are smaller.

    Returns
    -------
    Elimination

    Raises
    ------
    SingularHessianError
        If H cannot be factorised even so; the message has the remedy.
    """
    deadline = deadline or Deadline()
    most = int(min(plan.exact_below, max((deadline.remaining() / _SECONDS_OF_CUBE) ** (1.0 / 3.0), _QUICK)))
    pruned = np.zeros(problem.n, dtype=bool)
    partition = as_partition(problem.budget, problem.n)
    if plan.frozen_zeros:
        zeros = np.flatnonzero(problem.weights == 0.0)
        owner = partition.group_of[zeros]
        pruned[zeros[places(owner) < partition.quotas[owner]]] = True
    quotas = partition.quotas - np.add.reduceat(pruned, partition.starts[:-1], dtype=np.int64)
    left = int(quotas.sum())
    blocks, repairs = search_blocks(problem)
    offsets = np.cumsum([0, *(block.n for block in blocks)])
    if len(partition.sizes) > 1 and not np.isin(offsets, partition.starts).all():
        blocks, offsets = [_joined(blocks, plan.exact_below)], np.array([0, problem.n])
    members: list[_Path | _Large] = []
    for block, offset in zip(blocks, offsets[:-1], strict=True):
        kept = block.tensor_of(~pruned[offset : offset + block.n])
        small = int(kept.sum()) <= most or isinstance(block.curvature, Diagonal)
        shares = _Shares(partition, slice(offset, offset + block.n), quotas)
        members.append(_Path(block, kept, shares) if small else _Large(block, kept, shares, plan.refresh))
    start = problem.n - int(pruned.sum())
    floor = max(problem.n_kept, sum(min(member.n_kept, most) for member in members), 1)
    ratio = (floor / start) ** (1.0 / plan.chunks) if floor < start else 1.0
    coarse = any(isinstance(member, _Large) and member.n_kept <= plan.exact_below for member in members)
    rounds, reason = 0, Reason.TIME_LIMIT if coarse else Reason.COMPLETED
    order = [np.flatnonzero(pruned)]
    costs, exact = [np.zeros(order[0].size)] if order[0].size else [], [True] if order[0].size else []
    while left > 0:
        for index, member in enumerate(members):
            if isinstance(member, _Large) and member.n_kept <= most:
                members[index] = _Path(member.system.block, member.system.kept, member.shares)
        now = problem.n_kept + left
        share, pool = left, plan.pool
        if any(isinstance(member, _Large) for member in members):
            if deadline.expired():
                reason, pool = Reason.TIME_LIMIT, 0
            else:
                share = min(left, max(1, now - math.floor(now * ratio)))
        rounds += 1
        exact.append(all(isinstance(member, _Path) for member in members))
        taken, spent = _take_round(members, share, pool)
        costs.append(spent)
        for offset, part in zip(offsets[:-1], taken, strict=True):
            pruned[offset + part] = True
            quotas -= np.bincount(partition.group_of[offset + part], minlength=quotas.size)
            order.append(offset + part)
        left -= sum(part.size for part in taken)
    return Elimination(pruned, reason, tuple(repairs), rounds, np.concatenate(order), tuple(costs), tuple(exact))


def _joined(blocks: list[QuadraticBlock], most: int) -> QuadraticBlock:
    """One block of all, H dense; raises CapabilityError where that is more than `most` weights."""
    n = sum(block.n for block in blocks)
    if n > most:
        raise CapabilityError(
            f"backward elimination takes groups that reach over several of {len(blocks)} blocks or rows only up to "
            f"{most} weights, not {n}; give each block its own groups"
        )
    hessian = torch.block_diag(*[block.curvature.dense() for block in blocks])  # type: ignore[no-untyped-call]
    gradient = None
    if any(block.gradient is not None for block in blocks):
        gradient = torch.cat([torch.zeros_like(b.weights) if b.gradient is None else b.gradient for b in blocks])
    weights = torch.cat([block.weights for block in blocks])
    return QuadraticBlock(weights, curvature=Dense(hessian), gradient=gradient, name=blocks[0].name)


def elimination_costs(problem: SelectionProblem, plan: EliminationPlan) -> Array:
    """What each of ``problem.n_prune`` removals adds to the joint objective along the elimination, (n_prune,).

    Exact for each removal once weights go one at a time; in earlier rounds the costs of each alone are scaled to what
    the round really added.
    """
    result = eliminate(problem, plan)
    curve: list[Array] = []
    mask = np.zeros(problem.n, dtype=bool)
    value = problem.joint_value(mask)
    done = 0
    for costs, exact in zip(result.costs, result.exact, strict=True):
        mask[result.order[done : done + costs.size]] = True
        done += costs.size
        if not exact or (done < problem.n_prune):
            after = problem.joint_value(mask)
            total = float(costs.sum())
            scale = (after - value) / total if total > 0.0 else 1.0
            curve.append(costs if exact else costs * max(scale, 0.0))
            value = after
        else:
            curve.append(costs)
    return np.concatenate(curve) if curve else np.zeros(0)


def _take_round(members: list[_Path | _Large], share: int, pool: int) -> tuple[list[npt.NDArray[Any]], Array]:
    """Remove `share` weights over all blocks: positions removed in each, and their costs in that order."""
    offers = [m.rank() if isinstance(m, _Large) else m.offer() for m in members]
    if 2 * share <= pool:
        # Interactions among the cheapest are resolved one removal at a time before the share is cut.
        counts = _cheapest(offers, pool)
        offers = [
            m.refine(count) if isinstance(m, _Large) and count else offer[:count]
            for m, offer, count in zip(members, offers, counts, strict=True)
        ]
    counts = _cheapest(offers, share)
    spent = np.concatenate([m.costs(count) for m, count in zip(members, counts, strict=True)])
    return [m.take(count) for m, count in zip(members, counts, strict=True)], spent
