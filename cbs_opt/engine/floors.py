"""Floors: how many weights of each layer, or of each row, stay at least, so that no layer is removed whole.

At high sparsities rules that share one budget over all layers remove whole layers ("layer collapse", Tanaka et al.,
*Pruning neural networks without any data by iteratively conserving synaptic flow*, NeurIPS 2020), and with one of them
the function of the network. By default every layer keeps a weight, where the budget has as many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cbs_opt.engine.choice import Choice
from cbs_opt.network.layers import PrunableLayers
from solvers import Bounded, Budget, Cardinality
from solvers.allocation import uniform_shares
from solvers.arrays import Index, Mask
from solvers.errors import OptionError


@dataclass(frozen=True, eq=False)
class Floors:
    """Consecutive groups of weights, in the order of the network, and what stays of each at least.

    Attributes
    ----------
    sizes, least : int64 (groups,)
    """

    sizes: Index
    least: Index

    @classmethod
    def of(cls, choice: Choice, layers: PrunableLayers) -> Floors:
        """What a choice asks of a network; raises OptionError where the budget leaves fewer weights."""
        sizes = np.array([layer.n for layer in layers], dtype=np.int64)
        n_kept, asked = choice.kept(layers.n), choice.min_kept
        if choice.min_kept_per_row:
            rows = np.array([layer.n_rows for layer in layers], dtype=np.int64)
            name, asked, sizes = "min_kept_per_row", choice.min_kept_per_row, np.repeat(sizes // rows, rows)
            least = np.minimum(asked, sizes)
        elif isinstance(asked, float):
            name, least = "min_kept", np.array([math.ceil(asked * size) for size in sizes.tolist()], dtype=np.int64)
        else:
            # Fewer weights than layers leave no path anyway; the report warns of it.
            name, default = "min_kept", int(n_kept >= len(layers) and not choice.whole)
            least = np.minimum(default if asked is None else asked, sizes)
        # What costs allow is found once they are known.
        if choice.budget is None and least.sum() > n_kept:
            raise OptionError(
                f"{name}={asked} keeps {least.sum()} weights of the {len(least)} "
                f"{'rows' if choice.min_kept_per_row else 'layers'} together, but only {n_kept} of {layers.n} are to "
                f"stay; lower it, or the sparsity to {1.0 - least.sum() / layers.n:.4g}"
            )
        return cls(sizes, least)

    def budget(self, n_prune: int, order: Index | None = None) -> Budget:
        """As a budget of weights in the order of the network, or with these numbers (n,) in it."""
        if not self.least.any():
            return Cardinality(n_prune)
        return Bounded(n_prune, self.sizes, self.least, order=order)

    def among(self, some: Mask) -> Floors:
        """For some of the weights (n,) only, the others being gone."""
        ends = np.cumsum(self.sizes)
        groups = [some[end - size : end] for end, size in zip(ends.tolist(), self.sizes.tolist(), strict=True)]
        sizes = np.array([np.count_nonzero(group) for group in groups], dtype=np.int64)
        return Floors(sizes, np.minimum(self.least, sizes))

    def inside(self, start: int, stop: int) -> Floors:
        """Those of the groups between two weights."""
        ends = np.cumsum(self.sizes)
        own = (ends > start) & (ends <= stop)
        return Floors(self.sizes[own], self.least[own])

    def least_of(self, layers: PrunableLayers) -> Index:
        """What stays of each layer at least, (layers,)."""
        return np.array([self.inside(layer.start, layer.stop).least.sum() for layer in layers], dtype=np.int64)

    def shared(self, counts: Index, layers: PrunableLayers) -> Index:
        """What each layer loses, (layers,), with floors kept: others make up for it, by what they have above theirs."""
        sizes = np.array([layer.n for layer in layers], dtype=np.int64)
        least = self.least_of(layers)
        short = np.maximum(least - (sizes - counts), 0)
        if not short.any():
            return counts
        raised = counts - short
        return raised + uniform_shares((sizes - raised - least).tolist(), int(short.sum()))
