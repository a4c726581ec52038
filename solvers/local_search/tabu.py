"""Tabu search in the swap neighbourhood of the selection objective.

Every move makes the best swap of i ∈ P and j ∈ S by β_j − α_i − γ_ij, improving or not; both weights are then frozen
for a while (drawn from `tenure` … 2·`tenure` moves) unless a swap with them beats the best objective seen. After
`stall` moves without a better mask the search goes back to the best one and shakes it by random swaps. The best mask
is descended to a 1-swap optimum at the end. (Glover, *Tabu search*, ORSA J. Computing 1989; for cardinality-
constrained binary quadratic problems Palubeckis 2007 and Wu and Hao 2013.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solvers.arrays import Index
from solvers.budget import LinearRows
from solvers.local_search.state import SwapState
from solvers.local_search.swap_search import TableSearch
from solvers.local_search.working_set import WorkingSet, promising
from solvers.moves import item_search, kicks, selection_swaps
from solvers.moves.item_moves import ItemMoves
from solvers.moves.item_search import Found
from solvers.problem import Array, Mask
from solvers.solver import Context, option

_MOVES_BETWEEN_CHECKS = 250
#: Moves in one round on a part of a problem that is too large for one table.
_MOVES_PER_ROUND = 2000

selection_swaps.compile_kernel("tabu_search")


@dataclass(frozen=True)
class TabuSolver(TableSearch):
    """Tabu search; larger problems in rounds, on random parts where the promising one gives nothing."""

    name = "tabu"
    summary = "tabu search over swaps, with restarts from the best mask"
    reference = "Glover, Tabu search, ORSA Journal on Computing 1989"
    counted = "moves"

    iterations: int = option(50_000, "moves in all", minimum=1)
    tenure: int = option(5, "least number of moves a swapped weight stays frozen", minimum=1)
    candidates: int = option(100, "largest α and smallest β looked at per move, times the groups", minimum=1)
    stall: int = option(300, "moves without a better mask before it is shaken", minimum=1)

    def rounds(self, whole: bool) -> int:
        """As many as the moves are shared over."""
        return 1 if whole else -(-self.iterations // _MOVES_PER_ROUND)

    def choose(self, state: SwapState, forces: Array, size: int, idle: int, rng: np.random.Generator) -> Index:
        """The most promising part; where that gave nothing, a random part of a wider choice."""
        wide = promising(state, forces, size * (1 + idle))
        return wide if idle == 0 else np.sort(rng.permutation(wide)[:size])

    def walk(self, moves: ItemMoves, rows: LinearRows, starts: Sequence[Mask], context: Context) -> Found:
        """Tabu moves by items."""
        return item_search.search(moves, rows, starts, self.iterations, context.rng(), context.deadline)

    def explore(
        self, piece: WorkingSet, state: SwapState, number: int, rng: np.random.Generator, context: Context
    ) -> tuple[Mask, float, int]:
        """Tabu moves on one table."""
        left = self.iterations - number * _MOVES_PER_ROUND
        budget = left if piece.index.shape[0] == state.problem.n else min(_MOVES_PER_ROUND, left)
        value = best_value = state.value
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
                piece.table, piece.forces, piece.pruned, *piece.groups.reach, frozen, value, best_value, best, clock,
                moves, tenure, self.candidates * len(np.unique(piece.groups.of)), random,
            )  # fmt: skip
            clock += moves
            idle = since if best_value < previous else idle + moves
            if best_value < previous:
                context.record(best_value)
            if idle >= self.stall:
                piece.move(best)
                swaps = 1 + int(rng.integers(max(2, smaller // 8)))
                value = best_value + piece.move(kicks.exchanged(best, swaps, rng, piece.groups))
                frozen[:] = 0
                idle = 0
        return best, best_value, clock
