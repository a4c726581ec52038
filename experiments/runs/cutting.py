"""Cutting blocks of a given size out of a network, as instances for comparing solvers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import cbs_opt
from cbs_opt.measure.fisher import DEFAULT_ROWS
from experiments.datasets import load_dataset
from experiments.networks import get_experiment
from experiments.networks.load import load_network
from solvers import QuadraticBlock, save_block
from solvers.errors import OptionError

Say = Callable[[str], None]

#: Share of the weights of a block that must have some gradient: dead input pixels make empty instances.
_ALIVE = 0.9


def cut_blocks(
    experiment: str,
    folder: Path,
    *,
    size: int,
    count: int,
    seed: int,
    data_dir: Path | None = None,
    checkpoint: Path | None = None,
    samples: int | None = None,
    damping: float | None = None,
    say: Say = lambda message: None,
) -> Path:
    """Write `count` blocks of `size` weights as .npz files, unless they are there already.

    Each block is a run of consecutive weights inside one layer, all layers having the same chance; their
    positions are drawn with the seed. Rows beyond `size` are folded into a triangular factor with the same H.

    Parameters
    ----------
    experiment
        Name of the network and its data.
    folder
        The blocks go into a sub-folder of it that names these settings.
    samples, damping
        Instead of the experiment's.

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
    chosen = get_experiment(experiment)
    rows = (chosen.fisher.n_rows or DEFAULT_ROWS) if samples is None else samples
    strength = chosen.fisher.damping if damping is None else damping
    target = folder.expanduser() / f"{chosen.name}-{size}x{count}-seed{seed}-rows{rows}-damping{strength:g}"
    wanted = [target / f"{chosen.name}-{size}-{index:03d}.npz" for index in range(count)]
    if all(path.is_file() for path in wanted):
        return target
    dataset = load_dataset(chosen.dataset, data_dir)
    network = load_network(chosen, dataset, checkpoint=checkpoint, data_dir=data_dir, say=say)
    images = dataset.train.sample(max(rows * chosen.fisher.batch_size, 1000), seed).batch(slice(None))
    say(f"gradients of {chosen.name}: {rows} rows")
    prepared = cbs_opt.prepare(
        network.model,
        images,
        F.cross_entropy,
        fisher=cbs_opt.FisherOptions(
            n_rows=rows, batch_size=chosen.fisher.batch_size, damping=strength, blocks="per_layer", first_order=True
        ),
        include=chosen.include or ("*",),
        exclude=chosen.exclude,
        seed=seed,
    )
    layers = [block for block in prepared.blocks.blocks if block.n >= size]
    if not layers:
        raise OptionError(f"--block-size {size}: no layer of {chosen.name} has that many weights; use a smaller one")
    target.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for path in wanted:
        save_block(path, _draw(layers, size, rng, strength, path.stem))
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
