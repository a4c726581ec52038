"""Which samples become rows of the factor, and with which weight.

``uniform``: a random permutation, every row weighted alike. ``importance``: most samples of a trained network have
gradients next to nothing, so r rows drawn uniformly hold few that matter. Sample i becomes a row with probability π_i,
Σ π_i = r, proportional to a guess of ‖g_i‖² but for a share left uniform, and the row is g_i / √(N π_i):

    E[AᵀA] = Σ_i π_i g_i g_iᵀ / (N π_i) = 1/N Σ_i g_i g_iᵀ ,

whatever the guess, and with the least mean square error where it is right (length-squared sampling: Frieze, Kannan &
Vempala, *J. ACM* 2004; Drineas, Kannan & Mahoney, *SIAM J. Comput.* 2006). The guess is the squared norm of the
gradient of the loss at the network's output, for which no more than a forward pass is needed (Katharopoulos & Fleuret,
ICML 2018). Rows are drawn without replacement by systematic sampling of a random order (Madow, 1949).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cbs_opt.data.calibration import CalibrationData, Index
from cbs_opt.data.forward import Forward
from cbs_opt.data.trees import leaves
from cbs_opt.network.modes import evaluation_mode
from solvers.arrays import Array

#: Samples looked at for each row.
POOL = 20
#: Share of the probability that is uniform: no row weighs more than its inverse times what a uniform one does.
_UNIFORM = 0.1
_BATCH = 256


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """Samples and weights of rows.

    Attributes
    ----------
    index : int64 (r, b)
        Sample numbers.
    scale : float64 (r,), optional
        A row of A is its gradient times this; None is 1 / √r.
    notes : tuple of str
        Why the rows were not drawn as asked for.
    """

    index: Index
    scale: Array | None = None
    notes: tuple[str, ...] = ()


def draw_rows(
    model: torch.nn.Module,
    data: CalibrationData,
    forward: Forward,
    shape: tuple[int, int],
    *,
    importance: bool,
    seed: int,
    device: torch.device,
) -> DrawnRows:
    """Rows (r, b) of samples; by importance only where rows are single samples and there are more samples than rows.

    Parameters
    ----------
    model : nn.Module
        On `device`.
    data : CalibrationData
    forward : Forward
    shape : (r, b)
    importance : bool
    seed : int
    device : torch.device
    """
    rows, size = shape
    drawn = data.draw(rows, size, seed)
    pool = min(data.n, POOL * rows)
    if not importance or size != 1 or pool <= rows:
        return DrawnRows(drawn)
    candidates = data.draw(pool, 1, seed)[:, 0]
    try:
        with evaluation_mode(model):
            norms = np.concatenate(
                [
                    _output_gradients(model, data, forward, candidates[start : start + _BATCH], device)
                    for start in range(0, pool, _BATCH)
                ]
            )
    except Exception as error:
        # Whatever it is, the gradients themselves run into it where it matters, and say so with the sample's number.
        return DrawnRows(drawn, notes=(f"rows were drawn uniformly: {type(error).__name__}: {error}",))
    total = float(norms.sum())
    if not math.isfinite(total) or total <= 0.0:
        return DrawnRows(drawn, notes=("rows were drawn uniformly: the loss has no gradient at the network's output",))
    chances = inclusion((1.0 - _UNIFORM) * norms / total + _UNIFORM / pool, rows)
    order = np.random.default_rng((seed, 1)).permutation(pool)
    picked = order[systematic(chances[order], rows, float(np.random.default_rng((seed, 2)).random()))]
    return DrawnRows(candidates[picked][:, None], 1.0 / np.sqrt(pool * chances[picked]))


def inclusion(shares: Array, rows: int) -> Array:
    """Probabilities (N,) proportional to `shares` (N,) but for those at 1; they sum to `rows` ≤ N."""
    chances = np.minimum(1.0, rows * shares / shares.sum())
    certain = chances >= 1.0
    while True:
        rest = shares[~certain]
        if not rest.size:
            return np.ones_like(chances)
        chances[~certain] = (rows - certain.sum()) * rest / rest.sum()
        more = (chances >= 1.0) & ~certain
        if not more.any():
            return np.asarray(chances)
        certain |= more
        chances[more] = 1.0


def systematic(chances: Array, rows: int, offset: float) -> Index:
    """Places of exactly `rows` of them, each taken with its probability (N,), which sum to `rows`; 0 ≤ offset < 1."""
    edges = np.cumsum(chances)
    edges *= rows / edges[-1]
    places = np.searchsorted(edges, offset + np.arange(rows), side="right")
    return np.asarray(np.minimum(places, len(chances) - 1), dtype=np.int64)


def _output_gradients(
    model: torch.nn.Module, data: CalibrationData, forward: Forward, index: Index, device: torch.device
) -> Array:
    """Squared norm of the gradient of each sample's loss at the network's output, float64 (m,)."""
    inputs, targets = data.batch(index, device)
    with torch.no_grad():
        output = forward.output(model, inputs, targets)
    held = [leaf for _, leaf in leaves(output) if leaf.is_floating_point() and leaf.shape[:1] == (len(index),)]
    for leaf in held:
        leaf.requires_grad_()
    with torch.enable_grad():
        loss = forward.loss(output, *data.batch(index, device))
    found = torch.autograd.grad(loss * len(index), held, allow_unused=True)
    norms = torch.zeros(len(index), dtype=torch.float64, device=device)
    for gradient in found:
        if gradient is not None:
            norms += gradient.flatten(1).double().square().sum(1)
    return np.asarray(norms.cpu().numpy())
