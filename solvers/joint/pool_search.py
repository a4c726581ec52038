"""Swaps by the joint objective on problems too large for a dense H.

Each round scores every weight through the kept systems (`solvers.joint.kept`), picks a pool Q of
promising weights, and solves the joint problem over the pool *exactly* but for the choice of support: all other
kept weights are re-optimised without being named (`KeptSystem.reduced`), so every swap within the pool is judged
by its true change of the joint objective, and many are made per round. The pool is made of

* the kept weights that cost least and the pruned ones that gain most when moved alone, over all blocks, and
* the best pairs. For i in S, j in P of one block a swap changes the objective by

      ½ [ v_i²/N_ii − (ρ_j + T_ij v_i/N_ii)² / (σ_j + T_ij²/N_ii) ] ,

  which is scanned for the pruned weights in the order of their own gains, batch after batch, until enough
  gaining pairs are found. A scan that runs through all of P without one proves a one-swap local optimum (to the
  precision of the scan; pairs across blocks are covered by the first kind).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import block_diag

from solvers.budget import Partitioned, as_partition
from solvers.joint.dense_search import DenseJoint, descend
from solvers.joint.kept import KeptSystem, kept_system
from solvers.problem import Mask, SelectionProblem
from solvers.regularise import search_blocks
from solvers.solution import Reason
from solvers.solver import Deadline

#: Pruned weights per batch of a pair scan.
_BATCH = 256


@dataclass(frozen=True)
class PoolResult:
    """Mask after the search, the objective as tracked, why it stopped, rounds, swaps, whether the scan was complete."""

    pruned: Mask
    value: float
    reason: Reason
    rounds: int
    swaps: int
    complete: bool


@dataclass
class _Scores:
    """One block's scores in a round; positions in the block."""

    inside: torch.Tensor
    cost: torch.Tensor
    ratio: torch.Tensor  # v_i/N_ii
    inverse: torch.Tensor  # 1/N_ii
    outside: torch.Tensor
    gain: torch.Tensor
    residual: torch.Tensor  # ρ_j
    schur: torch.Tensor  # σ_j


def _scored(system: KeptSystem) -> _Scores:
    value, spread = system.scores(torch.arange(system.block.n, device=system.block.device))
    inside, outside = system.kept.nonzero().squeeze(1), (~system.kept).nonzero().squeeze(1)
    inverse = 1.0 / spread[inside]
    ratio = value[inside] * inverse
    gain = 0.5 * value[outside].square() / spread[outside]
    return _Scores(inside, 0.5 * value[inside] * ratio, ratio, inverse, outside, gain, value[outside], spread[outside])


def _scan(
    system: KeptSystem,
    seen: _Scores,
    group: torch.Tensor | None,
    least_gain: float,
    wanted: int,
    most_pairs: float,
    deadline: Deadline,
) -> tuple[list[tuple[float, int, int]], bool]:
    """Gaining pairs of one block as (change, i, j), best partner of each j; and whether all of P was scanned.

    With the `group` of each weight (n,), pairs within groups only.
    """
    dtype = system.dtype
    # In units of the largest gain, so that a working precision of float32 neither overflows nor underflows.
    unit = float(seen.gain.max()) if seen.gain.numel() and float(seen.gain.max()) > 0.0 else 1.0
    root = math.sqrt(unit)
    cost, ratio, inverse = (x.to(dtype).unsqueeze(1) for x in (2.0 * seen.cost / unit, seen.ratio / root, seen.inverse))
    order = seen.gain.argsort(descending=True, stable=True)
    found: list[tuple[float, int, int]] = []
    owner = None if group is None else (group[seen.inside].unsqueeze(1), group[seen.outside])
    count = int(seen.inside.numel())
    if count == 0:
        return found, True
    for start in range(0, int(order.numel()), _BATCH):
        if start and (len(found) >= wanted or start * count > most_pairs or deadline.expired()):
            return found, False
        batch = order[start : start + _BATCH]
        cross = system.cross(seen.inside, seen.outside[batch])
        numerator = ((seen.residual[batch] / root).to(dtype) + cross * ratio).square_()
        change = cost - numerator.div_(seen.schur[batch].to(dtype) + cross.square_().mul_(inverse))
        if owner is not None:
            change.masked_fill_(owner[0] != owner[1][batch], math.inf)
        least, who = change.min(0)
        least = 0.5 * unit * least.double()
        for position in (least < -least_gain).nonzero().squeeze(1).tolist():
            pair = (float(least[position]), int(seen.inside[who[position]]), int(seen.outside[batch[position]]))
            found.append(pair)
    return found, True


def _pools(
    systems: list[KeptSystem],
    groups: list[torch.Tensor] | list[None],
    least_gain: float,
    width: int,
    most_pairs: float,
    deadline: Deadline,
) -> tuple[list[torch.Tensor], bool]:
    """One pool per block (positions), and whether no gaining pair was left out of sight."""
    measured = [_scored(system) for system in systems]
    chosen: list[set[int]] = [set() for _ in systems]
    for attribute, sign, names in (("cost", 1.0, "inside"), ("gain", -1.0, "outside")):
        scores = torch.cat([sign * getattr(m, attribute) for m in measured]).cpu().numpy()
        owner = np.repeat(np.arange(len(measured)), [getattr(m, attribute).numel() for m in measured])
        positions = torch.cat([getattr(m, names) for m in measured]).cpu().numpy()
        order = np.argsort(scores, kind="stable")
        picks = order[:width].tolist()
        # The best swap across blocks takes the first of one list and the first of another block in the other.
        picks.extend(order[owner[order] != owner[order[0]]][:1].tolist())
        for pick in picks:
            chosen[owner[pick]].add(int(positions[pick]))
    complete = True
    pairs: list[tuple[float, int, int, int]] = []
    for index, (system, seen, group) in enumerate(zip(systems, measured, groups, strict=True)):
        found, all_seen = _scan(system, seen, group, least_gain, width, most_pairs / len(systems), deadline)
        complete = complete and all_seen
        pairs.extend((change, index, i, j) for change, i, j in found)
    for _, index, i, j in sorted(pairs)[:width]:
        chosen[index].update((i, j))
    pools = [
        torch.tensor(sorted(members), dtype=torch.int64, device=system.block.device)
        for members, system in zip(chosen, systems, strict=True)
    ]
    return pools, complete


def _improve(
    systems: list[KeptSystem],
    pools: list[torch.Tensor],
    partition: Partitioned,
    least_gain: float,
    deadline: Deadline,
) -> tuple[float, int]:
    """Descend within the pools, all blocks together, and move the systems: (change of the objective, swaps)."""
    parts = [system.reduced(pool) for system, pool in zip(systems, pools, strict=True) if pool.numel()]
    active = [(system, pool) for system, pool in zip(systems, pools, strict=True) if pool.numel()]
    hessian = block_diag(*[part.hessian.cpu().numpy() for part in parts])
    linear = torch.cat([part.linear for part in parts]).cpu().numpy()
    kept = torch.cat([system.kept[pool] for system, pool in active]).cpu().numpy()
    firsts = np.cumsum([0, *(system.block.n for system in systems)])
    index = np.concatenate([first + pool.cpu().numpy() for first, pool in zip(firsts, pools, strict=False)])
    problem = DenseJoint(hessian, linear, 0.0, partition.groups.among(index))
    found = descend(problem, kept, least_gain, deadline)
    start = 0
    for system, pool in active:
        new = torch.from_numpy(found.kept[start : start + pool.numel()]).to(pool.device)
        old = system.kept[pool]
        start += pool.numel()
        if bool((new != old).any()):
            system.change(removed=pool[old & ~new], added=pool[new & ~old])
    return found.value - found.start_value, found.swaps


def pool_search(
    problem: SelectionProblem,
    start: Mask,
    *,
    width: int,
    rounds: int,
    min_gain: float,
    most_pairs: float,
    deadline: Deadline,
    record: Callable[[float], None] | None = None,
) -> PoolResult:
    """Improve a mask by swaps until none gains, the rounds are spent or the time is up.

    Parameters
    ----------
    problem : SelectionProblem
    start : numpy bool (n,)
        Feasible mask.
    width : int
        Weights per kind and round (pools hold up to four times as many).
    rounds : int
    min_gain : float
        Least gain of a swap, relative to the objective.
    most_pairs : float
        Pairs looked at per scan at most.
    deadline : Deadline
    record : callable, optional
        Told the objective after every round.
    """
    blocks, _ = search_blocks(problem)
    sizes = [block.n for block in blocks]
    masks = torch.split(problem.tensors.of(~start), sizes)
    partition = as_partition(problem.budget, problem.n)
    groups: list[torch.Tensor] | list[None] = [None] * len(blocks)
    if len(partition.sizes) > 1:
        groups = list(torch.split(torch.from_numpy(partition.group_of).to(masks[0].device), sizes))
    systems = [kept_system(block, mask) for block, mask in zip(blocks, masks, strict=True)]
    value = sum(system.objective() for system in systems)
    swaps = used = 0
    reason, complete = Reason.ITERATION_LIMIT, False
    while used < rounds:
        if deadline.expired():
            reason = Reason.TIME_LIMIT
            break
        least_gain = min_gain * max(abs(value), 1e-12 * problem.scale)
        pools, complete = _pools(systems, groups, least_gain, width, most_pairs, deadline)
        change, made = _improve(systems, pools, partition, least_gain, deadline)
        used += 1
        swaps += made
        value += change
        if record is not None:
            record(value)
        if made == 0:
            reason = Reason.COMPLETED if complete else (Reason.TIME_LIMIT if deadline.expired() else Reason.COMPLETED)
            break
    pruned = np.concatenate([(~system.kept).cpu().numpy() for system in systems])
    return PoolResult(pruned, value, reason, used, swaps, complete)
