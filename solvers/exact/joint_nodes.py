"""Compiled kernels of the joint tree: what a node is, its fixings, its enumeration and its branching.

The mathematics of a node and of its bound are in `solvers.exact.joint_bound`.
"""
# The compiled functions carry no annotations: numba infers their types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

from enum import IntEnum

import numba
import numpy as np

from solvers.exact.best_first import Fate
from solvers.exact.joint_bound import ROUNDING, bound_node
from solvers.exact.joint_subsets import DEPENDENT, best_of_groups, best_subset, count_subsets

#: Nodes with fewer choices than this times m³ are enumerated at once; with fewer than the second, when the bound fails.
DIRECT, AFTER_BOUND = 2.5, 15.0
#: How many times as long a choice takes where groups are kept.
GROUPED = 10.0
# numba takes enums as numbers, but not in array expressions.
_KEPT, _PRUNED, _OPEN = int(Fate.KEPT), int(Fate.PRUNED), int(Fate.OPEN)


class Outcome(IntEnum):
    """What became of a node: cut off, decided by its best mask, or to be branched on."""

    CLOSED = 0
    SOLVED = 1
    BRANCH = 2


@numba.njit(cache=True, error_model="numpy", nogil=True)
def reduce_node(hessian, root, centre, status):
    """(open indices, G, v, F(O)) of a node; see the module's docstring."""
    n = centre.size
    kept = np.nonzero(status == _KEPT)[0]
    undecided = np.nonzero(status == _OPEN)[0]
    removed = np.nonzero(status == _PRUNED)[0]
    support = np.concatenate((kept, undecided))
    size, first = support.size, kept.size
    block = np.empty((size, size))
    right = np.zeros(size)
    for x in range(size):
        for y in range(size):
            block[x, y] = hessian[support[x], support[y]]
        for y in removed:
            right[x] += hessian[support[x], y] * centre[y]
    change = np.zeros(n)
    for i in removed:
        change[i] = -centre[i]
    lower = np.linalg.cholesky(block)
    if removed.size > 0:
        for x in range(size):
            for y in range(x):
                right[x] -= lower[x, y] * right[y]
            right[x] /= lower[x, x]
        for x in range(size - 1, -1, -1):
            for y in range(x + 1, size):
                right[x] -= lower[y, x] * right[y]
            right[x] /= lower[x, x]
        for x in range(size):
            change[support[x]] = right[x]
    image = root @ change
    base = 0.5 * np.dot(image, image)
    corner = lower[first:, first:].copy()
    return undecided, corner @ corner.T, centre[undecided] + change[undecided], base


@numba.njit(cache=True, error_model="numpy", nogil=True)
def mask_value(hessian, root, centre, removed_mask):
    """½ ‖root·d‖² of the refit of a mask (n,), d = v − c; dᵀHd would lose half the digits where terms cancel."""
    change = np.zeros(centre.size)
    removed = np.nonzero(removed_mask)[0]
    kept = np.nonzero(~removed_mask)[0]
    for i in removed:
        change[i] = -centre[i]
    if kept.size > 0 and removed.size > 0:
        block = np.empty((kept.size, kept.size))
        right = np.zeros(kept.size)
        for x in range(kept.size):
            for y in range(kept.size):
                block[x, y] = hessian[kept[x], kept[y]]
            for y in removed:
                right[x] += hessian[kept[x], y] * centre[y]
        solution = np.linalg.solve(block, right)
        for x in range(kept.size):
            change[kept[x]] = solution[x]
    image = root @ change
    return 0.5 * np.dot(image, image)


@numba.njit(cache=True, error_model="numpy", nogil=True)
def cheapest_removal(inverse, target, size):
    """Positions (i, j) of the one (i = j) or two weights R with the least ½ v_Rᵀ (inverse_RR)⁻¹ v_R."""
    m = target.size
    best, first, second = np.inf, 0, size - 1
    for x in range(m):
        if size == 1:
            value = target[x] * target[x] / inverse[x, x]
            if value < best:
                best, first, second = value, x, x
            continue
        for y in range(x):
            determinant = inverse[x, x] * inverse[y, y] - inverse[x, y] * inverse[x, y]
            if determinant <= DEPENDENT * inverse[x, x] * inverse[y, y]:
                continue
            value = target[x] * target[x] * inverse[y, y] + target[y] * target[y] * inverse[x, x]
            value = (value - 2.0 * target[x] * target[y] * inverse[x, y]) / determinant
            if value < best:
                best, first, second = value, x, y
    return first, second


@numba.njit(cache=True, error_model="numpy", nogil=True)
def enumerate_kept(hessian, root, centre, status, undecided, matrix, target, base, owner, needs, cutoff):
    """(outcome, bound, mask, value) of a node by looking at every choice of the weights to keep."""
    inner = matrix @ target
    height = 0.5 * np.dot(target, inner)
    rounding = 4.0 * ROUNDING * height
    to_keep = np.sum(needs)
    if needs.size > 1:
        gain, second, chosen = best_of_groups(matrix, inner, owner, needs, base + height - cutoff - rounding)
    elif to_keep == 1:
        gains = 0.5 * inner * inner / np.diag(matrix)
        order = np.argsort(-gains)
        chosen = order[:1]
        gain, second = gains[order[0]], gains[order[1]]
    else:
        gain, second, chosen = best_subset(matrix, inner, to_keep, base + height - cutoff - rounding)
    mask = status != _KEPT
    if chosen[0] < 0:
        return Outcome.CLOSED, cutoff, mask, np.inf
    for x in chosen:
        mask[undecided[x]] = False
    value = mask_value(hessian, root, centre, mask)
    # How far the gain of the best is off its value tells what to allow for in the next best.
    rounding += 2.0 * abs(base + height - gain - value)
    return Outcome.SOLVED, min(value, base + height - second - rounding), mask, value


@numba.njit(cache=True, error_model="numpy", nogil=True)
def complete_removal(matrix, target, status, undecided, to_remove):
    """The best mask of a node that has one or two weights left to remove."""
    first, second = cheapest_removal(np.linalg.inv(matrix), target, to_remove)
    mask = status == _PRUNED
    mask[undecided[first]] = True
    mask[undecided[second]] = True
    return mask


@numba.njit(cache=True, error_model="numpy", nogil=True)
def effort_of(matrix, target, owner, needs, cutoff):
    """Subsets to look at, in units of m³; inf where gains are too large beside the cutoff to tell masks apart."""
    m = target.size
    if 2.0 * ROUNDING * np.dot(target, matrix @ target) > 1e-9 * cutoff:
        return np.inf
    if needs.size == 1:
        return 0.0 if needs[0] == 1 else count_subsets(m, needs[0]) / m**3
    count = GROUPED
    for group in range(needs.size):
        count *= count_subsets(np.sum(owner == group), needs[group])
    return count / m**3


@numba.njit(cache=True, error_model="numpy", nogil=True)
def shares_of(share, owner, keeps):
    """The parent's z, made to sum to the number to keep of each group and moved inside (0, 1)."""
    moved = np.empty(share.size)
    for group in range(keeps.size):
        inside = np.nonzero(owner == group)[0]
        start, to_keep = share[inside], keeps[group]
        excess = to_keep - np.sum(start)
        if excess > 0.0:
            start = start + (1.0 - start) * (excess / np.sum(1.0 - start))
        else:
            start = start * (to_keep / np.sum(start))
        moved[inside] = 0.9 * start + 0.1 * to_keep / start.size
    return moved


@numba.njit(cache=True, error_model="numpy", nogil=True)
def settle_groups(status, group, keeps):
    """Decide, in place, the groups without a choice left; (feasible, group of each open weight (m,), keeps of those).

    Groups with a choice are numbered afresh.
    """
    needs, opened = keeps.copy(), np.zeros_like(keeps)
    for i in range(status.size):
        needs[group[i]] -= status[i] == _KEPT
        opened[group[i]] += status[i] == _OPEN
    number, left, count = np.full(keeps.size, -1), np.empty_like(keeps), 0
    for g in range(keeps.size):
        if needs[g] < 0 or needs[g] > opened[g]:
            return False, group[:0].copy(), left[:0]
        if 0 < needs[g] < opened[g]:
            number[g], left[count] = count, needs[g]
            count += 1
    owner, size = np.empty_like(group), 0
    for i in range(status.size):
        if status[i] != _OPEN:
            continue
        if number[group[i]] < 0:
            status[i] = _PRUNED if needs[group[i]] == 0 else _KEPT
        else:
            owner[size] = number[group[i]]
            size += 1
    return True, owner[:size], left[:count]


@numba.njit(cache=True, error_model="numpy", nogil=True)
def first_of_groups(order, owner, keeps):
    """Whether a weight is among the first of its group in an order, as many as the group keeps; bool (m,)."""
    chosen, left = np.zeros(order.size, np.bool_), keeps.copy()
    for x in order:
        if left[owner[x]] > 0:
            left[owner[x]] -= 1
            chosen[x] = True
    return chosen


@numba.njit(cache=True, error_model="numpy", nogil=True)
def fix(status, undecided, scores, order, owner, keeps, room):
    """Decide, in place, what reduced costs leave no choice about; how many."""
    chosen = first_of_groups(order, owner, keeps)
    last_in, first_out = np.full(keeps.size, np.inf), np.full(keeps.size, -np.inf)
    for x in range(order.size):
        if chosen[x]:
            last_in[owner[x]] = min(last_in[owner[x]], scores[x])
        else:
            first_out[owner[x]] = max(first_out[owner[x]], scores[x])
    fixed = 0
    for x in order:
        if chosen[x]:
            if 0.5 * (scores[x] - first_out[owner[x]]) >= room:
                status[undecided[x]] = _KEPT
                fixed += 1
        elif 0.5 * (last_in[owner[x]] - scores[x]) >= room:
            status[undecided[x]] = _PRUNED
            fixed += 1
    return fixed


@numba.njit(cache=True, error_model="numpy", nogil=True)
def process_node(
    hessian, root, centre, status, group, keeps, diagonal, share, cutoff, barrier, barrier_end, n_steps, stop
):
    """Bound a node, fix what its reduced costs decide, and pick a weight to branch on.

    Parameters
    ----------
    hessian : (n, n), root : (r, n) with rootᵀroot = hessian, centre : (n,)
    status : int8 (n,)
        Fate.OPEN, Fate.KEPT or Fate.PRUNED; modified by the fixings.
    group : int64 (n,), keeps : int64 (groups,)
        The group of each weight, and how many of each are kept in the end.
    diagonal, share : (n,)
        D and z of the parent; entries of open weights are modified.
    cutoff : float
        Masks of at least this value are of no interest.
    stop : bool (1,)
        Whether time is up.

    Returns
    -------
    outcome : int
        Outcome.CLOSED, Outcome.SOLVED (the mask is the best of the node) or Outcome.BRANCH.
    bound : float
    branch : int
        A weight to branch on, −1 unless Outcome.BRANCH.
    mask : bool (n,)
        A feasible mask.
    value : float
        Its objective, inf if there is none.
    """
    mask = np.zeros(centre.size, np.bool_)
    best = -np.inf
    while True:
        feasible, owner, needs = settle_groups(status, group, keeps)
        if not feasible:
            return Outcome.CLOSED, np.inf, -1, mask, np.inf
        n_open, to_keep, single = owner.size, np.sum(needs), needs.size == 1
        if n_open == 0:
            mask = status == _PRUNED
            value = mask_value(hessian, root, centre, mask)
            return Outcome.SOLVED, value, -1, mask, value
        undecided, matrix, target, base = reduce_node(hessian, root, centre, status)
        best = max(best, base)
        room = cutoff - base
        if room <= 0.0:
            return Outcome.CLOSED, base, -1, mask, np.inf
        if single and n_open - to_keep <= 2:
            mask = complete_removal(matrix, target, status, undecided, n_open - to_keep)
            value = mask_value(hessian, root, centre, mask)
            return Outcome.SOLVED, value, -1, mask, value
        effort = effort_of(matrix, target, owner, needs, cutoff)
        if effort < DIRECT:
            outcome, low, mask, value = enumerate_kept(
                hessian, root, centre, status, undecided, matrix, target, base, owner, needs, cutoff
            )
            return outcome, max(best, low), -1, mask, value
        start = shares_of(share[undecided], owner, needs)
        bound, inner, z, scores, order = bound_node(
            matrix, target, owner, needs, diagonal[undecided], start, barrier, barrier_end, n_steps, room, stop
        )
        best = max(best, base + bound)
        if bound >= room:
            return Outcome.CLOSED, best, -1, mask, np.inf
        if effort < AFTER_BOUND:
            outcome, low, mask, value = enumerate_kept(
                hessian, root, centre, status, undecided, matrix, target, base, owner, needs, cutoff
            )
            return outcome, max(best, low), -1, mask, value
        for x in range(n_open):
            diagonal[undecided[x]] = inner[x]
            share[undecided[x]] = z[x]
        if fix(status, undecided, scores, order, owner, needs, room - bound) > 0:
            continue
        mask = status == _PRUNED
        by_share = np.argsort(-z)
        mask[undecided[~first_of_groups(by_share, owner, needs)]] = True
        # Branch on the weight that most wants to be kept: the child that removes it is soon cut off. In many groups
        # there are many such, about which nothing is gained by knowing: there on that which costs most to be unsure of.
        at = by_share[0] if single else np.argmax(scores * z * (1.0 - z))
        return Outcome.BRANCH, best, undecided[at], mask, mask_value(hessian, root, centre, mask)
