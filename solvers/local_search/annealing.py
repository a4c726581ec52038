"""Simulated annealing in the swap neighbourhood of the selection objective.

A random swap of i ∈ P and j ∈ S is made with probability min(1, exp(−(β_j − α_i − γ_ij) / T)) while T falls
geometrically; the best mask seen is then descended to a 1-swap optimum. The start temperature is `hot` times the mean
diagonal saliency ½ H_ii w_i² of the removed weights and falls by the factor `cooling`, so that the schedule does
not depend on the scale of the loss. (Kirkpatrick, Gelatt and Vecchi, Science 1983.)

A problem of more weights than a dense table holds is worked on in rounds on the weights with the largest α and
the smallest β, as in tabu search.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from solvers.local_search.descent import descend
from solvers.local_search.state import SwapState
from solvers.local_search.working_set import DENSE_LIMIT, WorkingSet, promising
from solvers.moves import selection_swaps
from solvers.moves.starts import STARTS, starting_mask
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Solver, option

_STEPS_BETWEEN_CHECKS = 50_000
_WORKING_SET = 2000
_ROUNDS = 5

selection_swaps.compile_kernel("steepest_descent")
selection_swaps.compile_kernel("anneal")


@dataclass(frozen=True)
class AnnealingSolver(Solver):
    """Annealing; the same seed gives the same mask unless the time limit cuts it short."""

    name = "annealing"
    summary = "simulated annealing over swaps"
    reference = "Kirkpatrick, Gelatt and Vecchi, Optimization by simulated annealing, Science 1983"
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
    sweeps: int = option(20_000, "proposed swaps per weight", minimum=1)
    hot: float = option(1.0, "first temperature over the mean diagonal saliency of P", minimum=1e-12)
    cooling: float = option(1e-3, "last temperature over the first", minimum=1e-12, maximum=1.0)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Start, anneal, descend."""
        state = SwapState(problem, starting_mask(problem, self.start, 50, context))
        context.record(state.value)
        rng = context.rng()
        whole = problem.n <= DENSE_LIMIT
        descend(state, 0.0, context.deadline)
        context.record(state.value)
        steps = 0
        for round_number in range(1 if whole else _ROUNDS):
            if context.deadline.expired():
                break
            forces = state.forces()
            # Later rounds start cooler: the first has done the large moves.
            steps += self._anneal(
                WorkingSet(state, promising(state, forces, problem.n if whole else _WORKING_SET), forces),
                state, self.hot / 3.0**round_number, rng, context,
            )  # fmt: skip
            state.refresh()
            context.record(state.value)
        descend(state, 0.0, context.deadline)
        context.record(state.value)
        reason = Reason.TIME_LIMIT if context.deadline.expired() else Reason.ITERATION_LIMIT
        return Proposal(state.pruned, reason=reason, statistics={"proposals": float(steps)})

    def _anneal(
        self, piece: WorkingSet, state: SwapState, hot: float, rng: np.random.Generator, context: Context
    ) -> int:
        """One schedule on one table; commits the best mask seen; returns the proposals made."""
        removed = int(piece.pruned.sum())
        if removed in (0, piece.pruned.shape[0]):
            return 0
        scale = float(state.curvature[state.pruned].mean())
        if scale == 0.0:
            return 0
        start = value = best_value = state.value
        best = piece.pruned.copy()
        random = selection_swaps.random_state(rng)
        total = self.sweeps * piece.pruned.shape[0]
        temperatures = hot * scale * self.cooling ** np.linspace(0.0, 1.0, -(-total // _STEPS_BETWEEN_CHECKS) + 1)
        done = 0
        for first, last in pairwise(temperatures):
            steps = min(_STEPS_BETWEEN_CHECKS, total - done)
            value, best_value, _ = selection_swaps.anneal(
                piece.table, piece.forces, piece.pruned, value, best_value, best, first, last, steps, random
            )
            done += steps
            if context.deadline.expired():
                break
        piece.pruned[:] = best
        piece.commit(best_value - start)
        return done
