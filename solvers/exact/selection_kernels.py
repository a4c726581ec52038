"""Depth-first search below one node of the selection tree, in compiled code.

The node problem and its active-set method are in `solvers.exact.selection_face`.

Branching: if F alone were left free, fixing z_q to 0 or 1 would raise f by ½ z_q²/P_qq or ½ (1 − z_q)²/P_qq: strong
branching for nothing. The product of the two, each capped at three times what is needed to prune, weighted by
their sum, chooses q. The child with the smaller rise is searched first.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numba
import numpy as np

from solvers.exact.selection_face import (
    Face,
    Indices,
    Status,
    Statuses,
    begin_face,
    branch,
    certificate,
    clamp,
    complete,
    most_wrong,
    newton,
    release,
    restore_sum,
    round_single,
)
from solvers.problem import Array, Mask

_ROUNDS = 60


class Count(IntEnum):
    """Places in the counters."""

    NODES = 0
    PIVOTS = 1
    FIXINGS = 2
    ROUNDS = 3
    LEAVES = 4
    STUCK = 5


_N_COUNTS = len(Count)


class Outcome(IntEnum):
    """What the relaxation of a node says."""

    BRANCH = 0
    CLOSED = 1
    LEAF = 2


class Stack(NamedTuple):
    """The far children still to be searched. Their inverses lie one after another in a pool."""

    status: Statuses
    z: Array
    members: Indices
    centre: Array
    shape: Indices
    """Size of F, place in the pool, position of the weight to branch on, and what it is fixed to; (room, 4)."""
    bound: Array


@numba.njit(cache=True, nogil=True)
def relax(
    face: Face, size: int, count: int, constant: float, bound: float, cut: float, counters: Indices
) -> tuple[Outcome, int, float, float, float, float, float]:
    """Minimise over the node by pivots until its bound reaches `cut` or nothing more is to be gained.

    Returns
    -------
    outcome : Outcome
        LEAF where z is integral and no mask of the node is better than it.
    size : int
    bound, current, value : float
        The best certificate, the last one, f(z).
    high, after : float
        The k-th smallest and the next partial derivative.
    """
    ones, free = 0, 0
    for i in range(face.z.shape[0]):
        ones += face.status[i] == Status.PRUNED
        free += face.status[i] >= Status.AT_ZERO
    left = count - ones
    current, value, high, after = bound, np.inf, 0.0, 0.0
    if left < 0 or left > free:
        return Outcome.CLOSED, size, bound, current, value, high, after
    settled = left in (0, free)
    for _ in range(_ROUNDS):
        counters[Count.ROUNDS] += 1
        if not settled:
            size = restore_sum(face, size, count)
        newton(face, size)
        current, value, high, after = certificate(
            face.z, face.g, face.linear, face.sums, face.status, left, constant, face.work
        )
        bound = max(bound, current)
        if bound >= cut:
            return Outcome.CLOSED, size, bound, current, value, high, after
        if settled:
            return Outcome.LEAF, size, bound, current, complete(face, left, constant), high, after
        if face.stop[0]:
            break
        kept = clamp(face, size)
        counters[Count.PIVOTS] += size - kept
        clamped, size = kept < size, round_single(face, kept)
        if clamped:
            continue
        if size == 0:
            integral, size = begin_face(face)
            if integral:
                return Outcome.LEAF, size, bound, current, value, high, after
            if size < 2:
                break
            continue
        # Stop once all wrong signs together could raise the bound by only a thousandth of what is needed.
        var = most_wrong(face, size, 1e-3 * (cut - bound) / max(1, left))
        if var < 0:
            break
        grown = release(face, size, var)
        if grown == size:
            break
        size = grown
        counters[Count.PIVOTS] += 1
    return Outcome.BRANCH, size, bound, current, value, high, after


@numba.njit(cache=True, nogil=True)
def fix(face: Face, high: float, after: float, needed: float) -> int:
    """Fix weights by reduced costs: against the order of the partial derivatives costs their difference; how many."""
    fixed = 0
    for i in range(face.z.shape[0]):
        if face.status[i] == Status.AT_ZERO and face.g[i] - high >= needed:
            face.status[i] = Status.KEPT
            fixed += 1
        elif face.status[i] == Status.AT_ONE and after - face.g[i] >= needed:
            face.status[i] = Status.PRUNED
            fixed += 1
    return fixed


@numba.njit(cache=True, nogil=True)
def branching_position(inverse: Array, members: Indices, size: int, z: Array, needed: float) -> int:
    """The position in F to branch on."""
    best, chosen = -1.0, 0
    for q in range(size):
        if inverse[q, q] <= 0.0:
            continue
        x = z[members[q]]
        down = 0.5 * x * x / inverse[q, q]
        up = 0.5 * (1.0 - x) * (1.0 - x) / inverse[q, q]
        score = min(down, 3.0 * needed) * min(up, 3.0 * needed) * (down + up)
        if score > best:
            best, chosen = score, q
    return chosen


@numba.njit(cache=True, nogil=True)
def _new_stack(room: int, n: int) -> Stack:
    return Stack(
        np.empty((room, n), np.int8),
        np.empty((room, n)),
        np.empty((room, n), np.int64),
        np.empty((room, n)),
        np.empty((room, 4), np.int64),
        np.empty(room),
    )


@numba.njit(cache=True, nogil=True)
def _push(stack: Stack, depth: int, pool: Array, face: Face, size: int, q: int, to: int, bound: float) -> Array:
    """Put a far child on the stack; the pool, a larger one where it was full."""
    used = 0 if depth == 0 else stack.shape[depth - 1, 1] + stack.shape[depth - 1, 0] ** 2
    if used + size * size > pool.shape[0]:
        larger = np.empty(2 * pool.shape[0] + size * size)
        larger[:used] = pool[:used]
        pool = larger
    stack.shape[depth, 0], stack.shape[depth, 1] = size, used
    stack.shape[depth, 2], stack.shape[depth, 3] = q, to
    stack.bound[depth] = bound
    stack.status[depth] = face.status
    stack.z[depth] = face.z
    for i in range(size):
        stack.members[depth, i], stack.centre[depth, i] = face.members[i], face.centre[i]
        for j in range(size):
            pool[used] = face.inverse[i, j]
            used += 1
    return pool


@numba.njit(cache=True, nogil=True)
def _pop(stack: Stack, depth: int, pool: Array, face: Face) -> int:
    """Take the far child at `depth` up again and branch; the size of F, −1 where its chain forbids it."""
    size, at = stack.shape[depth, 0], stack.shape[depth, 1]
    face.status[:] = stack.status[depth]
    face.z[:] = stack.z[depth]
    for i in range(size):
        face.members[i], face.centre[i] = stack.members[depth, i], stack.centre[depth, i]
        for j in range(size):
            face.inverse[i, j] = pool[at]
            at += 1
    return branch(face, size, stack.shape[depth, 2], stack.shape[depth, 3])


@numba.njit(cache=True, nogil=True)
def _hand_back(opened: int, face: Face, bound: float, o_status: Statuses, o_bound: Array, o_z: Array) -> int:
    """Add the node to those handed back; how many there are."""
    for i in range(face.z.shape[0]):
        o_status[opened, i] = face.status[i]
        if face.status[i] > Status.AT_ZERO:
            o_status[opened, i] = Status.AT_ZERO
    o_bound[opened] = bound
    o_z[opened] = face.z
    return opened + 1


@numba.njit(cache=True, nogil=True)
def explore(
    face: Face, size: int, count: int, constant: float, upper: float, best: Mask, node_limit: int, tolerance: float
) -> tuple[float, Statuses, Array, Array, Indices]:
    """Search the tree below a node in which every weight is still free.

    Parameters
    ----------
    face : Face
        From `new_face`, with M positive definite on 1^⊥.
    size : int
    count : int, 0 < k < n
    constant : float
    upper : float
        Value of the incumbent; nodes that cannot beat it by `tolerance` are dropped.
    best : bool (n,)
        Overwritten with a better incumbent where one is found.
    node_limit : int
        After this many nodes, or when time is up, the open ones are handed back.
    tolerance : float
        Absolute.

    Returns
    -------
    upper : float
    statuses : int8 (m, n)
        The m open nodes, as `Fate`.
    bounds : float64 (m,)
    points : float64 (m, n)
    counters : int64 (6,)
    """
    n = face.z.shape[0]
    counters, room = np.zeros(_N_COUNTS, np.int64), n + 2
    stack, depth, pool = _new_stack(room, n), 0, np.empty(4 * (size + 8) * (size + 8))
    opened, o_status, o_bound, o_z = 0, np.empty((room, n), np.int8), np.empty(room), np.empty((room, n))
    bound, pending = -np.inf, True
    while pending or depth > 0:
        cut = upper - tolerance
        if not pending:
            depth -= 1
            bound = stack.bound[depth]
            if bound >= cut:
                continue
            size = _pop(stack, depth, pool, face)
            if size < 0:
                continue
            if counters[Count.NODES] >= node_limit:
                opened = _hand_back(opened, face, bound, o_status, o_bound, o_z)
                continue
        pending = False
        counters[Count.NODES] += 1
        outcome, size, bound, current, value, high, after = relax(face, size, count, constant, bound, cut, counters)
        if outcome == Outcome.LEAF:
            counters[Count.LEAVES] += 1
            ones = 0
            for i in range(n):
                ones += face.z[i] > 0.5
            if ones != count:
                # Rounding has the last word here: whoever called solves it afresh.
                opened = _hand_back(opened, face, bound, o_status, o_bound, o_z)
                counters[Count.STUCK] += 1
                if opened + depth + 2 >= room:
                    node_limit = counters[Count.NODES]
            elif value < upper:
                upper = value
                for i in range(n):
                    best[i] = face.z[i] > 0.5
        if outcome != Outcome.BRANCH:
            continue
        counters[Count.FIXINGS] += fix(face, high, after, cut - current)
        full = face.stop[0] or opened + depth + 2 >= room
        if size == 0 or full:
            # Cannot be branched on here; whoever called solves it afresh.
            opened = _hand_back(opened, face, bound, o_status, o_bound, o_z)
            counters[Count.STUCK] += 1
            if full:
                node_limit = counters[Count.NODES]
            continue
        q = branching_position(face.inverse, face.members, size, face.z, cut - bound)
        near = 0 if face.z[face.members[q]] < 0.5 else 1
        pool = _push(stack, depth, pool, face, size, q, 1 - near, bound)
        depth += 1
        size = branch(face, size, q, near)
        pending = size >= 0
    return upper, o_status[:opened].copy(), o_bound[:opened].copy(), o_z[:opened].copy(), counters
