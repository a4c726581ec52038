"""Steepest 1-swap descent to a true local optimum of the selection objective.

While some swap of i ∈ P and j ∈ S has β_j − α_i − γ_ij < 0, make the best one. Up to a few thousand weights the best of
all pairs is made; on larger problems the best pair of a working set, and the end is still a proven 1-swap optimum:
see `solvers.local_search.descent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from solvers.local_search.descent import descend
from solvers.local_search.state import SwapState
from solvers.moves import selection_swaps
from solvers.moves.starts import STARTS, starting_mask
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Solver, option

selection_swaps.compile_kernel("steepest_descent")


@dataclass(frozen=True)
class BestSwapSolver(Solver):
    """Best-improvement local search; the result cannot be improved by any one swap."""

    name = "best_swap"
    summary = "steepest swaps until no swap improves the mask"
    reference = "best-improvement local search in the swap neighbourhood; swap algebra of Yu et al., ICML 2022"
    capabilities = frozenset(
        {
            Capability.SELECTION,
            Capability.GLOBAL_BUDGET,
            Capability.LINEAR_TERM,
            Capability.RANDOMISED,
            Capability.CALIBRATION,
            Capability.WARM_START,
            Capability.TIME_LIMIT,
        }
    )

    start: Literal["rmp", "magnitude", "obd", "woodfisher", "random"] = option(
        "obd", "where the search starts unless a mask is given", choices=STARTS
    )
    min_gain: float = option(0.0, "least gain of a swap, absolute", minimum=0.0)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Start, descend."""
        state = SwapState(problem, starting_mask(problem, self.start, 50, context))
        context.record(state.value)
        swaps, settled = descend(state, self.min_gain, context.deadline)
        context.record(state.value)
        reason = Reason.COMPLETED if settled else Reason.TIME_LIMIT
        return Proposal(state.pruned, reason=reason, statistics={"swaps": float(swaps)})
