"""The scaled selection problem before its tree is grown: its incumbent, what must stay, and what rounding may hide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.budget import Partitioned
from solvers.exact.best_first import Incumbent
from solvers.moves import kicks, selection_swaps
from solvers.problem import Array, Mask, ProblemArrays
from solvers.solver import Deadline

_MOST_SWAPS = 10_000
_TABU_ROUNDS = 10
_TABU_MOVES = 1000
#: A column this much longer than the incumbent's is looked at before the tree is grown.
_OUT_OF_SCALE = 1e3
#: Weight of a violated group beside the incumbent's height; above 1 it only makes relaxations tighter.
_BINDING = 16.0


def unit_of(quadratic: Array, linear: Array) -> float:
    """A power of two of the size of the largest entry, so that dividing by it is exact."""
    size = max(float(np.abs(np.diag(quadratic)).max(initial=0.0)), float(np.abs(linear).max(initial=0.0)))
    return 2.0 ** math.floor(math.log2(size)) if size > 0.0 else 1.0


@dataclass(frozen=True, eq=False)
class ScaledSelection:
    """min ½ zᵀQz − cᵀz, z ∈ {0, 1}ⁿ, so many ones in each group: Q (n, n), c (n,)."""

    quadratic: Array
    linear: Array
    partition: Partitioned

    @property
    def count(self) -> int:
        """1ᵀz."""
        return self.partition.n_prune

    def value(self, mask: Mask) -> float:
        """½ zᵀQz − cᵀz of a mask (n,)."""
        return 0.5 * float(self.quadratic[np.ix_(mask, mask)].sum()) - float(self.linear[mask].sum())

    def improved(self, mask: Mask, deadline: Deadline | None = None) -> Incumbent:
        """The one-swap local optimum reached from a mask, or as far as there is time."""
        pruned, left = mask.copy(), _MOST_SWAPS
        forces = self.quadratic @ pruned - self.linear
        gain = 1e-13 * max(abs(self.value(pruned)), 1e-300)
        few = selection_swaps.swaps_between_checks(pruned.size)
        while left > 0:
            made, _ = selection_swaps.steepest_descent(
                self.quadratic, forces, pruned, *self.partition.groups.reach, gain, min(few, left)
            )
            left -= few
            if made < few or (deadline is not None and deadline.expired()):
                break
        return Incumbent(pruned, self.value(pruned))

    def binding(self, upper: float) -> ScaledSelection:
        """The same values of masks that keep the groups, and more than `upper`, the value of one, for all others.

        A multiple of Σ (1ᵀz_g − k_g/k · 1ᵀz)² is added: 0 where every group g loses k_g of the k in all, at least 2
        elsewhere. Relaxations that know of k alone then see the groups (Billionnet, Elloumi and Plateau, 2009).
        """
        groups = self.partition.groups
        if not groups.several:
            return self
        off = (groups.of == np.arange(groups.quotas.size)[:, None]) - groups.quotas[:, None] / self.count
        gain = float(np.sort(np.maximum(self.linear, 0.0))[-self.count :].sum())
        weight = _BINDING * max(upper + gain, 0.0)
        return replace(self, quadratic=np.ascontiguousarray(self.quadratic + weight * (off.T @ off)))

    def rounding(self, candidates: Mask) -> float:
        """What the rounding of Q and c can change about the value of a mask within `candidates`.

        An entry of Q is off by a few units in the last place of √Q_ii √Q_jj.
        """
        eps = float(np.finfo(np.float64).eps)
        roots = np.sort(np.sqrt(np.maximum(np.diag(self.quadratic)[candidates], 0.0)))[-self.count :]
        slopes = np.sort(np.abs(self.linear[candidates]))[-self.count :]
        return 16.0 * eps * (float(roots.sum()) ** 2 + float(slopes.sum()))


def scaled(arrays: ProblemArrays, partition: Partitioned) -> tuple[ScaledSelection, float]:
    """The problem with Q = diag(w) H diag(w) and c = g·w in units of the largest entry, and that unit."""
    columns = arrays.factor * arrays.weights
    quadratic = columns.T @ columns
    quadratic[np.diag_indices(arrays.weights.size)] += arrays.damping * arrays.weights**2
    linear = arrays.gradient * arrays.weights
    unit = unit_of(quadratic, linear)
    return ScaledSelection(np.ascontiguousarray(0.5 * (quadratic + quadratic.T) / unit), linear / unit, partition), unit


def find_incumbent(problem: ScaledSelection, deadline: Deadline, seed: int, start: Mask | None) -> Incumbent:
    """Swap-optimal masks from several starts, then tabu search from the best."""
    quadratic, linear, count = problem.quadratic, problem.linear, problem.count
    n, groups = linear.size, problem.partition.groups
    saliency = 0.5 * np.diag(quadratic)
    rng = np.random.default_rng(seed)
    scores = [saliency - linear, saliency, *(saliency * rng.uniform(0.3, 3.0, n) - linear for _ in range(6))]
    masks = [] if start is None else [start.astype(np.bool_)]
    masks += [problem.partition.cheapest_of(score) for score in scores]
    best = problem.improved(masks[0], deadline)
    for mask in masks[1:]:
        if deadline.expired():
            break
        best = min(best, problem.improved(mask, deadline), key=lambda found: found.value)
    frozen, random = np.zeros(n, dtype=np.int64), selection_swaps.random_state(rng)
    pruned, best_mask = best.pruned.copy(), best.pruned.copy()
    forces = quadratic @ pruned - linear
    value = best_value = best.value
    for round_number in range(_TABU_ROUNDS):
        if deadline.expired() or (best_value == 0.0 and not linear.any()):
            break
        value, best_value, idle = selection_swaps.tabu_search(
            quadratic, forces, pruned, *groups.reach, frozen, value, best_value, best_mask,
            round_number * _TABU_MOVES, _TABU_MOVES, max(2, min(10, n // 4)), 40 * groups.quotas.size, random,
        )  # fmt: skip
        if idle >= _TABU_MOVES:
            # Begin again from a perturbed copy of the best mask.
            pruned = kicks.exchanged(best_mask, max(1, min(count, n - count) // 10), rng, groups)
            forces = quadratic @ pruned - linear
            value = problem.value(pruned)
    final = problem.improved(best_mask, deadline)
    return final if final.value < best.value else best


def must_stay(problem: ScaledSelection, upper: float) -> Mask:
    """Weights whose removal alone makes a mask worse than `upper`, bool (n,), among those out of its scale.

    Removing i costs at least ½/(Q⁻¹)_ii, and at least ½ (√Q_ii − Σ √Q_jj)² with the k − 1 longest other columns that
    are not longer than i, less the positive c. They leave the problem before their size can drown the rest.
    """
    quadratic, linear, count = problem.quadratic, problem.linear, problem.count
    n = linear.size
    roots = np.sqrt(np.maximum(np.diag(quadratic), 0.0))
    gain = float(np.sort(np.maximum(linear, 0.0))[-count:].sum())
    height = max(upper + gain, 0.0)
    stays = np.zeros(n, dtype=bool)
    if not (0.5 * roots**2 > _OUT_OF_SCALE**2 * height).any():
        return stays
    # From the longest down: those that stay already do not shorten the others.
    for i in np.argsort(-roots, kind="stable"):
        others = np.sort(roots[~stays & (np.arange(n) != i)])[::-1][: count - 1]
        left = roots[i] - float(others.sum())
        if left <= 0.0 or 0.5 * (left * (1.0 - 1e-9)) ** 2 <= height * (1.0 + 1e-6):
            break
        stays[i] = True
    scaled = np.where(roots > 0.0, roots, 1.0)
    correlation = quadratic / np.outer(scaled, scaled)
    values, vectors = np.linalg.eigh(correlation)
    if values[0] > 1e-9:
        inverse = ((vectors**2) / values).sum(1)
        stays |= 0.5 * roots**2 / inverse * (1.0 - 1e-14 * n / values[0]) > height * (1.0 + 1e-6)
    return stays
