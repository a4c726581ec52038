"""What a user of a result has to know: layers whose gradients say nothing, layers and outputs that collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from cbs_opt.network.layers import PrunableLayers
from cbs_opt.report.records import DistillRecord, FineTuneRecord
from solvers.arrays import Array, Mask

#: Share of the network that may be skipped without being asked, and of a layer whose curvature may lie below λ.
_SKIPPED_SHARE, _DAMPED_SHARE = 0.1, 0.5
_COLLAPSED = "the pruned network gives the same output for all calibration samples looked at: it has collapsed"


def skipped_warnings(layers: PrunableLayers) -> tuple[str, ...]:
    """A warning where much of a network was skipped without being asked."""
    found = [(skip.name, math.prod(skip.shape)) for skip in layers.skipped if not skip.asked]
    share = sum(n for _, n in found) / layers.n_model
    if share <= _SKIPPED_SHARE:
        return ()
    names = ", ".join(name for name, _ in found)
    return (
        f"{share:.1%} of the network's weights were skipped without being asked: {names}; see `skipped` for the "
        "reasons, and exclude what is meant to stay",
    )


def gradient_warnings(layers: PrunableLayers, silent: Iterable[str]) -> tuple[str, ...]:
    """A warning for layers by name whose gradients are all zero."""
    return tuple(
        f"layer {name!r}: every gradient is zero, so its weights were chosen by the damping and their size alone; look "
        "for what cuts it off from the loss (no_grad, detach, checkpointing behind inputs without gradients, a part "
        "that is never used, underflow in halves or of a tiny loss), or exclude it"
        for name in silent
    )


def curvature_warnings(layers: PrunableLayers, diagonal: Array, damping: float) -> tuple[str, ...]:
    """Warnings for layers without curvature, and for those whose curvature lies below λ.

    Parameters
    ----------
    layers : PrunableLayers
    diagonal : float64 (n,)
        H_ii with λ in it, in the order of the network.
    damping : float
        λ.
    """
    measured = diagonal - damping
    # What is left of λ + 0 after rounding.
    silent = [layer.name for layer in layers if not (measured[layer.slice] > 4e-16 * damping).any()]
    below = {
        layer.name: float((measured[layer.slice] < damping).mean()) for layer in layers if layer.name not in silent
    }
    damped = {name: share for name, share in below.items() if share > _DAMPED_SHARE}
    found = gradient_warnings(layers, silent)
    if damped:
        listed = ", ".join(f"{name} {share:.1%}" for name, share in damped.items())
        found += (
            f"λ = {damping:.3g} is larger than the curvature of most weights of {len(damped)} of {len(layers)} layers "
            f"({listed}), whose choice is then close to magnitude's; AᵀA has a mean diagonal of {measured.mean():.3g}: "
            "a smaller damping, or FisherOptions(relative_damping=0.1), may do much better",
        )
    return found


def collapse_warnings(layers: PrunableLayers, pruned: Mask, constant: bool) -> tuple[str, ...]:
    """Warnings for layers of which nothing is left, and for an output that no longer depends on the input."""
    empty = [layer.name for layer in layers if pruned[layer.slice].all()]
    found, n_kept = [], int(np.count_nonzero(~pruned))
    if n_kept < len(layers):
        found.append(f"the {n_kept} weights that stay are fewer than the {len(layers)} layers, so some must be empty")
    if empty:
        found.append(
            f"nothing is left of {len(empty)} of {len(layers)} layers: {', '.join(empty)}; unless something leads "
            "around them the network is cut in two: ask for a lower sparsity, min_kept=1, or exclude them"
        )
    if constant:
        found.append(_COLLAPSED)
    return tuple(found)


def repruning_warnings(n_kept: int, before: int, after: int, n: int) -> tuple[str, ...]:
    """A warning where more weights count as kept than the network given had, being pruned before."""
    if n_kept <= before:
        return ()
    return (
        f"{n_kept} weights count as kept, but only {before} of the network given are not zero (it was pruned before) "
        f"and {after} of this one; ask for a sparsity of {1 - before / n:.4g} or more to prune it further",
    )


def norm_warnings(old: float, new: float) -> tuple[str, ...]:
    """A warning where re-estimated statistics of batch norms have raised the calibration loss."""
    if not new > old:
        return ()
    return (
        f"re-estimating the statistics of batch norms raised the calibration loss from {old:.4g} to {new:.4g}: the "
        "samples are too few, or the weights too much as they were; leave it out, or pass more data",
    )


def distill_warnings(done: DistillRecord, before: float, after: float) -> tuple[str, ...]:
    """A warning where a distillation has gained nothing, or has raised the calibration loss."""
    if done.steps_kept and after > before:
        return (
            f"distillation lowered the {done.loss} and raised the calibration loss from {before:.4g} to {after:.4g}, "
            "which was lowered before it already (stages do that); Distill(loss='given') lowers the loss itself",
        )
    if done.steps_kept:
        return ()
    return (
        f"distillation gained nothing: no step length tried lowered the {done.loss} on {done.n_held_out} held-out "
        f"samples ({done.loss_before:.4g}), and the weights are as before; try another lr, more steps or more data",
    )


def without_collapse(warnings: Iterable[str]) -> tuple[str, ...]:
    """Warnings of a network that no longer gives the same output for all samples."""
    return tuple(warning for warning in warnings if warning != _COLLAPSED)


def fine_tune_warnings(done: FineTuneRecord) -> tuple[str, ...]:
    """Warnings where a fine-tuning has diverged or gained nothing."""
    found = [f"{note}; try a smaller lr" for note in done.notes if "not finite" in note]
    if not done.steps_kept:
        found.append(
            f"fine-tuning gained nothing: no state on the way had a lower loss on {done.n_held_out} held-out samples "
            f"than {done.loss_before:.4g}, and the network is as before; try another lr, more steps or more data"
        )
    return tuple(found)


def nonzero(weights: Sequence[Tensor]) -> int:
    """How many entries are not zero."""
    return sum(int(torch.count_nonzero(w.detach())) for w in weights)
