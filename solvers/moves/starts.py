"""Where a local search starts: one of the baselines' masks, or a given one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from solvers.baselines.obd import diagonal_saliency
from solvers.baselines.random import RandomSolver
from solvers.baselines.rmp import best_draw
from solvers.baselines.woodfisher import single_removal_loss
from solvers.problem import Array, Mask, SelectionProblem
from solvers.ranking import prune_smallest
from solvers.solver import Context

_SCORES: dict[str, Callable[[SelectionProblem], Array]] = {
    "magnitude": lambda problem: np.abs(problem.weights),
    "obd": diagonal_saliency,
    "woodfisher": single_removal_loss,
}

STARTS = ("rmp", "random", *_SCORES)


def starting_mask(problem: SelectionProblem, start: str, draws: int, context: Context) -> Mask:
    """`context.start` where it is given, else the mask of the rule `start` (`draws` only matters for rmp)."""
    if context.start is not None:
        return context.start
    if start == "rmp":
        return best_draw(problem, draws, context)[0]
    if start == "random":
        return RandomSolver().run(problem, context).pruned
    return prune_smallest(_SCORES[start](problem), problem.n_prune)
