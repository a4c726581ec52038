"""Steepest 1-swap descent to a true local optimum of the selection objective.

While some swap of i ∈ P and j ∈ S has β_j − α_i − γ_ij < 0, make the best one. Up to a few thousand weights the best of
all pairs is made; on larger problems the best pair of a working set, and the end is still a proven 1-swap optimum:
see `solvers.local_search.descent`. Layers are searched row by row (`solvers.layer_rows`; SparseSwaps does so with equal
numbers in every row).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from solvers.layer_rows import LayerRows, settle
from solvers.local_search.row_search import settle_row
from solvers.local_search.state import SwapState
from solvers.local_search.swap_search import SwapSearch, settled
from solvers.local_search.working_set import DENSE_LIMIT, ROUNDING
from solvers.problem import SelectionProblem
from solvers.solution import Proposal
from solvers.solver import Context, option

#: Of searches in all rows of a layer and moves between them.
_ROUNDS = 200


@dataclass(frozen=True)
class BestSwapSolver(SwapSearch):
    """Best-improvement local search; the result cannot be improved by any one swap."""

    name = "best_swap"
    summary = "steepest swaps until no swap improves the mask"
    reference = "best-improvement local search in the swap neighbourhood; swap algebra of Yu et al., ICML 2022"

    rows_beyond = DENSE_LIMIT

    min_gain: float = option(0.0, "least gain of a swap, absolute", minimum=0.0)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Start, then descend in all rows of a layer where the problem is made of them."""
        layers = LayerRows.of(problem, invertible=False) if problem.n > DENSE_LIMIT else None
        if layers is None:
            return super().run(problem, context)
        found = settle(
            layers,
            self.first_mask(problem, context),
            partial(settle_row, min_gain=self.min_gain),
            min_gain=ROUNDING,
            rounds=_ROUNDS,
            deadline=context.deadline,
            record=context.record,
        )
        return Proposal(found.pruned, reason=found.reason, statistics={"swaps": float(found.swaps + found.moves)})

    def search(self, state: SwapState, context: Context) -> Proposal:
        """Descend."""
        return settled(state, self.min_gain, context)
