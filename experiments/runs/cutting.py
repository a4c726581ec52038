"""Cutting blocks of a given size out of a network, as instances for comparing solvers.

A block is a run of consecutive weights of a layer. Its H is that of the gradients, or of what the layer sees, of which
weights of one row are cut: s = 1, and C of the block's inputs. Or it is a whole layer whose channels (rows) go whole:
then a weight of the block stands for a channel (`solvers.aggregate`), under the selection objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

import cbs_opt
from cbs_opt.data.forward import Forward
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.setup import LAYERWISE
from cbs_opt.measure.fisher import DEFAULT_ROWS
from cbs_opt.measure.layer_inputs import Accumulator, InputMoment, Streamed, quiet
from experiments.networks import get_experiment
from experiments.networks.experiment import Experiment
from experiments.networks.load import Network, Say, Source, open_network
from solvers import Groups, QuadraticBlock, SelectionProblem, save_block
from solvers.aggregate import aggregate
from solvers.errors import OptionError

#: Share of the weights of a block that must have some gradient, or inputs: dead input pixels make empty instances.
_ALIVE = 0.9
#: Layers whose inputs are measured, drawn with the seed; their moments lie in memory together.
_MOST_MOMENTS = 8
_MEASURED = ("fisher", "layer_inputs")


@dataclass(frozen=True, eq=False)
class Cut:
    """A block, and in words where it was in its network."""

    block: QuadraticBlock
    place: str


#: A block of so many weights, under a name.
Draw = Callable[[np.random.Generator, int, str], Cut]


@dataclass(frozen=True)
class CutOptions:
    """Blocks that are cut from a network."""

    block_size: Annotated[int, "Weights of each block; the most channels of one."] = 100
    count: Annotated[int, "Blocks to cut."] = 20
    fisher_samples: Annotated[int | None, "Rows of the factor, or samples, instead of the experiment's."] = None
    damping: Annotated[float | None, "Instead of the experiment's; of layer inputs relative, 0.01."] = None
    curvature: Annotated[str | None, "fisher, or layer_inputs: of rows of layers; default: the experiment's."] = None
    channels: Annotated[bool, "A layer of at most --block-size channels each, which go whole."] = False

    def __post_init__(self) -> None:
        for name, value, least in (("--block-size", self.block_size, 2), ("--count", self.count, 1)):
            if value < least:
                raise OptionError(f"{name} must be at least {least}, got {value}")
        if self.curvature is not None and self.curvature not in _MEASURED:
            raise OptionError(f"--curvature of blocks is one of {', '.join(_MEASURED)}, not {self.curvature!r}")


def cut_blocks(
    experiment: str,
    folder: Path,
    options: CutOptions,
    *,
    seed: int,
    source: Source = Source(),  # noqa: B008
    say: Say = lambda message: None,
) -> Path:
    """Write blocks of a network as .npz files, unless they are there already.

    Each block is a run of consecutive weights inside one layer, all layers having the same chance; their
    positions are drawn with the seed. Rows beyond the size are folded into a triangular factor with the same H.

    Parameters
    ----------
    experiment
        Name of the network and its data.
    folder
        The blocks go into a sub-folder of it that names these settings.

    Returns
    -------
    Path
        The sub-folder.

    Raises
    ------
    OptionError
        If no layer has that many consecutive weights with gradients.
    CBSError
        Data or checkpoint are missing or bad.
    """
    chosen, size = get_experiment(experiment), options.block_size
    kind, rows, damping = measured_as(chosen, options)
    what = ("-channels" if options.channels else "") + ("-inputs" if kind == "layer_inputs" else "")
    target = folder.expanduser() / (
        f"{chosen.name}{what}-{size}x{options.count}-seed{seed}-rows{rows}-damping{damping:g}"
    )
    wanted = [target / f"{chosen.name}{what}-{size}-{index:03d}.npz" for index in range(options.count)]
    if all(path.is_file() for path in wanted):
        return target
    draw = drawing(open_network(chosen, source, say), options, seed=seed, say=say)
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for path in wanted:
        save_block(path, draw(rng, size, path.stem).block)
    say(f"blocks: {target}")
    return target


def measured_as(chosen: Experiment, options: CutOptions) -> tuple[str, int, float]:
    """What is measured of a network, on how many samples, and the damping."""
    kind = options.curvature or ("layer_inputs" if chosen.curvature in LAYERWISE else "fisher")
    usual = 0.01 if kind == "layer_inputs" else chosen.fisher.ridge
    rows = options.fisher_samples or chosen.fisher.n_rows or DEFAULT_ROWS
    return kind, rows, usual if options.damping is None else options.damping


def drawing(network: Network, options: CutOptions, *, seed: int, say: Say = lambda message: None) -> Draw:
    """Measure a network once; what comes back draws blocks from it, of the size of the options or of others."""
    kind, rows, damping = measured_as(network.experiment, options)
    drawn = _drawn_from_inputs if kind == "layer_inputs" else _drawn_from_gradients
    return drawn(network, options, rows, damping, seed, say)


def _drawn_from_gradients(
    network: Network, options: CutOptions, rows: int, damping: float, seed: int, say: Say
) -> Draw:
    """Blocks of the empirical Fisher."""
    chosen, size = network.experiment, options.block_size
    fisher = replace(chosen.fisher, blocks="per_layer", first_order=True, n_rows=rows, damping=damping)
    say(f"gradients of {chosen.name}: {rows} rows")
    prepared = cbs_opt.prepare(
        network.model,
        network.dataset.calibration(max(rows * fisher.batch_size, min(chosen.least_samples, 1000)), seed),
        chosen.criterion.loss,
        fisher=fisher,
        include=chosen.include or ("*",),
        exclude=chosen.exclude,
        device=network.device,
        seed=seed,
    )
    blocks = list(zip(prepared.layers, prepared.blocks.blocks, strict=True))
    if options.channels:
        return _channels([(block, layer.n_rows, layer.name) for layer, block in blocks], options)
    if not any(block.n >= size for _, block in blocks):
        raise OptionError(f"--block-size {size}: no layer of {chosen.name} has that many weights; use a smaller one")
    layers = [(layer.name, block) for layer, block in blocks]
    return lambda rng, size, name: _draw(layers, size, rng, damping, name)


def _drawn_from_inputs(network: Network, options: CutOptions, rows: int, damping: float, seed: int, say: Say) -> Draw:
    """Blocks of what layers see, in the dense network."""
    chosen, size = network.experiment, options.block_size
    found = cbs_opt.find_layers(network.model, include=chosen.include or ("*",), exclude=chosen.exclude)
    some = [layer for layer in found if (layer.n_rows <= size if options.channels else layer.view.inputs >= size)]
    if not some:
        what = "so few channels" if options.channels else "so many inputs"
        raise OptionError(f"--block-size {size}: no layer of {chosen.name} has {what}; use another size")
    picked = np.random.default_rng(seed).permutation(len(some))[:_MOST_MOMENTS]
    layers = [some[at] for at in sorted(picked.tolist())]
    say(f"inputs of {len(layers)} of {len(found)} layers of {chosen.name}: {rows} samples")
    stream = BatchStream(network.dataset.calibration(rows, seed))
    streamed = Streamed(network.model, found, stream, Forward(network.model, chosen.criterion.loss), network.device)
    accumulator = Accumulator(streamed, layers)
    with torch.no_grad(), quiet(network.model):
        for number, batch in enumerate(streamed.batches()):
            with accumulator.watching(batch, number):
                streamed.call(batch)
    moments = [accumulator.moments[layer.name] for layer in layers]
    weights = [layer.view.flatten(getattr(*layer.held(network.model)).detach()).double().cpu() for layer in layers]
    if options.channels:
        blocks = [
            (block, layer.n_rows // layer.view.groups, layer.name)
            for layer, moment, w in zip(layers, moments, weights, strict=True)
            for block in moment.blocks(w, damping)
        ]
        return _channels(blocks, options)
    return lambda rng, size, name: _draw_row(moments, weights, size, rng, damping, name)


def _channels(layers: Sequence[tuple[QuadraticBlock, int, str]], options: CutOptions) -> Draw:
    """Gives layer after layer as a block of its rows; raises OptionError where there are not as many."""
    some = [layer for layer in layers if 2 < layer[1] <= options.block_size]
    if len(some) < options.count:
        raise OptionError(
            f"--channels: {len(some)} layers have 3 to {options.block_size} channels, not {options.count}; change "
            "--count or --block-size"
        )
    turns = iter(some)

    def draw(_: np.random.Generator, __: int, name: str) -> Cut:
        block, rows, layer = next(turns)
        whole = aggregate(SelectionProblem([block], Groups(np.repeat(np.arange(rows), block.n // rows), 1)))
        (found,) = whole.problem.blocks
        gradient = None if found.gradient is None else found.gradient.cpu()
        factor = _folded(found.factor.double().cpu())
        return Cut(QuadraticBlock(found.weights.cpu(), factor, found.damping, gradient, name), f"channels of {layer}")

    return draw


def _folded(factor: torch.Tensor) -> torch.Tensor:
    """A factor of the same H with no more rows than columns."""
    return torch.linalg.qr(factor, mode="r").R if factor.shape[0] > factor.shape[1] else factor


def _draw(
    layers: Sequence[tuple[str, QuadraticBlock]], size: int, rng: np.random.Generator, damping: float, name: str
) -> Cut:
    """One block at a random position of a random layer."""
    large = [layer for layer in layers if layer[1].n >= size]
    for _ in range(1000 if large else 0):
        place, layer = large[int(rng.integers(len(large)))]
        start = int(rng.integers(layer.n - size + 1))
        columns = layer.factor[:, start : start + size].double()
        alive = float((columns.abs().sum(0) > 0).double().mean())
        if alive >= _ALIVE:
            gradient = None if layer.gradient is None else layer.gradient[start : start + size]
            columns = _folded(columns).cpu()
            block = QuadraticBlock(layer.weights[start : start + size], columns, damping, gradient, name)
            return Cut(block, f"weights {start} to {start + size - 1} of {place}")
    raise OptionError(f"--block-size {size}: found no run of weights with gradients; use a smaller block")


def _draw_row(
    moments: Sequence[InputMoment],
    weights: Sequence[torch.Tensor],
    size: int,
    rng: np.random.Generator,
    damping: float,
    name: str,
) -> Cut:
    """Some consecutive inputs of a random row of a random layer."""
    wide = [at for at, moment in enumerate(moments) if moment.layer.view.inputs >= size]
    for _ in range(1000 if wide else 0):
        at = wide[int(rng.integers(len(wide)))]
        view = moments[at].layer.view
        row, start = int(rng.integers(view.rows)), int(rng.integers(view.inputs - size + 1))
        moment = moments[at].matrices[row * view.groups // view.rows].cpu()
        part = moment[start : start + size, start : start + size]
        if float((part.diagonal() > 0).double().mean()) >= _ALIVE:
            values, vectors = torch.linalg.eigh(part)
            factor = values.clamp_min(0.0).sqrt().unsqueeze(1) * vectors.T
            first = row * view.inputs + start
            ridge = damping * float(moment.diagonal().mean())
            block = QuadraticBlock(weights[at][first : first + size], _folded(factor), ridge, None, name)
            place = f"inputs {start} to {start + size - 1} of row {row} of {moments[at].layer.name}"
            return Cut(block, place)
    raise OptionError(f"--block-size {size}: found no run of inputs that are not zero; use a smaller block")
