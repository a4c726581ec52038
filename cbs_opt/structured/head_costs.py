"""Costs of attention heads: a budget of costs with ``groups="heads"``.

A head is its rows of the query, key and value projections and its columns of the output projection; query heads that
share keys and values are one (`cbs_opt.structured.heads`). No weight is in two heads, so what a head costs is the sum
of its weights. Everything else that is prunable is one more group, which stays, and so does the largest head of every
module, as one without any is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cbs_opt.measure.costs import Costs
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.structured.coupled import but_the_largest
from cbs_opt.structured.heads import Attention, attentions
from solvers import Knapsack
from solvers.arrays import Array, Index
from solvers.errors import OptionError


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadCosts(Costs):
    """Costs of heads.

    Attributes
    ----------
    n_heads : int
        Labels from here on stay.
    """

    n_heads: int

    @classmethod
    def priced(cls, costs: Costs, model: nn.Module, layers: PrunableLayers) -> HeadCosts:
        """Of costs of single weights.

        Raises
        ------
        OptionError
            Where there is no head whose projections are all pruned, or the limit is out of reach.
        """
        labels = head_labels(model, layers)
        n = int(labels.max()) + 1
        if n < 1:
            raise OptionError(
                "no attention head can go whole: none is known whose query, key, value and output projections are all "
                "among the layers that are pruned; see cbs_opt.structured.heads for those that are known"
            )
        least = float(costs.each[labels < 0].sum())
        if least > costs.limit:
            raise OptionError(
                f"{(least + costs.fixed) / costs.total:.4g} of the {costs.budget.name} stay when all heads that can "
                f"are gone; the share is {costs.budget.share!r}; leave other layers out by include or exclude"
            )
        labels[labels < 0] = n
        return cls(budget=costs.budget, each=costs.each, limit=costs.limit, labels=labels, fixed=costs.fixed, n_heads=n)

    def knapsack(self, sizes: Index, least: Index) -> Knapsack:
        """The budget of whole heads."""
        assert self.labels is not None
        prices = np.bincount(self.labels, weights=self.each)
        stays = float(prices[self.n_heads :].sum())
        prices[self.n_heads :] = 0.0
        return Knapsack(prices, self.limit - stays, self.labels)


def head_labels(model: nn.Module, layers: PrunableLayers) -> Index:
    """The head of each weight, over all attention modules that are known, int64 (n,); −1 for those which stay."""
    labels = np.full(layers.n, -1)
    weights = dict(zip((layer.name for layer in layers), layers.parameters(model), strict=True))
    ranges = {layer.name: layer.slice for layer in layers}
    names = {module: name for name, module in model.named_modules()}
    n = 0
    for attention in attentions(model):
        parts = [names[layer] for layer in attention.layers]
        if any(part not in ranges for part in parts):
            continue
        of_rows = [_heads_of_rows(attention, layer.out_features) for layer in attention.layers[:3]]
        of_columns = _heads_of_rows(attention, attention.output.in_features)
        size = np.zeros(int(of_columns.max()) + 1)
        for part, rows in zip(parts[:3], of_rows, strict=True):
            np.add.at(size, rows, _squares(weights[part], 1))
        np.add.at(size, of_columns, _squares(weights[parts[3]], 0))
        number = but_the_largest(size, n)
        for part, rows, layer in zip(parts, of_rows, attention.layers, strict=False):
            labels[ranges[part]] = np.repeat(number[rows], layer.in_features)
        labels[ranges[parts[3]]] = np.tile(number[of_columns], attention.output.out_features)
        n += size.size - 1
    return labels


def _heads_of_rows(attention: Attention, rows: int) -> Index:
    """The key and value head of each row of a projection."""
    heads = attention.value.out_features // attention.size
    return np.repeat(np.arange(heads), rows // heads)


def _squares(weight: torch.Tensor, axis: int) -> Array:
    return np.asarray(weight.detach().double().square().sum(axis).cpu().numpy())
