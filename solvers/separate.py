"""Problems that fall apart: groups of a partition made of whole blocks, or whole rows of a layer, share nothing.

H is block-diagonal over the components of the curvatures, so a range of weights that cuts neither a component nor a
group is a problem of its own, and lower bounds of such parts add up. Any solver can so keep a partition whose groups
cut no component, exact ones row by row.
"""

from __future__ import annotations

import numpy as np

from solvers.block import QuadraticBlock
from solvers.budget import Budget, Cardinality, Partitioned
from solvers.layer_rows import rowwise
from solvers.problem import SelectionProblem
from solvers.solver import Solver


def parts_for(solver: Solver, problem: SelectionProblem) -> list[SelectionProblem]:
    """The problem itself, or the independent ones it is made of that `solver` takes, in the order of the weights.

    They are ranges of blocks, and ranges of rows where `solver` wants these apart or does not take a part as it is; a
    layer that it wants whole is not taken apart.
    """
    budget = problem.budget
    if not isinstance(budget, Partitioned):
        return [problem]
    found = []
    for part in _ranges(problem, list(problem.blocks), budget):
        batch = solver.rows_beyond is not None and part.n > solver.rows_beyond and rowwise(part)
        whole = isinstance(part.budget, solver.budgets) and (batch or not solver.apart)
        if whole or isinstance(part.budget, Cardinality):
            found.append(part)
        else:
            found += _ranges(part, [row for block in part.blocks for row in block.split()], part.budget)
    takes = all(isinstance(part.budget, (Cardinality, *solver.budgets)) for part in found)
    return found if takes and len(found) > 1 else [problem]


def _ranges(problem: SelectionProblem, pieces: list[QuadraticBlock], budget: Budget) -> list[SelectionProblem]:
    """The smallest ranges of whole pieces and whole groups; the problem itself where there is just one."""
    assert isinstance(budget, Partitioned)
    ends = np.cumsum([piece.n for piece in pieces])
    # Pieces are few where groups are many.
    cuts = ends[budget.starts[np.searchsorted(budget.starts, ends)] == ends]
    if cuts.size == 1:
        return [problem]
    found, first, start = [], 0, 0
    for stop, last in zip(cuts.tolist(), (np.searchsorted(ends, cuts) + 1).tolist(), strict=True):
        part = budget.part(start, stop)
        assert part is not None
        found.append(SelectionProblem(pieces[first:last], part, problem.objective))
        first, start = last, stop
    return found
