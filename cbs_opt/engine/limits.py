"""Budgets that are not numbers of weights, tightened from stage to stage so that masks only grow.

With t the share of the way gone, from 0 for the network as it is to 1 for the budget asked for:

* n:m         of every m weights t (m − n), rounded, are gone, so that stages keep m − 1, …, n of m;
* groups      ⌊t k⌋ of them are gone;
* costs       what stays costs at most total − t (total − limit).

A stage chooses among the weights still there, of which its budget asks what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.workspace import Workspace
from cbs_opt.measure.costs import SAMPLES, CostBudget, Costs
from cbs_opt.measure.layer_inputs import Streamed
from cbs_opt.structured.coupled import CoupledCosts
from cbs_opt.structured.head_costs import HeadCosts
from solvers import Budget, Cardinality, Groups, Knapsack, Partitioned
from solvers.arrays import Mask


def costs_of(workspace: Workspace, budget: CostBudget) -> Costs:
    """What the weights of a network cost, which is called on a few samples where that is needed."""
    place, size = workspace.setup.place, min(SAMPLES, workspace.data.n)
    inputs, targets = workspace.data.batch(slice(0, size), place)
    stream = BatchStream(workspace.data)
    streamed = Streamed(workspace.model.to(place), workspace.layers, stream, workspace.forward, place)
    batch = (inputs, targets, size)
    costs = Costs.of(budget, streamed, batch)
    if budget.groups == "coupled":
        return CoupledCosts.priced(costs, streamed, batch)
    return HeadCosts.priced(costs, streamed.model, workspace.layers) if budget.groups == "heads" else costs


@dataclass(frozen=True, eq=False)
class Limits:
    """A budget of all weights, and the way to it.

    Attributes
    ----------
    final : Partitioned, Groups or Knapsack
    n, n_kept : int
        Weights, and about how many stay in the end: plans count in these.
    costs : Costs, optional
        Under a budget of costs.
    """

    final: Budget
    n: int
    n_kept: int
    costs: Costs | None = None

    @classmethod
    def of(cls, choice: Choice, workspace: Workspace) -> Limits | None:
        """What a choice asks of a network; None where that is a number of weights."""
        layers = workspace.layers
        if choice.budget is None:
            return None
        if choice.pattern is not None:
            final = layers.resolve(choice.pattern)
            return None if isinstance(final, Cardinality) else cls(final, layers.n, choice.kept(layers.n))
        assert choice.costs is not None
        costs, floors = costs_of(workspace, choice.costs), Floors.of(choice, layers)
        return cls(costs.knapsack(floors.sizes, floors.least), layers.n, choice.kept(layers.n), costs)

    def gone(self, n_kept: int) -> float:
        """The share of the way at which a plan counts `n_kept` weights."""
        return 1.0 if n_kept <= self.n_kept else (self.n - n_kept) / (self.n - self.n_kept)

    def among(self, active: Mask, n_kept: int) -> Budget:
        """What is still asked of the weights (n,) that are there, at a step of a plan that counts `n_kept`."""
        share, final = self.gone(n_kept), self.final
        if isinstance(final, Partitioned):
            there = np.add.reduceat(active, final.starts[:-1], dtype=np.int64)
            wanted = np.floor(share * final.quotas + 0.5).astype(np.int64)
            missing = np.maximum(wanted - (final.lengths - there), 0)
            return Partitioned(there[there > 0], missing[there > 0])
        if isinstance(final, Groups):
            names, labels = np.unique(np.asarray(final.labels)[active], return_inverse=True)
            return Groups(labels, max(int(share * final.k + 1e-9) - (final.n_groups - names.size), 0))
        assert isinstance(final, Knapsack)
        total = final.table.sum(1)
        limit = total - share * (total - np.asarray(final.limit))
        if final.labels is not None:
            names, labels = np.unique(np.asarray(final.labels)[active], return_inverse=True)
            return Knapsack(final.table[:, names], limit, labels)
        if final.min_kept is None:
            return Knapsack(final.table[:, active], limit)
        sizes = np.add.reduceat(active, final.starts[:-1], dtype=np.int64)
        some = sizes > 0
        least = np.minimum(np.asarray(final.min_kept), sizes)[some]
        return Knapsack(final.table[:, active], limit, sizes=sizes[some], min_kept=least)

    def summary(self, pruned: Mask) -> dict[str, float]:
        """What the weights that stay cost, for a report."""
        return {} if self.costs is None else self.costs.summary(pruned)
