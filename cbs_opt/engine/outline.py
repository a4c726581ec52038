"""What a plan would do to a network, found without doing it: layers, blocks, budget, memory and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cbs_opt.data.forward import LossFunction
from cbs_opt.engine.choice import Choice, Extent
from cbs_opt.engine.estimate import Estimate, available_memory
from cbs_opt.engine.layer_network import LayerwiseNetwork
from cbs_opt.engine.layerwise import open_layerwise
from cbs_opt.engine.run import estimate
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.measure.blocks import contiguous_partition
from cbs_opt.network.finding import find_layers
from cbs_opt.network.layers import PrunableLayers
from solvers.errors import OptionError

#: Passes of a network that its moments take: each segment is run to be measured, and again when it is pruned.
_PASSES = 2


@dataclass(frozen=True, eq=False)
class Outline:
    """What would be done.

    Attributes
    ----------
    layers : PrunableLayers
    n_kept : int
        Weights that stay; about so many under a budget that settles no number.
    budget : str
        Where it is no number.
    blocks : tuple of int
        Weights of each block, empty where that depends on the gradients or weights alone are looked at.
    estimate : Estimate
    measuring : str
        What its seconds are of.
    training : str
        What fine-tuning would do, of which no time is estimated; empty without one.
    """

    layers: PrunableLayers
    n_kept: int
    budget: str
    blocks: tuple[int, ...]
    estimate: Estimate
    measuring: str
    training: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "layers": [
                {"name": layer.name, "kind": layer.kind, "shape": list(layer.shape), "n": layer.n}
                for layer in self.layers
            ],
            "skipped": [
                {"name": skip.name, "shape": list(skip.shape), "reason": skip.reason} for skip in self.layers.skipped
            ],
            "n": self.layers.n,
            "n_model": self.layers.n_model,
            "n_kept": self.n_kept,
            "budget": self.budget or None,
            "blocks": {"number": len(self.blocks), "largest": max(self.blocks, default=0)},
            "memory": dict(self.estimate.memory),
            "memory_available": self.estimate.available,
            "seconds": self.estimate.seconds,
            "measuring": self.measuring,
            "training": self.training or None,
        }


def outline(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction | None,
    setup: Setup,
    choice: Choice,
    stages: StageOptions | None = None,
) -> Outline:
    """What `cbs_opt.prune` with the same settings would do; it refuses what that refuses, and changes nothing.

    Raises
    ------
    CBSError
    """
    if setup.layerwise:
        network = open_layerwise(model, data, loss_fn, setup, choice)
        found, measuring = _layerwise(network), "moments of the layers' inputs, without solving"
        layers, blocks = network.layers, tuple(n for layer in network.layers for n in _per_group(layer))
    else:
        if loss_fn is None:
            raise OptionError(f"curvature={setup.curvature!r} takes a loss; pass one, or curvature='layer_inputs'")
        found = estimate(model, data, loss_fn, setup, choice, stages)
        layers = find_layers(model, include=setup.include, exclude=setup.exclude)
        curved = choice.needs is Extent.CURVATURE or stages is not None
        contiguous = curved and setup.options.spec.contiguous
        blocks = contiguous_partition(layers, setup.options.spec).sizes if contiguous else ()
        measuring = "gradients" if found.seconds else "nothing"
    budget = "" if choice.budget is None else str(choice.budget)
    return Outline(layers, choice.kept(layers.n), budget, tuple(blocks), found, measuring, _training(choice))


def _training(choice: Choice) -> str:
    options = choice.finetune
    if options is None:
        return ""
    length = f"{options.steps:,} steps" if options.steps is not None else f"{options.epochs:g} epochs"
    return f"{length} of {options.optimizer_name}"


def _per_group(layer: Any) -> list[int]:
    return [layer.n // layer.view.groups] * layer.view.groups


@torch.no_grad()
def _layerwise(network: LayerwiseNetwork) -> Estimate:
    """Bytes of the network and the moments of its largest segment; seconds from one batch."""
    chain, _ = network.chain()
    model, place = network.model.to(network.setup.place), network.setup.place
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    moments = [sum(8 * layer.view.groups * layer.view.inputs**2 for layer in segment) for segment in chain.segments]
    memory = {
        "the pruned network and its masks": size + 3 * network.layers.n,
        f"moments of the largest of {len(chain.segments)} segments": 2 * max(moments),
    }
    streamed = network.streamed()
    seconds, batches = 0.0, 1
    if not network.stream.once:
        batches = sum(1 for _ in network.stream)
    batch = next(streamed.batches()) if not network.stream.once else None
    if batch is not None:
        streamed.call(batch)
        started = time.perf_counter()
        streamed.call(batch)
        seconds = (time.perf_counter() - started) * batches * _PASSES * (3 if network.setup.curvature == "kfac" else 1)
    return Estimate(memory, available_memory(place), seconds)
