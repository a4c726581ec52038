"""Simulated annealing in the swap neighbourhood of the selection objective.

A random swap of i ∈ P and j ∈ S is made with probability min(1, exp(−(β_j − α_i − γ_ij) / T)) while T falls
geometrically; the best mask seen is then descended to a 1-swap optimum. The start temperature is `hot` times the mean
diagonal saliency ½ H_ii w_i² of the removed weights and falls by the factor `cooling`, so that the schedule does
not depend on the scale of the loss. (Kirkpatrick, Gelatt and Vecchi, Science 1983.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from solvers.budget import LinearRows
from solvers.local_search.state import SwapState
from solvers.local_search.swap_search import TableSearch
from solvers.local_search.working_set import WorkingSet
from solvers.moves import item_search, selection_swaps
from solvers.moves.item_moves import ItemMoves, SelectionMoves
from solvers.moves.item_search import Found
from solvers.problem import Mask
from solvers.solver import Context, option

_STEPS_BETWEEN_CHECKS = 50_000
_ROUNDS = 5

selection_swaps.compile_kernel("anneal")


@dataclass(frozen=True)
class AnnealingSolver(TableSearch):
    """Annealing; larger problems in rounds, each starting cooler."""

    name = "annealing"
    summary = "simulated annealing over swaps"
    reference = "Kirkpatrick, Gelatt and Vecchi, Optimization by simulated annealing, Science 1983"
    counted = "proposals"

    sweeps: int = option(20_000, "proposed swaps per weight", minimum=1)
    hot: float = option(1.0, "first temperature over the mean diagonal saliency of P", minimum=1e-12)
    cooling: float = option(1e-3, "last temperature over the first", minimum=1e-12, maximum=1.0)

    def rounds(self, whole: bool) -> int:
        """One schedule on the whole problem, or a few on parts."""
        return 1 if whole else _ROUNDS

    def walk(self, moves: ItemMoves, rows: LinearRows, starts: Sequence[Mask], context: Context) -> Found:
        """The same schedule by items."""
        assert isinstance(moves, SelectionMoves)
        return item_search.anneal(
            moves, rows, starts, self.sweeps, self.hot, self.cooling, context.rng(), context.deadline
        )

    def explore(
        self, piece: WorkingSet, state: SwapState, number: int, rng: np.random.Generator, context: Context
    ) -> tuple[Mask, float, int]:
        """One schedule on one table."""
        best, value, best_value, done = piece.pruned.copy(), state.value, state.value, 0
        scale = float(state.curvature[state.pruned].mean())
        if scale == 0.0:
            return best, best_value, done
        random = selection_swaps.random_state(rng)
        total = self.sweeps * piece.pruned.shape[0]
        # Later rounds start cooler: the first has done the large moves.
        fall = self.cooling ** np.linspace(0.0, 1.0, -(-total // _STEPS_BETWEEN_CHECKS) + 1)
        for first, last in pairwise(self.hot / 3.0**number * scale * fall):
            steps = min(_STEPS_BETWEEN_CHECKS, total - done)
            value, best_value, _ = selection_swaps.anneal(
                piece.table,
                piece.forces,
                piece.pruned,
                *piece.groups.reach,
                value,
                best_value,
                best,
                first,
                last,
                steps,
                random,
            )
            done += steps
            if context.deadline.expired():
                break
        return best, best_value, done
