"""Tabu search in the swap neighbourhood of the selection objective.

Every move makes the best swap of i ∈ P and j ∈ S by β_j − α_i − γ_ij, improving or not; both weights are then frozen
for a while (drawn from `tenure` … 2·`tenure` moves) unless a swap with them beats the best objective seen. After
`stall` moves without a better mask the search goes back to the best one and shakes it by random swaps. The best mask
is descended to a 1-swap optimum at the end. (Glover, *Tabu search*, ORSA J. Computing 1989; for cardinality-
constrained binary quadratic problems Palubeckis 2007 and Wu and Hao 2013.)

A problem of more weights than a dense table holds is worked on in rounds: each round takes the weights with the
largest α and the smallest β of the current mask, searches their table, and carries the best mask over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from solvers.local_search.descent import descend
from solvers.local_search.state import SwapState
from solvers.local_search.working_set import DENSE_LIMIT, WorkingSet, promising
from solvers.moves import kicks, selection_swaps
from solvers.moves.starts import STARTS, starting_mask
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import Capability, Context, Solver, option

_MOVES_BETWEEN_CHECKS = 250
#: Moves in one round on a part of a problem that is too large for one table.
_MOVES_PER_ROUND = 2000
_WORKING_SET = 2000

selection_swaps.compile_kernel("steepest_descent")
selection_swaps.compile_kernel("tabu_search")


@dataclass(frozen=True)
class TabuSolver(Solver):
    """Tabu search; the same seed gives the same mask unless the time limit cuts it short."""

    name = "tabu"
    summary = "tabu search over swaps, with restarts from the best mask"
    reference = "Glover, Tabu search, ORSA Journal on Computing 1989"
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
    iterations: int = option(50_000, "moves in all", minimum=1)
    tenure: int = option(5, "least number of moves a swapped weight stays frozen", minimum=1)
    candidates: int = option(100, "largest α and smallest β looked at per move", minimum=1)
    stall: int = option(300, "moves without a better mask before it is shaken", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Start, descend, search, descend."""
        state = SwapState(problem, starting_mask(problem, self.start, 50, context))
        context.record(state.value)
        rng = context.rng()
        descend(state, 0.0, context.deadline)
        context.record(state.value)
        whole = problem.n <= DENSE_LIMIT
        done = idle_rounds = 0
        while done < self.iterations and not context.deadline.expired():
            budget = self.iterations - done if whole else min(_MOVES_PER_ROUND, self.iterations - done)
            forces = state.forces()
            size = problem.n if whole else _WORKING_SET
            if idle_rounds and not whole:
                # The most promising part gave nothing: take a random part of a wider choice.
                wide = promising(state, forces, size * (1 + idle_rounds))
                index = np.sort(rng.permutation(wide)[:size])
            else:
                index = promising(state, forces, size)
            before = state.value
            if 0 < int(state.pruned[index].sum()) < index.shape[0]:
                self._search(WorkingSet(state, index, forces), state, budget, rng, context)
                state.refresh()
            done += budget
            idle_rounds = 0 if state.value < before else idle_rounds + 1
        descend(state, 0.0, context.deadline)
        context.record(state.value)
        reason = Reason.TIME_LIMIT if context.deadline.expired() else Reason.ITERATION_LIMIT
        return Proposal(state.pruned, reason=reason, statistics={"moves": float(done)})

    def _search(
        self, piece: WorkingSet, state: SwapState, budget: int, rng: np.random.Generator, context: Context
    ) -> None:
        """Tabu moves on one table; commits the best mask found."""
        value = best_value = initial = state.value
        best = piece.pruned.copy()
        random = selection_swaps.random_state(rng)
        size = best.shape[0]
        # A tenure that freezes a whole side would leave nothing to move.
        smaller = min(int(best.sum()), size - int(best.sum()))
        tenure = max(1, min(self.tenure, smaller // 3))
        frozen = np.zeros(size, dtype=np.int64)
        clock = idle = 0
        while clock < budget and not context.deadline.expired():
            moves = min(_MOVES_BETWEEN_CHECKS, budget - clock)
            previous = best_value
            value, best_value, since = selection_swaps.tabu_search(
                piece.table, piece.forces, piece.pruned, frozen, value, best_value, best, clock,
                moves, tenure, self.candidates, random,
            )  # fmt: skip
            clock += moves
            idle = since if best_value < previous else idle + moves
            if best_value < previous:
                context.record(best_value)
            if idle >= self.stall:
                value = best_value + _move_to(piece, best)
                value += _shake(piece, max(2, smaller // 8), rng)
                frozen[:] = 0
                idle = 0
        _move_to(piece, best)
        piece.commit(best_value - initial)


def _move_to(piece: WorkingSet, target: np.ndarray) -> float:
    """Set the mask of a table to `target`, with its forces; returns 0.0, the change relative to the target."""
    moved = target.astype(np.float64) - piece.pruned
    piece.forces += moved @ piece.table
    piece.pruned[:] = target
    return 0.0


def _shake(piece: WorkingSet, swaps: int, rng: np.random.Generator) -> float:
    """Up to `swaps` random swaps at once; the change of the objective."""
    target = kicks.exchanged(piece.pruned, 1 + int(rng.integers(swaps)), rng)
    moved = target.astype(np.float64) - piece.pruned
    pull = moved @ piece.table
    change = float(moved @ piece.forces + 0.5 * moved @ pull)
    piece.forces += pull
    piece.pruned[:] = target
    return change
