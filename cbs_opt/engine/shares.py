"""How many weights each layer loses, where layers are pruned one by one.

``uniform`` and ``rows`` give all layers the same sparsity; ``magnitude``, ``saliency``, ``surgeon`` and ``marginal``
put one threshold over the scores of all layers (`solvers.allocation`), for which, but for magnitudes, the dense
network is measured once; where there is a loss, its mean squared gradients at their outputs scale the rows, as in
`kfac`. ``measured`` asks the network itself (`sensitivity`).

None of these is right on every network. ``best``, or several names, tries them: under each, layer by layer, the
network is pruned by the solver and update of `sensitivity.quick` on a third of the calibration data (of sequences a
sixth), and its loss (or divergence) is taken on samples that played no part in that, nor in measuring. Then the
middles between the best and uniform, and between the best and the second, are tried too, and the least of all is
taken. The network is dense again afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.choice import BEST, MEASURED, Choice
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.layer_network import LayerPruner, LayerwiseNetwork, PrunedLayer
from cbs_opt.engine.sensitivity import Judge, Parts, cost_curves, levels_around, measured_curves, quick
from cbs_opt.measure.costs import Costs, Split
from cbs_opt.measure.layer_inputs import Batch, InputMoment, quiet
from cbs_opt.measure.segment_passes import SegmentPasses
from cbs_opt.measure.segments import Chain
from cbs_opt.network.layers import Layer
from cbs_opt.report.sensitivity import Candidate, Sensitivity
from solvers import SelectionProblem
from solvers.allocation import SCORES, CostCurve, split_costs, split_curves, uniform_shares
from solvers.arrays import Index
from solvers.errors import OptionError
from solvers.ranking import prune_smallest_magnitudes

#: What ``best`` stands for.
CANDIDATES = ("uniform", "magnitude", "surgeon", MEASURED)


@dataclass(frozen=True, eq=False)
class Shares:
    """What each layer loses, and how that was found.

    Attributes
    ----------
    counts : int64 (layers,)
        With floors kept.
    rule : str
        The allocation, or the candidate that was taken.
    sensitivity : Sensitivity, optional
    candidates : tuple of Candidate
    notes : tuple of str
    split : Split, optional
        Under a budget of costs, what the rule's choice is worth beside its bound; but for ``uniform``.
    """

    counts: Index
    rule: str
    sensitivity: Sensitivity | None
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]
    split: Split | None = None


def prune_segments(
    network: LayerwiseNetwork,
    chain: Chain,
    pruner: LayerPruner,
    counts: Index,
    stream: BatchStream,
    told: Callable[[Layer, InputMoment, PrunedLayer], None] = lambda *_: None,
) -> None:
    """Prune all layers, segment by segment."""
    by_name = dict(zip(network.layers.names, counts.tolist(), strict=True))
    options = network.options
    dense = network.dense_weight if options.towards_dense else None
    for moments in SegmentPasses(network.streamed(stream), chain, in_order=options.in_order, dense=dense):
        for moment in moments:
            layer = moment.layer
            told(layer, moment, pruner.prune(layer, network.blocks(moment), by_name[layer.name]))


class Sharing:
    """The rules, on one network that is dense; see the module's docstring.

    Parameters
    ----------
    network : LayerwiseNetwork
    choice : Choice
    chain : Chain
    rule : str or tuple of str
    """

    def __init__(self, network: LayerwiseNetwork, choice: Choice, chain: Chain, rule: str | tuple[str, ...]) -> None:
        self.network, self.choice, self.chain = network, choice, chain
        self.names = CANDIDATES if rule == BEST else (rule,) if isinstance(rule, str) else rule
        self.layers = network.layers
        self.floors = Floors.of(choice, self.layers)
        self.n_prune = self.layers.n - choice.kept(self.layers.n)
        self.costs = network.costs(choice)
        self.parts = Parts.of(network.stream, judged=True) if len(self.names) > 1 else None
        self.sensitivity: Sensitivity | None = None
        self.candidates: list[Candidate] = []
        self.splits: dict[str, Split] = {}

    def shares(self) -> Shares:
        """What each layer loses."""
        asked, name = (self._rule(self.names[0]), self.names[0]) if len(self.names) == 1 else self._best()
        if self.choice.pattern is not None:
            return Shares(asked, str(self.choice.pattern), None, (), ())
        # Those that cost differ from one another: each rule has kept floors itself.
        counts = asked if self.costs is not None else self.floors.shared(asked, self.layers)
        gains, notes = np.maximum(asked - counts, 0), []
        if gains.any():
            names = ", ".join(name for name, gain in zip(self.layers.names, gains, strict=True) if gain)
            notes.append(f"floors: {gains.sum()} weights more were left to {names}, and as many fewer to others")
        split = self.splits.get(name)
        return Shares(counts, name, self.sensitivity, tuple(self.candidates), tuple(notes), split)

    def _rule(self, name: str) -> Index:
        """What each layer loses by one rule, (layers,)."""
        if name == MEASURED and 0 < self.n_prune < self.layers.n:
            parts = self.parts or Parts.of(self.network.stream)
            levels = levels_around(self.n_prune / self.layers.n, len(self.layers))
            self.sensitivity = measured_curves(self.network, self.choice, self.chain, parts, levels)
            if self.costs is not None:
                return self._cheapest(cost_curves(self.sensitivity), self.costs)
            return split_curves(cost_curves(self.sensitivity), self.n_prune)
        if name not in SCORES and self.costs is not None:
            return self._evenly(self.costs)
        if name not in SCORES:
            return uniform_shares([layer.n for layer in self.layers], self.n_prune)
        scores = {}
        if name == "magnitude":
            scores = {layer.name: self.network.weights(layer).abs().float() for layer in self.layers}
        else:
            stream = self.network.stream if self.parts is None else self.parts.fit
            scales = self.network.compared_scales(stream if self.parts is None else self.parts.rough)
            for moments in SegmentPasses(self.network.streamed(stream), self.chain):
                for moment in moments:
                    problem = SelectionProblem(self.network.blocks(moment, scales), moment.layer.n, self.choice.goal())
                    scores[moment.layer.name] = torch.from_numpy(SCORES[name](problem)).float()
        if self.costs is None:
            chosen = prune_smallest_magnitudes([scores[layer.name].cpu() for layer in self.layers], self.n_prune)
        else:
            together = torch.cat([scores[layer.name].cpu().double() for layer in self.layers]).numpy()
            knapsack = self.costs.by_layer(self.layers).knapsack(self.floors.sizes, self.floors.least)
            chosen = knapsack.cheapest_of(together)
            self.splits[name] = Split.of(knapsack, together, chosen)
        return np.array([np.count_nonzero(chosen[layer.slice]) for layer in self.layers], dtype=np.int64)

    def _cheapest(self, curves: list[CostCurve], costs: Costs) -> Index:
        """What layers lose so that the rest is within the limit, with floors kept, at the least cost on their hulls."""
        costs = costs.by_layer(self.layers)
        each = np.array([costs.each[layer.start] for layer in self.layers])
        most = np.array([layer.n for layer in self.layers]) - self.floors.least_of(self.layers)
        counts, value, bound = split_costs(curves, each, costs.total - costs.limit, most)
        self.splits[MEASURED] = Split(value, bound)
        return counts

    def _evenly(self, costs: Costs) -> Index:
        """The same sparsity in all layers, as low as the limit allows with floors kept."""
        sizes = np.array([layer.n for layer in self.layers], dtype=np.int64)
        each = np.array([costs.by_layer(self.layers).each[layer.start] for layer in self.layers])
        room = sizes - self.floors.least_of(self.layers)

        def counts(share: float) -> Index:
            return np.asarray(np.minimum(np.ceil(sizes * share), room), dtype=np.int64)

        low, high = 0.0, 1.0
        if each @ (sizes - counts(high)) > costs.limit:
            raise OptionError(
                f"the floors of {len(sizes)} layers cost more than {costs.budget.share:.4g} of the "
                f"{costs.budget.name}; lower them, or raise the share"
            )
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if each @ (sizes - counts(middle)) <= costs.limit else (middle, high)
        return counts(high)

    def _best(self) -> tuple[Index, str]:
        """The candidate of least loss, and its name."""
        assert self.parts is not None
        self.network.model.to(self.network.setup.place)
        judge = Judge(self.network, "loss" if self.network.has_loss else None)
        judge.keep(self._outputs())
        found = {name: self._rule(name) for name in self.names}
        values = {name: self._tried(name, counts, judge) for name, counts in found.items()}
        first, second = sorted(values, key=values.__getitem__)[:2]
        for other in dict.fromkeys(("uniform", second)):
            if other in found and other != first:
                name = f"half {first}, half {other}"
                found[name] = self._middle(found[first], found[other])
                values[name] = self._tried(name, found[name], judge)
        best = min(values, key=values.__getitem__)
        return found[best], best

    def _middle(self, one: Index, other: Index) -> Index:
        """Whole numbers half way, whose sum is right."""
        total = one + other
        counts = total // 2
        if self.costs is not None:
            # Half way what stays costs half of both, so that rounding up what goes keeps the limit.
            return counts + total % 2
        # As many odd ones are rounded up as down, since both sums are the same.
        counts[np.flatnonzero(total % 2)[::2]] += 1
        return counts

    def _tried(self, name: str, counts: Index, judge: Judge) -> float:
        """Loss or divergence on what is held out of the network pruned by some shares; it is dense again afterwards."""
        assert self.parts is not None
        started = time.perf_counter()
        cheap = replace(quick(self.choice, self.layers.n), allocation="uniform")
        pruner = LayerPruner(self.network, cheap, "uniform")
        if self.costs is None:
            counts = self.floors.shared(counts, self.layers)
        prune_segments(self.network, self.chain, pruner, counts, self.parts.rough)
        self.network.model.to(self.network.setup.place)
        value = judge.value(self._outputs())
        self.network.restore()
        value = value if np.isfinite(value) else float("inf")
        self.candidates.append(Candidate(name, value, time.perf_counter() - started))
        return value

    def _outputs(self) -> Iterator[tuple[Batch, object]]:
        assert self.parts is not None
        streamed = self.network.streamed(self.parts.held)
        with torch.no_grad(), quiet(self.network.model):
            for batch in streamed.batches():
                yield batch, streamed.call(batch)
