"""What the searches in the swap neighbourhood share: where they start, and rounds on dense tables.

A problem of more weights than a dense table holds is worked on in rounds: each takes the weights with the largest α and
the smallest β of the current mask, searches their table, and carries the best mask over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from solvers.arrays import Index
from solvers.budget import Knapsack, LinearRows
from solvers.local_search.descent import descend
from solvers.local_search.state import SwapState
from solvers.local_search.working_set import DENSE_LIMIT, WorkingSet, promising
from solvers.moves import item_search, selection_swaps
from solvers.moves.item_moves import ItemMoves
from solvers.moves.item_problem import MOST_ITEMS, search_items
from solvers.moves.item_search import Found
from solvers.problem import Array, Mask, SelectionProblem
from solvers.registry import make_solver
from solvers.solution import Proposal, Reason
from solvers.solver import ANYTIME, RANKED, SELECTION_PROBLEM, Capability, Context, Solver, option

Start = Literal["rmp", "magnitude", "obd", "woodfisher", "random"]
#: Weights of one round.
WORKING_SET = 2000

selection_swaps.compile_kernel("steepest_descent")


def start_option(default: Start) -> Any:
    """The option `start` of a search."""
    return option(default, "where the search starts unless a mask is given", choices=get_args(Start))


@dataclass(frozen=True)
class SwapSearch(Solver):
    """A search from one mask; the same seed gives the same mask unless the time limit cuts it short."""

    capabilities = SELECTION_PROBLEM | ANYTIME | {Capability.RANDOMISED, Capability.CALIBRATION}
    budgets = (*RANKED, Knapsack)
    most_items = {Knapsack: MOST_ITEMS}
    apart = True

    start: Start = start_option("obd")

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Start, search; by items where weights cost differently."""
        if isinstance(problem.budget, Knapsack):
            return search_items(problem, context, self.walk)
        state = SwapState(problem, self.first_mask(problem, context))
        context.record(state.value)
        return self.search(state, context)

    def walk(self, moves: ItemMoves, rows: LinearRows, starts: Sequence[Mask], context: Context) -> Found:
        """The search by items."""
        return item_search.search(moves, rows, starts, 0, context.rng(), context.deadline)

    def first_mask(self, problem: SelectionProblem, context: Context) -> Mask:
        """The mask to start from."""
        return make_solver(self.start_spec).run(problem, context).pruned if context.start is None else context.start

    @property
    def start_spec(self) -> str:
        """The solver that makes the first mask, with its options."""
        return self.start

    @abstractmethod
    def search(self, state: SwapState, context: Context) -> Proposal:
        """The best mask found from `state`, which is changed in place."""


def settled(state: SwapState, min_gain: float, context: Context) -> Proposal:
    """Descent to a 1-swap local optimum as the whole of a search."""
    swaps, proven = descend(state, min_gain, context.deadline)
    context.record(state.value)
    reason = Reason.COMPLETED if proven else Reason.TIME_LIMIT
    return Proposal(state.pruned, reason=reason, statistics={"swaps": float(swaps)})


class TableSearch(SwapSearch):
    """A search past local optima on dense tables, between two descents."""

    counted: ClassVar[str]
    """What `explore` counts."""

    @abstractmethod
    def rounds(self, whole: bool) -> int:
        """How many rounds to make; `whole`: the problem is one table."""

    @abstractmethod
    def explore(
        self, piece: WorkingSet, state: SwapState, number: int, rng: np.random.Generator, context: Context
    ) -> tuple[Mask, float, int]:
        """Search one table in round `number`, counted from 0; (best mask, its objective, steps made)."""

    def choose(self, state: SwapState, forces: Array, size: int, idle: int, rng: np.random.Generator) -> Index:
        """The weights of a round after `idle` rounds without a better mask."""
        return promising(state, forces, size)

    def search(self, state: SwapState, context: Context) -> Proposal:
        """Descend, search, descend."""
        whole = state.problem.n <= DENSE_LIMIT
        size = state.problem.n if whole else WORKING_SET
        descend(state, 0.0, context.deadline)
        context.record(state.value)
        rng, steps, idle = context.rng(), 0, 0
        for number in range(self.rounds(whole)):
            if context.deadline.expired():
                break
            forces, before = state.forces(), state.value
            index = self.choose(state, forces, size, idle, rng)
            if 0 < int(state.pruned[index].sum()) < index.shape[0]:
                piece = WorkingSet(state, index, forces)
                best, value, made = self.explore(piece, state, number, rng, context)
                piece.pruned[:] = best
                piece.commit(value - before)
                state.refresh()
                steps += made
            context.record(state.value)
            idle = 0 if state.value < before else idle + 1
        descend(state, 0.0, context.deadline)
        context.record(state.value)
        reason = Reason.TIME_LIMIT if context.deadline.expired() else Reason.ITERATION_LIMIT
        return Proposal(state.pruned, reason=reason, statistics={self.counted: float(steps)})
