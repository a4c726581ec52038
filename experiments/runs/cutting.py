"""Cutting blocks of a given size out of a network, as instances for comparing solvers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch.nn import functional as F

import cbs_opt
from cbs_opt.measure.fisher import DEFAULT_ROWS
from experiments.networks import ImageExperiment, get_experiment
from experiments.networks.load import Say, Source, open_network
from solvers import QuadraticBlock, save_block
from solvers.errors import OptionError

#: Share of the weights of a block that must have some gradient: dead input pixels make empty instances.
_ALIVE = 0.9


@dataclass(frozen=True)
class CutOptions:
    """Blocks that are cut from a network."""

    block_size: Annotated[int, "Weights of each block."] = 100
    count: Annotated[int, "Blocks to cut."] = 20
    fisher_samples: Annotated[int | None, "Rows of the factor, instead of the experiment's."] = None
    damping: Annotated[float | None, "Instead of the experiment's."] = None

    def __post_init__(self) -> None:
        for name, value, least in (("--block-size", self.block_size, 2), ("--count", self.count, 1)):
            if value < least:
                raise OptionError(f"{name} must be at least {least}, got {value}")


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
    if not isinstance(chosen, ImageExperiment):
        raise OptionError(f"blocks are cut from networks of images, and {experiment} is none; give another experiment")
    asked = {"n_rows": options.fisher_samples, "damping": options.damping}
    fisher = replace(
        chosen.fisher, blocks="per_layer", first_order=True, **{k: v for k, v in asked.items() if v is not None}
    )
    rows = fisher.n_rows or DEFAULT_ROWS
    target = folder.expanduser() / (
        f"{chosen.name}-{size}x{options.count}-seed{seed}-rows{rows}-damping{fisher.ridge:g}"
    )
    wanted = [target / f"{chosen.name}-{size}-{index:03d}.npz" for index in range(options.count)]
    if all(path.is_file() for path in wanted):
        return target
    network = open_network(chosen, source, say)
    images = network.dataset.train.sample(max(rows * fisher.batch_size, 1000), seed).batch(slice(None))
    say(f"gradients of {chosen.name}: {rows} rows")
    prepared = cbs_opt.prepare(
        network.model,
        images,
        F.cross_entropy,
        fisher=replace(fisher, n_rows=rows),
        include=chosen.include or ("*",),
        exclude=chosen.exclude,
        device=source.device,
        seed=seed,
    )
    layers = [block for block in prepared.blocks.blocks if block.n >= size]
    if not layers:
        raise OptionError(f"--block-size {size}: no layer of {chosen.name} has that many weights; use a smaller one")
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for path in wanted:
        save_block(path, _draw(layers, size, rng, fisher.ridge, path.stem))
    say(f"blocks: {target}")
    return target


def _draw(
    layers: list[QuadraticBlock], size: int, rng: np.random.Generator, damping: float, name: str
) -> QuadraticBlock:
    """One block at a random position of a random layer."""
    for _ in range(1000):
        layer = layers[int(rng.integers(len(layers)))]
        start = int(rng.integers(layer.n - size + 1))
        columns = layer.factor[:, start : start + size].double()
        alive = float((columns.abs().sum(0) > 0).double().mean())
        if alive >= _ALIVE:
            if columns.shape[0] > size:
                columns = torch.linalg.qr(columns, mode="r").R
            gradient = None if layer.gradient is None else layer.gradient[start : start + size]
            return QuadraticBlock(layer.weights[start : start + size], columns.cpu(), damping, gradient, name)
    raise OptionError(f"--block-size {size}: found no run of weights with gradients; use a smaller block")
