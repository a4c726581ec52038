"""Splitting one budget over the blocks of a problem, for solvers that cannot share it.

Each rule returns how many weights every block removes; they sum to ``n_prune`` exactly and never exceed a
block. A mask found block by block carries no bound on the shared budget, so none is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from solvers.errors import UnknownNameError
from solvers.problem import Array, Mask, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import Context, Deadline, Solver

Counts = npt.NDArray[np.int64]


def uniform(problem: SelectionProblem) -> Counts:
    """The same sparsity in every block (largest remainders)."""
    sizes = np.array([block.n for block in problem.blocks], dtype=np.int64)
    shares = problem.n_prune * sizes / problem.n
    counts = np.floor(shares).astype(np.int64)
    for index in np.argsort(-(shares - counts), kind="stable")[: problem.n_prune - int(counts.sum())]:
        counts[index] += 1
    return counts


def _by_score(problem: SelectionProblem, score: Array) -> Counts:
    """As many per block as a global selection of the smallest scores would take."""
    order = np.argsort(score, kind="stable")[: problem.n_prune]
    chosen = np.zeros(problem.n, dtype=bool)
    chosen[order] = True
    return np.array([int(chosen[where].sum()) for where in problem.slices], dtype=np.int64)


def by_magnitude(problem: SelectionProblem) -> Counts:
    """The split that global magnitude pruning makes."""
    return _by_score(problem, np.abs(problem.weights))


def by_saliency(problem: SelectionProblem) -> Counts:
    """The split that the global diagonal saliency H_ii w_i² makes."""
    return _by_score(problem, problem.diagonal * problem.weights**2)


ALLOCATIONS: dict[str, Callable[[SelectionProblem], Counts]] = {
    "uniform": uniform,
    "magnitude": by_magnitude,
    "saliency": by_saliency,
}


def allocate(problem: SelectionProblem, rule: str) -> Counts:
    """How many weights each block removes under `rule`, int64 (blocks,); raises UnknownNameError."""
    if rule not in ALLOCATIONS:
        raise UnknownNameError.of("allocation", rule, ALLOCATIONS)
    return ALLOCATIONS[rule](problem)


def solve_blockwise(
    problem: SelectionProblem, solver: Solver, context: Context, rule: str, time_limit: float | None
) -> Proposal:
    """Run `solver` on every block with its own budget; time is shared in proportion to what is left."""
    from solvers.solving import check_capabilities, run_backend

    counts = allocate(problem, rule)
    parts: list[Mask] = []
    repairs: list[str] = []
    reason = Reason.COMPLETED
    for index, (block, where) in enumerate(zip(problem.blocks, problem.slices, strict=True)):
        alone = SelectionProblem([block], int(counts[index]), problem.objective)
        start = None
        if context.start is not None and int(context.start[where].sum()) == alone.n_prune:
            start = context.start[where]
        check_capabilities(solver, alone, time_limit, start)
        remaining = context.deadline.remaining()
        share = None if math.isinf(remaining) else max(remaining / (len(problem.blocks) - index), 1e-3)
        inner = Context(seed=context.seed + index, deadline=Deadline(share), start=start)
        proposal = run_backend(solver, alone, inner)
        parts.append(proposal.pruned)
        repairs.extend(proposal.repairs)
        if proposal.reason is not Reason.COMPLETED:
            reason = proposal.reason
    return Proposal(np.concatenate(parts), reason=reason, repairs=tuple(repairs))
