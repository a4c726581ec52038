"""Search for the joint optimum of a small dense problem: descent from several starts, then tabu with kicks.

The walk and its arithmetic are in `solvers.moves.joint_swaps`. When the best has not moved for `stall` swaps, the walk
is thrown off where it stands by a random exchange of a few weights. The result is a one-swap local optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from solvers.budget import GroupReach
from solvers.moves import joint_swaps, kicks
from solvers.problem import Array, Mask
from solvers.solver import Deadline

#: Swaps without a new best after which the walk is kicked, and the number of weights a kick exchanges.
_STALL = 300
_KICK = (5, 15)
#: Shortest and longest time, in swaps, for which a weight that was moved stays where it is.
_TENURE = (3, 10)
#: Swaps between rebuilds of the tableau.
_STRIDE = 100


@dataclass(frozen=True)
class DenseJoint:
    """Minimise constant + ½ vᵀHv − cᵀv, v supported on as many weights of each group as the start keeps."""

    hessian: Array
    linear: Array
    constant: float
    groups: GroupReach

    def value(self, solution: Array, kept: Mask) -> float:
        """The objective from the tableau's solution column."""
        return self.constant - 0.5 * float(self.linear[kept] @ solution[kept])


@dataclass(frozen=True)
class DenseResult:
    """Best kept set found, its objective, that of the start, and the swaps made."""

    kept: Mask
    value: float
    start_value: float
    swaps: int


def descend(problem: DenseJoint, kept: Mask, least_gain: float, deadline: Deadline | None = None) -> DenseResult:
    """Best swaps to a one-swap local optimum; raises numpy.linalg.LinAlgError for a singular H_SS."""
    kept = kept.copy()
    best, best_value, start_value = kept.copy(), np.inf, np.nan
    swaps = 0
    while True:
        table, solution = joint_swaps.build(problem.hessian, problem.linear, kept)
        value = problem.value(solution, kept)
        if not value < best_value:
            # Rounding, not a gain: a nearly singular H would have this go round for ever.
            return DenseResult(best, best_value, start_value, swaps)
        start_value = start_value if swaps else value
        best[:], best_value = kept, value
        if deadline is not None and deadline.expired():
            return DenseResult(best, best_value, start_value, swaps)
        _, made = joint_swaps.descend(table, solution, kept, *problem.groups.reach, least_gain, joint_swaps.REFRESH)
        swaps += made
        if made == 0:
            return DenseResult(best, best_value, start_value, swaps)


def search(
    problem: DenseJoint,
    starts: Sequence[Mask],
    iterations: int,
    rng: np.random.Generator,
    deadline: Deadline,
    tolerance: float = 1e-10,
    record: Callable[[float], None] | None = None,
) -> DenseResult:
    """Descent from every start, then `iterations` tabu swaps from the best, with kicks.

    Parameters
    ----------
    problem : DenseJoint
    starts : kept masks (n,), all of one size
    iterations : int
    rng : numpy Generator
    deadline : Deadline
    tolerance : float
        Least gain of a swap relative to the objective.
    record : callable, optional
        Told every new best objective.
    """
    best: DenseResult | None = None
    swaps = 0
    for start in starts:
        if best is not None and deadline.expired():
            break
        table, solution = joint_swaps.build(problem.hessian, problem.linear, start)
        gain = tolerance * abs(problem.value(solution, start))
        found = descend(problem, start, gain, deadline)
        swaps += found.swaps
        if best is None or found.value < best.value:
            best = found
            if record is not None:
                record(found.value)
    if best is None:
        raise ValueError("search needs at least one start")
    n = problem.linear.size
    current, best_kept, best_value = best.kept.copy(), best.kept.copy(), best.value
    until = np.zeros(n, dtype=np.int64)
    clock = last_gain = 0
    while clock < iterations and not deadline.expired():
        table, solution = joint_swaps.build(problem.hessian, problem.linear, current)
        value = problem.value(solution, current)
        stride = min(_STRIDE, iterations - clock)
        draws = rng.integers(_TENURE[0], _TENURE[1] + 1, stride)
        before = best_value
        _, best_value, last = joint_swaps.tabu_walk(
            table, solution, current, *problem.groups.reach, until, clock, draws, value, best_value, best_kept
        )
        clock += stride
        if last >= 0:
            last_gain = clock
            if record is not None and best_value < before:
                record(best_value)
        elif clock - last_gain >= _STALL:
            current = kicks.exchanged(current, int(rng.integers(_KICK[0], _KICK[1] + 1)), rng, problem.groups)
            until[:] = 0
            last_gain = clock
    final = descend(problem, best_kept, tolerance * abs(best_value), deadline)
    if final.value > best.value:
        # Rounding along the walk overrated its best; the descent's own result stands.
        final = best
    return DenseResult(final.kept, final.value, best.start_value, swaps + clock + final.swaps)
