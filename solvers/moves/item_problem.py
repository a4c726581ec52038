"""Small problems under any budget as items (`solvers.moves.item_moves`), and a search of them as a whole solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import block_diag

from solvers.arrays import Array, Mask, ProblemArrays
from solvers.budget import LinearRows
from solvers.errors import SingularHessianError
from solvers.moves import item_search
from solvers.moves.item_moves import ItemMoves, JointMoves, SelectionMoves
from solvers.problem import Objective, SelectionProblem
from solvers.regularise import regularised
from solvers.solution import Proposal, Reason
from solvers.solver import Context

#: Weights of a problem that is held so.
MOST_ITEMS = 600

Walk = Callable[[ItemMoves, LinearRows, Sequence[Mask], Context], item_search.Found]


def item_form(arrays: ProblemArrays, rows: LinearRows) -> tuple[Array, Array]:
    """(Q, c) over the items."""
    if not rows.grouped:
        return arrays.selection_form
    starts = np.argsort(rows.labels, kind="stable")
    cuts = np.concatenate([[0], np.cumsum(np.bincount(rows.labels))[:-1]])
    columns = (arrays.factor * arrays.weights)[:, starts]
    summed = np.add.reduceat(columns, cuts, axis=1)
    quadratic = summed.T @ summed
    quadratic[np.diag_indices(rows.items)] += np.bincount(rows.labels, weights=arrays.damping * arrays.weights**2)
    linear = np.bincount(rows.labels, weights=arrays.gradient * arrays.weights)
    return quadratic, np.asarray(linear, dtype=np.float64)


def item_moves(problem: SelectionProblem, rows: LinearRows) -> tuple[ItemMoves, tuple[str, ...]]:
    """The objective over the items, and what had to be repaired for it."""
    if problem.objective is Objective.SELECTION:
        return SelectionMoves(*item_form(problem.arrays(), rows)), ()
    made = [regularised(block) for block in problem.blocks]
    hessian = block_diag(*[block.curvature.dense().cpu().numpy() for block, _ in made])
    pull = hessian @ problem.weights
    constant = 0.5 * float(problem.weights @ pull)
    if problem.gradient is not None:
        constant -= float(problem.gradient @ problem.weights)
        pull = pull - problem.gradient
    return JointMoves(hessian, pull, constant, rows.labels), tuple(note for _, note in made if note)


def search_items(problem: SelectionProblem, context: Context, walk: Walk) -> Proposal:
    """The best mask that a walk finds from a given start, or from what single items cost and what goes one by one.

    Raises
    ------
    SingularHessianError
        Under the joint objective, where H of the kept weights is singular.
    """
    rows, budget = problem.budget.linear(problem.n), problem.budget.over_items
    moves, repairs = item_moves(problem, rows)
    start = None if context.start is None else rows.narrow(context.start)
    try:
        starts = item_search.first_masks(moves, rows, budget, start, context.rng())
        found = walk(moves, rows, starts, context)
    except np.linalg.LinAlgError as error:
        raise SingularHessianError(f"H of the kept weights is singular ({error}); use a larger damping") from error
    context.record(found.value)
    reason = Reason.TIME_LIMIT if context.deadline.expired() else Reason.COMPLETED
    return Proposal(rows.widen(found.gone), reason=reason, repairs=repairs)


def tabu_walk(count: int) -> Walk:
    """Descents from all starts, and so many tabu moves."""
    return lambda moves, rows, starts, context: item_search.search(
        moves, rows, starts, count, context.rng(), context.deadline
    )
