"""A good mask to start an exact backend from, by the searches with which the package's own trees begin."""

from __future__ import annotations

import math
from dataclasses import replace

from solvers.budget import as_partition
from solvers.exact import joint_start, linear_roots, selection_start
from solvers.exact.joint_square import prepare
from solvers.problem import Mask, Objective, ProblemArrays, SelectionProblem
from solvers.solver import RANKED, Context, Deadline


def local_optimum(problem: SelectionProblem, arrays: ProblemArrays, context: Context) -> Mask:
    """The best of a few one-swap local optima and a tabu walk from it, numpy bool (n,), in a fifth of the time left."""
    remaining = context.deadline.remaining()
    deadline = Deadline(None if math.isinf(remaining) else max(0.2 * remaining, 1e-3))
    if not isinstance(problem.budget, RANKED):
        return linear_roots.local_optimum(problem, arrays, replace(context, deadline=deadline))
    partition = as_partition(problem.budget, problem.n)
    if problem.objective is Objective.SELECTION:
        scaled, _ = selection_start.scaled(arrays, partition)
        return selection_start.find_incumbent(scaled, deadline, context.seed, context.start).pruned
    square = prepare(arrays.weights, arrays.factor, arrays.damping, arrays.gradient)
    return joint_start.find_incumbent(square, partition.groups, context.start, context.seed, deadline).pruned
