"""Steepest 1-swap descent to a true local optimum of the selection objective.

While some swap of i ∈ P and j ∈ S has β_j − α_i − γ_ij < 0, make the best one. Up to a few thousand weights the best of
all pairs is made; on larger problems the best pair of a working set, and the end is still a proven 1-swap optimum:
see `solvers.local_search.descent`.
"""

from __future__ import annotations

from dataclasses import dataclass

from solvers.local_search.state import SwapState
from solvers.local_search.swap_search import SwapSearch, settled
from solvers.solution import Proposal
from solvers.solver import Context, option


@dataclass(frozen=True)
class BestSwapSolver(SwapSearch):
    """Best-improvement local search; the result cannot be improved by any one swap."""

    name = "best_swap"
    summary = "steepest swaps until no swap improves the mask"
    reference = "best-improvement local search in the swap neighbourhood; swap algebra of Yu et al., ICML 2022"

    min_gain: float = option(0.0, "least gain of a swap, absolute", minimum=0.0)

    def search(self, state: SwapState, context: Context) -> Proposal:
        """Descend."""
        return settled(state, self.min_gain, context)
