"""A joint problem over few weights, dense: what elimination and swaps on a pool work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ReducedProblem:
    """Minimise ½ vᵀH̃v − c̃ᵀv over the weights of a pool (float64; H̃ (q, q), c̃ (q,))."""

    hessian: torch.Tensor
    linear: torch.Tensor
