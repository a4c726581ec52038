"""Problems that fall apart: groups of a partition made of whole blocks, or whole rows of a layer, share nothing.

H is block-diagonal over the components of the curvatures, so where no component is cut the best mask is the best mask
of each group alone, and lower bounds of the groups add up. Any solver can so keep a partition, exact ones row by row.
"""

from __future__ import annotations

from collections import deque

from solvers.block import QuadraticBlock
from solvers.budget import Partitioned
from solvers.problem import SelectionProblem
from solvers.solver import Solver


def parts_for(solver: Solver, problem: SelectionProblem) -> list[SelectionProblem]:
    """The problem itself, or the independent ones it is made of that `solver` takes, in the order of the weights.

    They are the blocks where no group reaches over several, and the groups of what `solver` does not take even so.
    """
    budget = problem.budget
    if not isinstance(budget, Partitioned):
        return [problem]
    if len(problem.blocks) > 1:
        pieces = [budget.part(where.start, where.stop) for where in problem.slices]
        alone = [
            SelectionProblem([block], piece, problem.objective)
            for block, piece in zip(problem.blocks, pieces, strict=True)
            if piece is not None
        ]
        if len(alone) == len(pieces):
            return [part for one in alone for part in parts_for(solver, one)]
    return [problem] if isinstance(budget, solver.budgets) else _groups(problem, budget) or [problem]


def _groups(problem: SelectionProblem, budget: Partitioned) -> list[SelectionProblem]:
    """One problem per group; none if a group cuts a component of a curvature."""
    waiting = deque(problem.blocks)
    found = []
    for size, count in zip(budget.sizes, budget.counts, strict=True):
        members: list[QuadraticBlock] = []
        while size:
            block = waiting.popleft()
            if block.n > size:
                pieces = block.split()
                if len(pieces) == 1:
                    return []
                waiting.extendleft(reversed(pieces))
                continue
            members.append(block)
            size -= block.n
        found.append(SelectionProblem(members, count, problem.objective))
    return found
