"""What makes many masks equally good, and what a tree may conclude from it: chains and lattices.

Chains. Two weights are interchangeable if exchanging them leaves a quadratic form and its linear term as they are; two
weights that interact with nothing compare by their costs alone. Some optimum then removes, of any such
group, the first ones in a fixed order: once a weight is kept so are those after it, once it is removed so are those
before it. (Margot, "Symmetry in integer linear programming", 2010.)

Lattice. Where all entries are multiples of one step, so are the differences of all values: a mask that is better is
better by a step, and a bound may be rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from solvers.exact.best_first import Fate, Fates
from solvers.problem import Array

Indices = npt.NDArray[np.int64]

#: Entries that differ by less than this fraction of their size differ by rounding.
_SAME = 8.0 * float(np.finfo(np.float64).eps)
_MOST_VALUES = 200


def chains(matrix: Array, linear: Array, cost: Array) -> list[Indices]:
    """Groups of weights (two or more each) in an order in which some optimum removes them.

    Parameters
    ----------
    matrix : float64 (n, n), positive semidefinite
    linear : float64 (n,)
        What goes with a weight besides its row of M.
    cost : float64 (n,)
        Of removing a weight that interacts with nothing.
    """
    n = linear.shape[0]
    roots = np.sqrt(np.maximum(np.diag(matrix), 0.0))
    off = np.abs(matrix)
    np.fill_diagonal(off, 0.0)
    alone = np.flatnonzero(off.max(axis=1, initial=0.0) == 0.0)
    found = [alone[np.argsort(cost[alone], kind="stable")]] if alone.size > 1 else []
    rest = np.setdiff1d(np.arange(n), alone)
    # Interchangeable weights have equal terms, diagonals and row sums, so they are neighbours in this order.
    size = np.abs(linear) + roots**2
    order = rest[np.lexsort((matrix.sum(1)[rest], linear[rest].round(12), roots[rest].round(12)))]
    group: list[int] = []
    for i in order.tolist():
        if group and _interchangeable(matrix, linear, roots, size, group[0], i):
            group.append(i)
            continue
        if len(group) > 1:
            found.append(np.array(sorted(group)))
        group = [i]
    return [*found, np.array(sorted(group))] if len(group) > 1 else found


def _interchangeable(matrix: Array, linear: Array, roots: Array, size: Array, i: int, j: int) -> bool:
    if abs(roots[i] - roots[j]) > _SAME * roots[i] or abs(linear[i] - linear[j]) > _SAME * size[i]:
        return False
    difference = np.abs(matrix[i] - matrix[j])
    difference[[i, j]] = 0.0
    return bool((difference <= _SAME * roots[i] * roots).all())


def follow(fates: Fates, groups: Sequence[Indices]) -> bool:
    """Decide, in place, what the chains imply; False where they forbid what is decided."""
    for group in groups:
        part = fates[group]
        removed = np.flatnonzero(part == Fate.PRUNED)
        kept = np.flatnonzero(part == Fate.KEPT)
        last = int(removed[-1]) if removed.size else -1
        first = int(kept[0]) if kept.size else group.size
        if last > first:
            return False
        fates[group[: last + 1]] = Fate.PRUNED
        fates[group[first:]] = Fate.KEPT
    return True


def links(groups: Sequence[Indices], free: Indices, n: int) -> tuple[Indices, Indices]:
    """(earlier, later) neighbours of the free weights, in positions within `free`; −1 for none."""
    position = np.full(n, -1)
    position[free] = np.arange(free.size)
    earlier, later = np.full(free.size, -1), np.full(free.size, -1)
    for group in groups:
        inside = position[group]
        inside = inside[inside >= 0]
        earlier[inside[1:]], later[inside[:-1]] = inside[:-1], inside[1:]
    return earlier, later


class Lattice(NamedTuple):
    """All values are base + step·integer, give or take `slack`; no lattice where the step is 0."""

    base: float = 0.0
    step: float = 0.0
    slack: float = 0.0

    def lifted(self, bound: float) -> float:
        """A bound on the least value that is at least `bound`."""
        if self.step == 0.0 or not math.isfinite(bound):
            return bound
        whole = math.ceil((bound - self.base - self.slack) / self.step)
        return max(bound, self.base + self.step * whole - self.slack)


def lattice(matrix: Array, linear: Array, count: int) -> Lattice:
    """The lattice of ½ zᵀMz − bᵀz over z ∈ {0, 1}ⁿ with 1ᵀz = count."""
    cost = 0.5 * np.diag(matrix) - linear
    if not cost.size:
        return Lattice()
    entries = np.concatenate([cost - cost[0], matrix[np.triu_indices_from(matrix, 1)]])
    largest = float(np.abs(entries).max(initial=0.0))
    if largest == 0.0 or np.unique((entries[: 4 * _MOST_VALUES] / largest).round(12)).size > _MOST_VALUES:
        return Lattice()
    values = np.unique((np.abs(entries) / largest).round(12))
    if values.size > _MOST_VALUES:
        return Lattice()
    step = 0.0
    for value in values.tolist():
        step = _common(step, value)
    if step < 1e-6:
        return Lattice()
    # The noise of the division that found the step is averaged out by its largest multiple.
    step = float(values[-1]) / round(float(values[-1]) / step) * largest
    off = np.abs(entries - step * np.rint(entries / step)).max()
    base = count * float(cost[0])
    slack = (count + 0.5 * count * count) * (float(off) + 4e-16 * largest) + 4e-16 * abs(base)
    return Lattice(base, step, slack) if slack < 1e-3 * step else Lattice()


def _common(a: float, b: float) -> float:
    """The largest step that both are multiples of, to 1e-9."""
    while b > 1e-9:
        a, b = b, a % b
        if a - b < 1e-9:
            b = 0.0
    return a
