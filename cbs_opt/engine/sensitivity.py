"""Sensitivity: what the network says when one layer alone is pruned.

For each layer and a few levels, the dense network with that share of the layer's weights removed, and its others
updated, is run on samples held out. Held out, because where a layer has more inputs than were seen, weights fitted to
what was seen look better than they are. The value is the divergence of the outputs from the dense ones where they are
logits or there is no loss (`cbs_opt.data.divergence`): near the dense network it is what pruning does to the loss in
the mean over labels, without the noise of the labels of few samples, which hides changes of a thousandth. Else it is
the loss.

The layers of a segment are measured with those before dense, so their outputs are kept and only the rest of the network
is run. Between levels the excess over the dense network is taken as a power of the share (a straight line in double
logarithms, the first one going on to 0 with an exponent in [1, 4]), and its lower convex hull makes a `CostCurve`; the
budget is split by `split_curves`.

Layers are pruned by solver and update as asked for where these look at each weight once, or the network is small; else
by `sweep` with its own weights, which costs a fraction of the others and errs in the same places. Of more than
`MOST_LAYERS` layers, those of one kind (names that differ in numbers, same shape) are measured at even distances, the
first and the last always, and the curves of the others are interpolated.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import scipy
import torch

from cbs_opt.data.divergence import divergence, logits_of
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.data.stream import BatchStream, StreamPart
from cbs_opt.data.trees import leaves
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.layer_network import LayerPruner, LayerwiseNetwork
from cbs_opt.engine.update import Update
from cbs_opt.measure.layer_inputs import Batch, InputMoment
from cbs_opt.measure.segment_passes import SegmentPasses
from cbs_opt.measure.segments import Chain
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.report.sensitivity import LayerCurve, Sensitivity
from solvers import make_solver
from solvers.allocation import CostCurve
from solvers.arguments import number
from solvers.errors import DataError, OptionError

MEASURES = ("loss", "divergence")
#: Layers that are measured, at most about.
MOST_LAYERS = 56
#: Samples held out to measure by, and, of sequences, tokens.
_SAMPLES, _TOKENS = 32, 512
#: Solvers that look at each weight once: their time is that of `sweep` or less.
_QUICK = ("random", "magnitude", "obd", "woodfisher", "sweep")
#: Others that prune a network of so many weights in seconds.
_SLOWER, SMALL = ("admm", "iht", "obs"), 1_000_000
#: Exponent of the cost between nothing and the first level.
_EXPONENTS = (1.0, 4.0)
#: Points of a curve between the levels.
_POINTS = 64
#: Times the largest finite value, for those that are not finite.
_BEYOND = 10.0


@dataclass(frozen=True, eq=False)
class Parts:
    """Samples by which layers are pruned, those by which curves are measured, and those by which candidates are judged.

    Attributes
    ----------
    fit, probes, held : BatchStream
        No sample is in two of them.
    rough : BatchStream
        A third of `fit`, a sixth of sequences, by which candidates are pruned.
    """

    fit: BatchStream
    rough: BatchStream
    probes: BatchStream
    held: BatchStream

    @classmethod
    def of(cls, stream: BatchStream, *, judged: bool = False) -> Parts:
        """Evenly spaced, deterministic; `held` is empty unless candidates are to be judged. Raises DataError."""
        n = stream.n or sum(size for *_, size in stream)
        if n < 4:
            raise DataError(
                f"measured shares hold calibration samples back, and there are {n}; pass at least 4, or take another "
                "allocation"
            )
        wanted = _samples(stream.first())
        m = min(wanted, n // 4)
        # Two evenly spaced sets at distances of at least 4, the second one between the first.
        probes = np.arange(m, dtype=np.int64) * n // m
        k = min(4 * wanted, n // 4) if judged else 0
        rest = np.setdiff1d(np.arange(n, dtype=np.int64), probes)
        held = rest[(2 * np.arange(k) + 1) * len(rest) // (2 * k)] if k else rest[:0]
        fit = np.setdiff1d(rest, held)
        rough = fit[::3] if wanted == _SAMPLES else fit[::6]
        parts = (fit, rough, probes, held)
        return cls(*(StreamPart(stream, part, stored=number >= 2) for number, part in enumerate(parts)))


def _samples(batch: Batch) -> int:
    first = next(tensor for _, tensor in leaves(batch[0]))
    sequences = first.ndim == 2 and not first.is_floating_point()
    return max(_TOKENS // first.shape[1], 1) if sequences else _SAMPLES


class Judge:
    """Mean loss of a network, or its divergence from the dense one, on some samples.

    Parameters
    ----------
    network : LayerwiseNetwork
        Dense when `keep` is called.
    measure : {"loss", "divergence"}, optional
        None chooses, see the module's docstring.

    Raises
    ------
    OptionError
        For a loss where none was given.
    """

    def __init__(self, network: LayerwiseNetwork, measure: str | None = None) -> None:
        if measure == "loss" and not network.has_loss:
            raise OptionError("measure='loss' takes a loss; pass loss_fn, or measure='divergence'")
        self.network = network
        self.measure = measure if network.has_loss else "divergence"
        self._dense: list[object] = []

    def keep(self, outputs: Iterator[tuple[Batch, object]]) -> float:
        """Take outputs as those of the dense network; its value."""
        pairs = list(outputs)
        if self.measure is None:
            logits = all(logits_of(output, batch[1]) is not None for batch, output in pairs)
            self.measure = "divergence" if logits else "loss"
        self._dense = [output for _, output in pairs] if self.measure == "divergence" else []
        return self.value(iter(pairs))

    def value(self, outputs: Iterator[tuple[Batch, object]]) -> float:
        """Of outputs of all batches."""
        total, seen = 0.0, 0.0
        for batch, ((inputs, targets, size), output) in enumerate(outputs):
            if self.measure == "loss":
                with typed_failures(inputs, targets):
                    found, count = float(self.network.forward.loss(output, inputs, targets)) * size, float(size)
            else:
                found, count = divergence(output, self._dense[batch], inputs, targets)
            total, seen = total + found, seen + count
        return total / seen if seen else total


def levels_around(sparsity: float, layers: int = 1) -> tuple[float, ...]:
    """Levels around a sparsity: two thirds of it, it, half of what is left, and 1; of few layers also a third of it."""
    levels = (sparsity / 3, 2 * sparsity / 3, sparsity, (1 + sparsity) / 2, 1.0)
    return levels if layers <= MOST_LAYERS else levels[1:]


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Rising, in (0, 1], with 1 at the end."""
    found = tuple(number("a level", level, positive=True, most=1.0, remedy="a share of a layer") for level in levels)
    if not found or any(b <= a for a, b in pairwise(found)):
        raise OptionError(f"levels must rise, at least one of them, not {list(levels)}")
    return found if found[-1] == 1.0 else (*found, 1.0)


def quick(choice: Choice, n: int) -> Choice:
    """The choice by which layers of a network of `n` weights are pruned to find shares; see the module's docstring."""
    looks_once = choice.solver.name in _QUICK and choice.update in (Update.NONE, Update.OWN)
    if looks_once or (n <= SMALL and choice.solver.name in (*_QUICK, *_SLOWER)):
        return replace(choice, allocation=None)
    sweep = make_solver("sweep")
    return replace(choice, solver=sweep, update=Update.OWN, objective=None, time_limit=None, allocation=None)


def measured_curves(
    network: LayerwiseNetwork,
    choice: Choice,
    chain: Chain,
    parts: Parts,
    levels: Sequence[float],
    progress: Callable[[int, int], None] | None = None,
    value: str | None = None,
) -> Sensitivity:
    """Curves of all layers of a dense network, which is dense again afterwards.

    Raises
    ------
    PathError
        If data take other paths than those by which the segments were found.
    """
    started = time.perf_counter()
    how = quick(choice, network.layers.n)
    pruner, judge = LayerPruner(network, how, "uniform"), Judge(network, value)
    empty = Chain(chain.cuts, ((),) * len(chain.segments))
    probes = SegmentPasses(network.streamed(parts.probes), empty)
    wanted = chosen_layers(network.layers)
    some = Chain(chain.cuts, tuple(tuple(layer for layer in part if layer.name in wanted) for part in chain.segments))
    values: dict[str, list[float]] = {}
    dense = math.nan
    passes = zip(SegmentPasses(network.streamed(parts.fit), some), probes, strict=True)
    for segment, (moments, _) in enumerate(passes):
        if not segment:
            dense = judge.keep(probes.outputs(0))
        for moment in moments:
            values[moment.layer.name] = [
                judge.value(probes.outputs(segment)) for _ in _pruned(network, pruner, moment, levels)
            ]
            if progress is not None:
                progress(len(values), len(wanted))
    curves = interpolated(network.layers, values)
    name = f"{how.solver.spec} + {how.update.value}"
    seconds = time.perf_counter() - started
    return Sensitivity(str(judge.measure), dense, tuple(levels), curves, name, parts.probes.n, seconds)


def _pruned(
    network: LayerwiseNetwork, pruner: LayerPruner, moment: InputMoment, levels: Sequence[float]
) -> Iterator[float]:
    """Levels at which a layer is pruned when they are yielded; in the end it is dense."""
    layer = moment.layer
    before, blocks = network.weights(layer), network.blocks(moment)
    most = layer.n - int(pruner.floors.inside(layer.start, layer.stop).least.sum())
    try:
        for level in levels:
            if level == 1.0:
                network.write(layer, torch.zeros_like(before))
            else:
                pruner.prune(layer, blocks, min(round(level * layer.n), most))
            yield level
    finally:
        network.write(layer, before)


def chosen_layers(layers: PrunableLayers, most: int = 0) -> set[str]:
    """Names of those that are measured; see the module's docstring."""
    kinds = _kinds(layers)
    every = -(-len(layers) // (most or MOST_LAYERS))
    found = set()
    for names in kinds.values():
        count = min(max(-(-len(names) // every), 2), len(names))
        found |= {names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)}
    return found


def _kinds(layers: PrunableLayers) -> dict[tuple[str, tuple[int, ...]], list[str]]:
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for layer in layers:
        kinds.setdefault((re.sub(r"\d+", "*", layer.name), tuple(layer.view.shape)), []).append(layer.name)
    return kinds


def interpolated(layers: PrunableLayers, values: dict[str, list[float]]) -> tuple[LayerCurve, ...]:
    """Curves of all layers from those of some."""
    table = {name: np.asarray(row) for name, row in values.items()}
    for names in _kinds(layers).values():
        known = [i for i, name in enumerate(names) if name in values]
        rows = np.array([values[names[i]] for i in known])
        for i, name in enumerate(names):
            table[name] = np.array([np.interp(i, known, column) for column in rows.T])
    sizes = [(layer.name, layer.n) for layer in layers]
    return tuple(LayerCurve(name, n, tuple(table[name].tolist()), name in values) for name, n in sizes)


def cost_curves(found: Sensitivity) -> list[CostCurve]:
    """What the split is made by."""
    excess = np.array([row.values for row in found.layers]) - found.dense
    finite = excess[np.isfinite(excess)]
    top = float(finite.max()) if finite.size else 1.0
    excess = np.where(np.isfinite(excess), excess, _BEYOND * max(top, 0.0))
    # Below this all is rounding.
    least = 1e-9 * max(top, 1e-30)
    levels = np.asarray(found.levels)
    return [_curve(levels, row, layer.n, least) for row, layer in zip(excess, found.layers, strict=True)]


def _curve(levels: np.ndarray, excess: np.ndarray, n: int, least: float) -> CostCurve:
    """Powers between the levels; see the module's docstring."""
    rising = np.maximum(np.asarray(scipy.optimize.isotonic_regression(excess).x), least)
    points = np.unique(np.concatenate([np.linspace(0, 1, _POINTS + 1), 1 - np.geomspace(1, 1e-3, _POINTS), levels]))
    removed = np.unique(np.round(points * n).astype(np.int64))
    x, y = np.log(levels), np.log(rising)
    exponent = np.clip((y[1] - y[0]) / (x[1] - x[0]), *_EXPONENTS) if len(x) > 1 else 2.0
    at = np.log(removed[1:] / n)
    logs = np.where(at < x[0], y[0] + exponent * (at - x[0]), np.interp(at, x, y))
    return CostCurve(removed, np.concatenate([[0.0], np.exp(logs)]))
