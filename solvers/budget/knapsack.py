"""What stays may cost no more than a limit: FLOPs, bytes, milliseconds, one cost of each weight or two.

    Σ_{i ∈ S} c_ji ≤ L_j ,     j = 1 … m ,  m ≤ 2 ,     that is   Σ_{i ∈ P} c_ji ≥ D_j = Σ_i c_ji − L_j .

The limit is what may remain, not what has to go, and nothing forbids to stay below it: how many weights go is not
settled. Where scores s_i add up, a multiplier μ for the limit removes every weight with s_i < μ c_i. At the best μ that
is the linear relaxation, whose value

    max over μ ≥ 0 of  μD + Σ_i min(0, s_i − μ c_i)

no mask falls below (`least_sum`), and which is attained but for one weight: in the order of s_i / c_i weights go until
D is met, the last of them in part. A mask takes the last one whole, then puts back what the limit still allows, or
takes the cheapest single weight in place of the last (`cheapest`): within the score of one weight of the bound. With
two costs the order is that of a mixture, (1 − θ) c_1/D_1 + θ c_2/D_2; each θ bounds, and the best is bisected for.

References
----------
Martello and Toth, *Knapsack Problems*, 1990; Glover, *Surrogate constraint duality*, Operations Research 1975.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from solvers.arrays import Array, Index, Mask
from solvers.budget.base import Budget
from solvers.budget.groups import labels_of
from solvers.budget.linear import LinearRows
from solvers.errors import ProblemError

#: Of all costs together: what rounding of their sum may exceed a limit by.
_ROUNDING = 1e-12
_BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class Knapsack(Budget):
    """What stays costs at most `limit`.

    Attributes
    ----------
    costs : float (n,) or (m, n), none negative, m ≤ 2
        Of keeping each weight; with `labels` of keeping each group, (groups,) or (m, groups).
    limit : float ≥ 0, or (m,)
        What everything that stays may cost.
    labels : int (n,), optional
        Groups that go or stay whole, as in `solvers.budget.groups`.
    sizes, min_kept : int (parts,), optional
        Floors: of each range of weights, in order, so many stay at least. Not together with `labels`.

    Raises
    ------
    ProblemError
        For costs that are negative or not finite, a limit below zero or below what floors cost, or numbers of them
        that do not match.
    """

    costs: npt.ArrayLike
    limit: float | Sequence[float] | Array
    labels: Sequence[int] | Index | None = None
    sizes: Sequence[int] | Index | None = None
    min_kept: Sequence[int] | Index | None = None

    def __post_init__(self) -> None:
        try:
            table = np.atleast_2d(np.asarray(self.costs, dtype=np.float64))
            limits = np.atleast_1d(np.asarray(self.limit, dtype=np.float64))
        except (TypeError, ValueError):
            raise ProblemError("costs and limits of a knapsack must be numbers") from None
        if table.ndim != 2 or table.shape[1] == 0 or table.shape[0] > 2 or limits.shape != table.shape[:1]:
            raise ProblemError(
                f"a knapsack takes one or two costs, (n,) or (2, n), with a limit for each, not {table.shape} with "
                f"limits {limits.shape}"
            )
        wrong = np.argwhere(~(np.isfinite(table) & (table >= 0.0)))
        if wrong.size:
            row, at = wrong[0].tolist()
            raise ProblemError(f"costs must be finite and not negative; cost {at} is {float(table[row, at])!r}")
        if not (np.isfinite(limits) & (limits >= 0.0)).all():
            raise ProblemError(f"a limit is what may remain, finite and zero or more, not {limits.tolist()}")
        if self.labels is not None:
            object.__setattr__(self, "labels", labels_of(self.labels))
            groups = int(np.max(self.labels)) + 1
            if groups != table.shape[1]:
                raise ProblemError(f"there are {groups} groups, but {table.shape[1]} costs; give one for each")
        object.__setattr__(self, "costs", table)
        object.__setattr__(self, "limit", limits)
        self._check_floors()

    def _check_floors(self) -> None:
        if self.min_kept is None and self.sizes is None:
            return
        if self.labels is not None:
            raise ProblemError("floors are of single weights; leave labels out")
        sizes, least = np.asarray(self.sizes), np.asarray(self.min_kept)
        whole = sizes.dtype.kind in "iu" and least.dtype.kind in "iu" and sizes.shape == least.shape
        if not whole or sizes.sum() != self.table.shape[1] or ((least < 0) | (least > sizes) | (sizes < 1)).any():
            raise ProblemError(
                f"floors are integers, sizes and min_kept of ranges of all {self.table.shape[1]} single weights, no "
                "floor above its size"
            )
        starts = np.cumsum([0, *sizes.tolist()])
        for row, limit in zip(self.table, self.limits, strict=True):
            parts = zip(starts[:-1], starts[1:], least, strict=True)
            cost = sum(float(np.partition(row[a:b], k - 1)[:k].sum()) for a, b, k in parts if k)
            if cost > limit:
                raise ProblemError(
                    f"what has to stay costs {cost:.10g}, more than the limit {limit:.10g}; raise the limit, or lower "
                    "the floors"
                )

    @cached_property
    def table(self) -> Array:
        """The costs, float64 (m, n or groups)."""
        return np.asarray(self.costs)

    @cached_property
    def limits(self) -> Array:
        """float64 (m,), with what rounding may add."""
        return np.asarray(np.asarray(self.limit) + _ROUNDING * self.table.sum(1), dtype=np.float64)

    @cached_property
    def starts(self) -> Index:
        """First weight of each range that has a floor, and the number of all at the end."""
        return np.cumsum([0, *np.asarray(self.sizes).tolist()])

    def check(self, n: int) -> None:
        held = self.table.shape[1] if self.labels is None else len(self.labels)
        if held != n:
            raise ProblemError(f"the knapsack has costs of {held} weights, but there are {n}")

    def kept_cost(self, pruned: Mask) -> Array:
        """What the weights that stay cost, float64 (m,)."""
        return np.asarray(self.table @ ~self._items(pruned))

    def _items(self, pruned: Mask) -> Mask:
        if self.labels is None:
            return pruned
        gone = np.ones(self.table.shape[1], dtype=bool)
        gone[np.asarray(self.labels)[~pruned]] = False
        return gone

    def violation(self, pruned: Mask) -> str:
        if self.labels is not None:
            cut = np.flatnonzero(pruned & ~self._items(pruned)[np.asarray(self.labels)])
            if cut.size:
                group = int(np.asarray(self.labels)[cut[0]])
                return f"it removes a part of group {group}, which goes or stays whole"
        if self.min_kept is not None:
            kept = np.add.reduceat(~pruned, self.starts[:-1], dtype=np.int64)
            few = np.flatnonzero(kept < self.min_kept)
            if few.size:
                at = int(few[0])
                return f"it keeps {kept[at]} weights of range {at}, where at least {self.min_kept[at]} are to stay"
        cost = self.kept_cost(pruned)
        over = np.flatnonzero(cost > self.limits)
        if not over.size:
            return ""
        first = int(over[0])
        return f"what stays costs {cost[first]:.10g}, where {self.limits[first]:.10g} is the limit"

    def linear(self, n: int) -> LinearRows:
        items = self.table.shape[1]
        matrix, low = self.table, self.table.sum(1) - self.limits
        high = np.full(low.size, np.inf)
        if self.min_kept is not None:
            part = np.repeat(np.arange(self.starts.size - 1), np.diff(self.starts))
            floors = np.flatnonzero(np.asarray(self.min_kept) > 0)
            matrix = np.concatenate([matrix, (part == floors[:, None]).astype(np.float64)])
            low = np.concatenate([low, np.full(floors.size, -np.inf)])
            high = np.concatenate([high, (np.diff(self.starts) - np.asarray(self.min_kept))[floors].astype(np.float64)])
        labels = np.arange(items) if self.labels is None else np.asarray(self.labels)
        return LinearRows(labels, matrix, low, high)

    @property
    def over_items(self) -> Knapsack:
        return Knapsack(self.table, np.asarray(self.limit), None, self.sizes, self.min_kept)

    def only_mask(self, n: int) -> Mask | None:
        everything = (self.table > self.limits[:, None]).any(0).all()
        return np.ones(n, dtype=bool) if everything and self.min_kept is None else None

    def classes(self) -> tuple[int, ...]:
        """Sizes of the ranges of weights, in order, that cost the same and have one floor."""
        changes = np.flatnonzero((np.diff(self.table, axis=1) != 0.0).any(0)) + 1
        cuts = [0, *changes.tolist(), self.table.shape[1]]
        if self.min_kept is not None:
            cuts = np.union1d(cuts, self.starts).tolist()
        return tuple(np.diff(cuts).tolist())

    def cheapest(self, scores: torch.Tensor) -> torch.Tensor:
        """A feasible mask of nearly the least sum of scores (n,), within one weight of `least_sum`.

        What scores inf stays. Raises ProblemError where that costs more than the limit.
        """
        if self.labels is not None:
            return super().cheapest(scores)
        values = scores.detach().cpu().numpy().astype(np.float64)
        if self.min_kept is None:
            return torch.from_numpy(self._solve(values)[0]).to(scores.device)
        # Where the most valuable of each range cost too much to stay, the cheapest of it do.
        mixes = [0.0] if len(self.table) == 1 else [0.5, 0.0, 1.0, *np.linspace(0.05, 0.95, 19)]
        price = self.table / np.maximum(self.limits, 1e-300)[:, None]
        orders = (values, *(-(1.0 - mix) * price[0] - mix * price[-1] for mix in mixes))
        for last, order in enumerate(orders, start=1):
            try:
                return torch.from_numpy(self._solve(self._floored(values, order))[0]).to(scores.device)
            except ProblemError:
                if last == len(orders):
                    raise
        raise AssertionError

    def _floored(self, values: Array, order: Array) -> Array:
        """`values`, inf for as many of each range as its floor asks for, the last in an order (n,)."""
        group = np.repeat(np.arange(self.starts.size - 1), np.diff(self.starts))
        found, places = values.copy(), np.lexsort((order, group))
        # In this order each range ends at its start's successor, so that the distance to it is the rank from above.
        found[places[self.starts[1:][group] - np.arange(group.size) <= np.asarray(self.min_kept)[group]]] = np.inf
        return found

    def least_sum(self, scores: Array) -> float:
        """No feasible mask has a smaller sum of scores (n,): the value of the linear relaxation."""
        return self._solve(scores)[1]

    def _solve(self, scores: Array) -> tuple[Mask, float]:
        """(a good mask, a lower bound on the sum of scores of all)."""
        pruned = scores < 0.0
        # Half of what rounding may add, so that the mask stays within the limit, and the bound below what is allowed.
        spare = 0.5 * _ROUNDING * self.table.sum(1)
        demand = self.table.sum(1) - self.limits + spare - self.table @ pruned
        open_ = demand > 0.0
        base = float(scores[pruned].sum())
        margin = 64.0 * float(np.finfo(np.float64).eps)
        if not open_.any():
            return pruned, base - margin * abs(base)
        table, demand = self.table[open_], demand[open_]
        index = np.flatnonzero(~pruned & np.isfinite(scores) & (table > 0.0).any(0))
        costs, values = table[:, index] / demand[:, None], scores[index]
        # Running sums of many costs round, too.
        looseness = float((spare[open_] / demand).max()) + index.size * float(np.finfo(np.float64).eps)
        short = np.flatnonzero(costs.sum(1) < 1.0)
        if short.size:
            at = int(np.flatnonzero(open_)[short[0]])
            raise ProblemError(
                f"what has to stay costs more than the limit {float(np.asarray(self.limit)[at]):.10g}; raise it, or "
                "lower the floors"
            )
        bound, low, high = 0.0, 0.0, 1.0
        for _ in range(0 if len(costs) == 1 else _BISECTIONS):
            theta = 0.5 * (low + high)
            least, first, price, _ = _relaxed(values, costs, theta)
            bound = max(bound, least - price * looseness)
            if abs(first - 1.0) <= 1e-6:
                low = high = theta
                break
            low, high = (theta, high) if first >= 1.0 else (low, theta)
        best, value = None, np.inf
        for theta in {low, high} if len(costs) > 1 else {0.0}:
            least, _, price, order = _relaxed(values, costs, theta)
            bound = max(bound, least - price * looseness)
            gone = _filled(values, costs, order)
            if float(values[gone].sum()) < value:
                best, value = gone, float(values[gone].sum())
        assert best is not None
        pruned[index[best]] = True
        return pruned, base + bound - margin * (abs(base) + abs(bound))


def _relaxed(values: Array, costs: Array, theta: float) -> tuple[float, float, float, Index]:
    """The linear relaxation under the mixture (1 − θ) c_1 + θ c_2 of costs (m, f) in units of the demand.

    Returns its value, the share of the first demand that it meets, the price of more of the mixture, and the order in
    which weights go.
    """
    mixed = costs[0] if len(costs) == 1 else (1.0 - theta) * costs[0] + theta * costs[1]
    ratio = np.divide(values, mixed, out=np.full(values.size, np.inf), where=mixed > 0.0)
    order = np.argsort(ratio, kind="stable")
    together = np.cumsum(mixed[order])
    last = min(int(np.searchsorted(together, 1.0)), values.size - 1)
    before, edge = order[:last], order[last]
    part = (1.0 - float(together[last - 1] if last else 0.0)) / max(float(mixed[edge]), 1e-300)
    part = min(1.0, max(0.0, part))
    least = float(values[before].sum() + part * values[edge])
    return least, float(costs[0, before].sum() + part * costs[0, edge]), float(ratio[edge]), order


def _filled(values: Array, costs: Array, order: Index) -> Mask:
    """A mask that meets every demand by removing weights in an order, with the last one as well chosen as is easy."""
    run = np.cumsum(costs[:, order], axis=1)
    enough = max(min(int(np.searchsorted(row, 1.0)), values.size - 1) for row in run)
    gone = np.zeros(values.size, dtype=bool)
    gone[order[: enough + 1]] = True
    _put_back(gone, values, costs)
    other = np.zeros(values.size, dtype=bool)
    other[order[:enough]] = True
    missing = 1.0 - (run[:, enough - 1] if enough else np.zeros(len(run)))
    alone = np.flatnonzero(~other & (costs >= missing[:, None]).all(0))
    if alone.size:
        other[alone[np.argmin(values[alone])]] = True
        _put_back(other, values, costs)
        if float(values[other].sum()) < float(values[gone].sum()):
            return other
    return gone


def _put_back(gone: Mask, values: Array, costs: Array) -> None:
    """Keep what the limit still allows, the most valuable for its cost first, in place."""
    slack = costs[:, gone].sum(1) - 1.0
    for _ in range(20):
        fits = np.flatnonzero(gone & (costs <= slack[:, None]).all(0) & (values > 0.0))
        if not fits.size:
            return
        price = costs[:, fits].max(0)
        order = fits[np.argsort(np.divide(-values[fits], price, out=np.full(fits.size, -np.inf), where=price > 0.0))]
        taken = order[(np.cumsum(costs[:, order], axis=1) <= slack[:, None]).all(0)]
        gone[taken] = False
        slack = slack - costs[:, taken].sum(1)
