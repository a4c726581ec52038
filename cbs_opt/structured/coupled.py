"""Costs of channels as the smaller network saves them: a budget of costs with ``groups="coupled"``.

A channel that goes takes with it rows of the layers that give it and columns of those that take it. With shares a_l of
the rows and b_l of the columns of layer l gone, its cost F_l falls to F_l (1 − a_l)(1 − b_l), which is not a sum over
channels. Where both are cut their overlap counts once, so each is worth the fraction

    f_l = (a_l + b_l − a_l b_l) / (a_l + b_l)   of   F_l a_l and F_l b_l,

exactly at (a, b) and nearly around. A knapsack with these prices is solved, first at the even share of all channels
that meets the limit, then at what was chosen, until the limit is met and little of it is left over; prices with
f_l = 1/2 never promise more than is saved, so they meet it whenever it can be met. Which channels are one says
`cbs_opt.structured.dependencies`; rows that no smaller network lacks (its outputs, heads of attention, what a layer
norm mixes, and of each group of channels the largest, as a layer without any is none) are a group of their own that
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from cbs_opt.data.calibration import Batch
from cbs_opt.formats.record import Example, plain_copy
from cbs_opt.measure.costs import Costs
from cbs_opt.measure.layer_inputs import Streamed
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.structured.dependencies import ChannelGroup, dependencies
from cbs_opt.structured.heads import attentions
from solvers import Knapsack
from solvers.arrays import Array, Index, Mask
from solvers.errors import OptionError

#: Knapsacks that are solved for one limit, and how much of it may be left over.
_ROUNDS = 5
_LEFT_OVER = 0.005

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Coupling:
    """Which channel the rows and columns of each prunable layer belong to.

    Attributes
    ----------
    n : int
        Channels, over the whole network.
    rows, columns : tuple of int64 (R_l,), (d_l,)
        By layer: the channel, or −1 for those which stay.
    shifts : mapping of str to (int64 (c,), int64 (c,))
        By module with a bias: channels, and their entries there.
    """

    n: int
    rows: tuple[Index, ...]
    columns: tuple[Index, ...]
    shifts: Mapping[str, tuple[Index, Index]]

    @classmethod
    def of(cls, model: nn.Module, layers: PrunableLayers, example: Example) -> Coupling:
        """Of a network; raises OptionError, ModelError as `dependencies`."""
        plain = plain_copy(model)
        leave = [layer for attention in attentions(plain) for layer in attention.layers]
        groups = dependencies(plain, example, leave).groups
        at = {plain.get_submodule(layer.uses[0][0]): i for i, layer in enumerate(layers) if len(layer.uses) == 1}
        names = {module: name for name, module in plain.named_modules()}
        rows = [np.full(layer.n_rows, -1) for layer in layers]
        columns = [np.full(layer.view.inputs, -1) for layer in layers]
        shifts: dict[str, tuple[Index, Index]] = {}
        n = 0
        for group in groups:
            if not _movable(group, at, layers):
                continue
            number = _numbered(group, at, n)
            for module, pairs in group.sources.items():
                channels, entries = np.array(pairs).T
                if module in at:
                    rows[at[module]][entries] = number[channels]
                if isinstance(getattr(module, "bias", None), nn.Parameter):
                    goes = number[channels] >= 0
                    shifts[names[module]] = number[channels][goes], entries[goes]
            for use in group.uses:
                if use.module in at:
                    columns[at[use.module]] = _columns(columns[at[use.module]], use.inputs, number)
            n += group.n - 1
        if not n:
            raise OptionError("no channel of the network can go whole; use groups='channels', or single weights")
        return cls(n, tuple(rows), tuple(columns), shifts)

    def gone(self, pruned: Mask, layers: PrunableLayers) -> Mask:
        """Channels (n,) without any weight left in the rows that give them, of a mask (weights,)."""
        stays = np.zeros(self.n + 1, dtype=bool)
        for layer, rows in zip(layers, self.rows, strict=True):
            stays[rows[~pruned[layer.slice].reshape(layer.n_rows, -1).all(1)]] = True
        return ~stays[:-1]

    def whole(self, pruned: Mask, layers: PrunableLayers) -> Mask:
        """A mask (weights,) with the columns that take channels which are gone."""
        gone = np.append(self.gone(pruned, layers), False)
        taken = [np.tile(gone[ids], layer.n_rows) for layer, ids in zip(layers, self.columns, strict=True)]
        return np.asarray(pruned | np.concatenate(taken))

    @torch.no_grad()
    def silence(self, model: nn.Module, gone: Mask) -> None:
        """Set what is added to channels that are gone to zero, in place: biases, shifts and means of batch norms."""
        for name, (channels, entries) in self.shifts.items():
            module = model.get_submodule(name)
            which = torch.from_numpy(entries[gone[channels]])
            for tensor in (module.bias, getattr(module, "running_mean", None)):
                if isinstance(tensor, torch.Tensor):
                    tensor[which.to(tensor.device)] = 0.0


def _movable(group: ChannelGroup, at: Mapping[nn.Module, int], layers: PrunableLayers) -> bool:
    """Whether its channels can go: all layers that give them are pruned, by rows, and some layer takes them."""
    givers = [module for module in group.sources if isinstance(getattr(module, "weight", None), torch.Tensor)]
    weighty = [module for module in givers if module.weight.ndim > 1]  # type: ignore[operator]
    if group.odd or not group.uses or not weighty or any(module not in at for module in weighty):
        return False
    return all(layers.layers[at[m]].n_rows == m.weight.shape[0] for m in weighty)  # type: ignore[index]


def _numbered(group: ChannelGroup, at: Mapping[nn.Module, int], first: int) -> Index:
    """Numbers of its channels (n,), −1 for the one with the largest rows."""
    size = np.zeros(group.n)
    for module, pairs in group.sources.items():
        if module in at:
            channels, entries = np.array(pairs).T
            weight = module.weight.detach().flatten(1).double().cpu()  # type: ignore[operator]
            np.add.at(size, channels, weight.square().sum(1).numpy()[entries])
    return but_the_largest(size, first)


def but_the_largest(size: Array, first: int) -> Index:
    """Numbers from `first` on for all of some sizes (n,), −1 for the largest, which stays."""
    number = np.full(size.size, -1)
    number[np.arange(size.size) != int(size.argmax())] = first + np.arange(size.size - 1)
    return number


def _columns(found: Index, inputs: Mapping[int, list[int]], number: Index) -> Index:
    """The channels of columns (d,); a channel of a convolution has as many as its kernel has places."""
    entries = 1 + max(max(places) for places in inputs.values())
    table = found.reshape(entries, -1) if found.size % entries == 0 else found[:, None]
    for channel, places in inputs.items():
        table[places] = number[channel]
    return table.reshape(-1)


@dataclass(frozen=True, eq=False, kw_only=True)
class CoupledCosts(Costs):
    """Costs of coupled channels.

    Attributes
    ----------
    layers : PrunableLayers
    coupling : Coupling
    factors : float64 (layers,)
        f_l of the prices.
    """

    layers: PrunableLayers
    coupling: Coupling
    factors: Array

    @classmethod
    def priced(cls, costs: Costs, network: Streamed, batch: Batch) -> CoupledCosts:
        """Of costs of single weights; raises OptionError where the limit is out of reach."""
        inputs = batch[0]
        layers, coupling = network.layers, Coupling.of(network.model, network.layers, Example.of(inputs))
        labels = [np.repeat(rows, layer.view.inputs) for layer, rows in zip(layers, coupling.rows, strict=True)]
        joined = np.concatenate(labels)
        joined[joined < 0] = coupling.n
        made = cls(
            budget=costs.budget,
            each=costs.each,
            limit=costs.limit,
            labels=joined,
            fixed=costs.fixed,
            layers=layers,
            coupling=coupling,
            factors=np.ones(len(layers)),
        )
        least = made._left(np.ones(coupling.n, dtype=bool))
        if least > costs.limit:
            raise OptionError(
                f"{(least + costs.fixed) / costs.total:.4g} of the {costs.budget.name} stay when all that can go "
                f"is gone; the share is {costs.budget.share!r}"
            )
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if made._left(np.full(coupling.n, middle)) > costs.limit else (low, middle)
        return replace(made, factors=made._factors(np.full(coupling.n, high)))

    def knapsack(self, sizes: Index, least: Index) -> Knapsack:
        """The budget of whole channels at the present prices."""
        assert self.labels is not None
        # The last label is missing where every row can go.
        prices = self._prices()[: int(self.labels.max()) + 1]
        demand = self.total - self.fixed - self.limit
        return Knapsack(prices, max(0.0, float(prices.sum()) - demand), self.labels)

    def kept(self, pruned: Mask) -> float:
        """The share that stays of the smaller network."""
        return (self._left(self.coupling.gone(pruned, self.layers)) + self.fixed) / self.total

    def repriced(self, pruned: Mask) -> CoupledCosts:
        """At a mask, about which the prices are then right."""
        return replace(self, factors=self._factors(self.coupling.gone(pruned, self.layers)))

    def cautious(self) -> CoupledCosts:
        """With prices that never promise more than is saved."""
        return replace(self, factors=np.full(len(self.layers), 0.5))

    @cached_property
    def _of_layers(self) -> Array:
        return np.array([self.each[layer.slice].sum() for layer in self.layers])

    def _shares(self, gone: Array | Mask) -> tuple[Array, Array]:
        """(a, b) of all layers."""
        padded = np.append(np.asarray(gone, dtype=np.float64), 0.0)
        return tuple(np.array([padded[ids].mean() for ids in of]) for of in (self.coupling.rows, self.coupling.columns))  # type: ignore[return-value]

    def _left(self, gone: Array | Mask) -> float:
        a, b = self._shares(gone)
        return float(self._of_layers @ ((1.0 - a) * (1.0 - b)))

    def _factors(self, gone: Array | Mask) -> Array:
        a, b = self._shares(gone)
        both = a + b
        return np.divide(both - a * b, both, out=np.ones(len(both)), where=both > 0.0)

    def _prices(self) -> Array:
        """What each channel saves, (n + 1,), the last one for what stays."""
        prices = np.zeros(self.coupling.n + 1)
        for share, rows, columns in zip(
            self.factors * self._of_layers, self.coupling.rows, self.coupling.columns, strict=True
        ):
            for ids in (rows, columns):
                np.add.at(prices, ids, share / ids.size)
        prices[-1] = 0.0
        return prices


def settled(costs: Costs, solve: Callable[[Costs], T], mask: Callable[[T], Mask]) -> T:
    """What `solve` finds under costs, solved again under better prices where these depend on what is chosen.

    Parameters
    ----------
    costs : Costs
    solve : callable
    mask : callable
        The mask (n,) of what it returns.
    """
    found = solve(costs)
    if not isinstance(costs, CoupledCosts):
        return found
    limit, best, most = (costs.limit + costs.fixed) / costs.total, None, -1.0
    for _ in range(_ROUNDS):
        kept = costs.kept(mask(found))
        if kept <= limit * (1.0 + 1e-9) and kept > most:
            best, most = found, kept
        if most > limit * (1.0 - _LEFT_OVER):
            break
        costs = costs.repriced(mask(found))
        found = solve(costs)
    return solve(costs.cautious()) if best is None else best
