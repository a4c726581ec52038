"""What weights cost a network that runs, and budgets of it: `Flops`, `Bytes`.

Every use of a weight w_ri multiplies it with an input and adds the product up: two floating-point operations at every
position (token, image patch, time step) that its row sees. So a weight of a layer costs 2 × positions per sample, which
is counted by calling the network on a few samples; a weight that several modules share costs the sum. Operations
without prunable weights (attention scores, normalisation, biases) are no part of it, and zeros save time only where
something skips them. Bytes are those of the values as stored, without what says where they belong.

Shares are of what the prunable weights of the dense network cost, and say what may *remain*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from cbs_opt.data.calibration import Batch
from cbs_opt.measure.layer_inputs import Streamed, quiet, watched
from cbs_opt.network.adapters import adapter_of
from cbs_opt.network.layers import PrunableLayers
from solvers import Knapsack
from solvers.arguments import number
from solvers.arrays import Array, Index, Mask
from solvers.budget import Pattern, parse
from solvers.errors import ModelError, OptionError, ProblemError

#: Samples a network is called on to count.
SAMPLES = 4


@dataclass(frozen=True)
class CostBudget(ABC):
    """A limit on what stays, as a share of what the dense network costs.

    Attributes
    ----------
    share : float in (0, 1)
    groups : {"channels", "coupled", "heads"}, optional
        What goes whole: rows of layers (neurons, filters), each at its own cost; or channels of the network, with all
        rows that give one and at the cost of all that a smaller network lacks without it, the columns that take it
        included (extra ``[structured]``); or heads of attention. In one shot.

    Raises
    ------
    OptionError
    """

    share: float
    groups: str | None = None
    name: ClassVar[str]
    #: Whether the network has to be called to know.
    counts: ClassVar[bool] = True
    #: Of groups.
    kinds: ClassVar[tuple[str, ...]] = ("channels", "coupled", "heads")

    def __post_init__(self) -> None:
        share = number(f"the share of {self.name}", self.share, remedy="what may remain, in (0, 1)")
        if not 0.0 < share < 1.0:
            raise OptionError(f"the share of {self.name} that may remain lies in (0, 1), not {share!r}")
        object.__setattr__(self, "share", share)
        if self.groups is not None and self.groups not in self.kinds:
            known = ", ".join(map(repr, self.kinds))
            raise OptionError(f"groups of a budget of {self.name} are {known}, or left out, not {self.groups!r}")

    def fixed(self, layers: PrunableLayers) -> float:
        """What stays whatever is removed."""
        return 0.0

    @property
    def kept(self) -> float:
        """About which share of the weights stays: as if all cost the same."""
        return self.share

    def __str__(self) -> str:
        return f"{self.name}:{self.share:g}" + (f":{self.groups}" if self.groups else "")

    @abstractmethod
    def per_weight(self, layers: PrunableLayers, model: nn.Module, uses: Mapping[str, Array]) -> Array:
        """What each weight costs, float64 (n,), `uses` being positions a sample of each group of rows, by layer."""


@dataclass(frozen=True)
class Flops(CostBudget):
    """Floating-point operations of the prunable weights per sample: 2 for each weight and position."""

    name = "flops"

    def per_weight(self, layers: PrunableLayers, model: nn.Module, uses: Mapping[str, Array]) -> Array:
        """2 × positions."""
        parts = []
        for layer in layers:
            positions = uses[layer.name]
            parts.append(np.repeat(2.0 * positions, layer.n // positions.size))
        return np.concatenate(parts)


@dataclass(frozen=True)
class Bytes(CostBudget):
    """Bytes of the values of the weights that stay, in the dtype of the network."""

    name = "bytes"
    counts = False

    def per_weight(self, layers: PrunableLayers, model: nn.Module, uses: Mapping[str, Array]) -> Array:
        """The size of an element."""
        sizes = [float(weight.element_size()) for weight in layers.parameters(model)]
        return np.repeat(sizes, [layer.n for layer in layers])


@dataclass(frozen=True, init=False, kw_only=True)
class Both(CostBudget):
    """Two limits at once: ``Both(Flops(0.5), Bytes(0.4))``, of the same groups. In one shot.

    Attributes
    ----------
    first, second : CostBudget
        Of different costs.
    """

    first: CostBudget
    second: CostBudget
    name = "two costs"
    kinds = ("channels",)

    def __init__(self, first: CostBudget, second: CostBudget) -> None:
        for budget in (first, second):
            if isinstance(budget, Both) or not isinstance(budget, CostBudget):
                raise OptionError(f"two limits at once are of costs such as Flops and Bytes, not {budget!r}")
        if first.name == second.name or first.groups != second.groups:
            raise OptionError(
                f"two limits at once are of different costs and the same groups, not {first} and {second}"
            )
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "second", second)
        object.__setattr__(self, "share", min(first.share, second.share))
        object.__setattr__(self, "groups", first.groups)
        self.__post_init__()

    def __str__(self) -> str:
        return f"{self.first}+{self.second}"

    def per_weight(self, layers: PrunableLayers, model: nn.Module, uses: Mapping[str, Array]) -> Array:
        """Of the first; `TwoCosts` asks both."""
        return self.first.per_weight(layers, model, uses)


_KINDS: dict[str, type[CostBudget]] = {kind.name: kind for kind in (Flops, Bytes)}


def budget_of(value: Any) -> CostBudget | Pattern:
    """A budget, or its text form: ``"flops:0.5"``, ``"flops:0.5+bytes:0.4"``, ``"2:4"``; raises OptionError."""
    if isinstance(value, (CostBudget, Pattern)):
        return value
    if not isinstance(value, str):
        raise OptionError(
            f"budget={value!r} must be a text such as 'flops:0.5' or '2:4', Flops(0.5), or a pattern of solvers.budget "
            f"(NM, Tiles), not a {type(value).__name__}; for a number of weights use n_kept"
        )
    if "+" in value:
        first, second = (budget_of(part.strip()) for part in value.split("+", 1))
        if isinstance(first, Pattern) or isinstance(second, Pattern):
            raise OptionError(f"budget={value!r}: two limits at once are of costs, such as 'flops:0.5+bytes:0.4'")
        return Both(first, second)
    name, _, rest = value.partition(":")
    share, _, groups = rest.partition(":")
    if name.strip() in _KINDS:
        try:
            number_of = float(share)
        except ValueError:
            raise OptionError(f"budget={value!r}: {share!r} is no share; write e.g. '{name.strip()}:0.5'") from None
        return _KINDS[name.strip()](number_of, groups.strip() or None)
    try:
        return parse(value)
    except ProblemError as error:
        raise OptionError(f"{error}; costs that may remain are 'flops:0.5', 'bytes:0.5'") from None


@dataclass(frozen=True)
class Split:
    """What weights that go are worth in all, and the Lagrangian bound, which no choice within the limit falls below."""

    value: float
    bound: float

    @classmethod
    def of(cls, knapsack: Knapsack, scores: Array, pruned: Mask) -> Split:
        """Of scores (n,) of single weights and a mask."""
        return cls(float(scores[pruned].sum()), knapsack.least_sum(scores))


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of the weights of a network under a budget.

    Attributes
    ----------
    budget : CostBudget
    each : float64 (n,)
        In the order of the network.
    limit : float
        What may remain.
    labels : int64 (n,), optional
        What goes whole.
    fixed : float
        Of the whole network, beside the weights.
    """

    budget: CostBudget
    each: Array
    limit: float
    labels: Index | None = None
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """Of all prunable weights, with what stays in any case."""
        return float(self.each.sum()) + self.fixed

    def by_layer(self, layers: PrunableLayers) -> Costs:
        """All weights of a layer as dear as its dearest: numbers of weights then say what layers cost at most."""
        most = [float(self.each[layer.slice].max()) for layer in layers]
        return replace(self, each=np.repeat(most, [layer.n for layer in layers]))

    def knapsack(self, sizes: Index, least: Index) -> Knapsack:
        """The budget of single weights, with floors of ranges of them; raises ProblemError where these cost more."""
        if self.labels is not None:
            return Knapsack(np.bincount(self.labels, weights=self.each), self.limit, self.labels)
        if not least.any():
            return Knapsack(self.each, self.limit)
        return Knapsack(self.each, self.limit, sizes=sizes, min_kept=least)

    def kept(self, pruned: Mask) -> float:
        """The share that a mask (n,) keeps."""
        return (float(self.each @ ~pruned) + self.fixed) / self.total

    def summary(self, pruned: Mask, split: Split | None = None) -> dict[str, float]:
        """For a report."""
        name = self.budget.name
        found = {f"{name}_dense": self.total, f"{name}_kept": self.kept(pruned), f"{name}_limit": self.budget.share}
        return found if split is None else {**found, "split": split.value, "split_bound": split.bound}

    @classmethod
    def of(cls, budget: CostBudget, network: Streamed, batch: Batch) -> Costs:
        """Of a network, which is called on a batch where that is needed.

        Raises
        ------
        ModelError
            For a layer that the network does not call.
        """
        if isinstance(budget, Both):
            return TwoCosts.joined(budget, cls.of(budget.first, network, batch), cls.of(budget.second, network, batch))
        uses = count_uses(network, batch) if budget.counts else {}
        each = budget.per_weight(network.layers, network.model, uses)
        fixed = budget.fixed(network.layers)
        limit = budget.share * (float(each.sum()) + fixed) - fixed
        if limit < 0.0:
            least = fixed / (float(each.sum()) + fixed)
            raise OptionError(
                f"{least:.4g} of the {budget.name} stay whatever is removed; the share is {budget.share!r}"
            )
        return cls(budget, each, limit, channels_of(network.layers) if budget.groups == "channels" else None, fixed)


@dataclass(frozen=True, eq=False, kw_only=True)
class TwoCosts(Costs):
    """Costs under two limits: those of the first, and the second beside them."""

    second: Costs

    @classmethod
    def joined(cls, budget: Both, first: Costs, second: Costs) -> TwoCosts:
        """Of each alone."""
        return cls(
            budget=budget.first,
            each=first.each,
            limit=first.limit,
            labels=first.labels,
            fixed=first.fixed,
            second=second,
        )

    def knapsack(self, sizes: Index, least: Index) -> Knapsack:
        """Both limits at once."""
        one, other = super().knapsack(sizes, least), self.second.knapsack(sizes, least)
        limits = [float(np.asarray(knapsack.limit)[0]) for knapsack in (one, other)]
        return replace(one, costs=np.concatenate([one.table, other.table]), limit=limits)

    def summary(self, pruned: Mask, split: Split | None = None) -> dict[str, float]:
        """Of both."""
        return {**super().summary(pruned, split), **self.second.summary(pruned)}


def channels_of(layers: PrunableLayers) -> Index:
    """The number of the row of each weight, over all layers, int64 (n,)."""
    rows = [layer.n_rows for layer in layers]
    return np.repeat(np.arange(sum(rows)), np.repeat([layer.view.inputs for layer in layers], rows))


def count_uses(network: Streamed, batch: Batch) -> dict[str, Array]:
    """Positions per sample that each group of rows of each layer sees, float64 (groups,); raises ModelError."""
    found: dict[str, Array] = {}

    def see(module: nn.Module, uses: list[tuple[Any, str]], args: Any, kwargs: Any, _: Any) -> None:
        adapter = adapter_of(module)
        assert adapter is not None
        positions = adapter.positions(module, args, kwargs)
        for layer, attribute in uses:
            if attribute in positions:
                found[layer.name] = found.get(layer.name, 0.0) + np.array(positions[attribute]) / batch[2]

    with torch.no_grad(), quiet(network.model), watched(network, network.layers, see):
        network.call(batch)
    missing = [layer.name for layer in network.layers if layer.name not in found]
    if missing:
        raise ModelError(
            f"the network does not call layer {missing[0]!r} on calibration samples, so what it costs is not known; "
            "exclude it, or use sparsity instead of a budget of costs"
        )
    return found
