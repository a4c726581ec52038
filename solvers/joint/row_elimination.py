"""Backward elimination in all rows of a layer at once, under one budget.

Rows do not interact, so what greedy elimination does in each does not depend on the others: every row is eliminated on
its own (`solvers.moves.row_elimination`), and the removals of all are merged, always the cheapest next one of any row.
How many a row will lose is not known beforehand; a row whose list has been used up is eliminated again, further.

Source: Frantar, Singh and Alistarh, *Optimal Brain Compression*, NeurIPS 2022 (its global step).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from solvers.arrays import Array, Index, Mask
from solvers.errors import SingularHessianError
from solvers.layer_rows import LayerRow, LayerRows
from solvers.linalg import cholesky, named
from solvers.moves.row_elimination import eliminate_row
from solvers.solver import Deadline

#: A row is first eliminated to this many times its equal share.
_AHEAD = 1.25


@dataclass(frozen=True, eq=False)
class _Path:
    """What goes from a row, in order, and at what cost, in units of the objective."""

    order: Index
    costs: Array


def eliminate_rows(layers: LayerRows, deadline: Deadline) -> tuple[Mask, bool]:
    """(pruned (n,), whether it ended before the deadline: else some rows lose what is cheapest alone).

    Raises
    ------
    SingularHessianError
        If M is singular to float64.
    """
    inverses = _inverses(layers)
    pruned = np.zeros(int(layers.starts[-1]), dtype=np.bool_)
    completed = True
    for group, quota in enumerate(layers.quotas.tolist()):
        numbers = np.flatnonzero(layers.group_of == group)
        rows = [layers.rows[row] for row in numbers]
        paths, done = _paths(rows, [inverses[id(row.matrix)] for row in rows], quota, deadline)
        completed = completed and done
        for row, path, count in zip(numbers, paths, _merged(paths, quota), strict=True):
            pruned[layers.starts[row] + path.order[:count]] = True
    return pruned, completed


def _inverses(layers: LayerRows) -> dict[int, Array]:
    """M⁻¹ of every layer, by what it is the inverse of."""
    found: dict[int, Array] = {}
    for row in layers.rows:
        if id(row.matrix) not in found:
            with named("layer"):
                inverse = torch.cholesky_inverse(cholesky(torch.from_numpy(row.matrix), "the curvature of a layer"))
            found[id(row.matrix)] = np.ascontiguousarray((0.5 * (inverse + inverse.T)).numpy())
    return found


def _paths(rows: list[LayerRow], inverses: list[Array], quota: int, deadline: Deadline) -> tuple[list[_Path], bool]:
    """As much of every row as merging needs, and whether that was all eliminated in order."""
    sizes = np.array([row.n for row in rows])
    share = quota / sizes.sum()
    asked = np.minimum(np.ceil(_AHEAD * share * sizes).astype(np.int64) + 1, np.minimum(sizes, quota))
    asked = np.where(sizes.sum() == quota, sizes, asked) if len(rows) > 1 else np.array([quota])
    paths: list[_Path] = [_Path(np.empty(0, dtype=np.int64), np.empty(0))] * len(rows)
    short, completed = np.arange(len(rows)), True

    def one(at: int) -> _Path:
        row, inverse = rows[at], inverses[at]
        value = row.weights - inverse @ (row.gradient / row.scale)
        if deadline.expired():
            # In the order of what each costs alone.
            cost = 0.5 * row.scale * value**2 / np.diag(inverse)
            order = np.argsort(cost, kind="stable")
            return _Path(order, cost[order])
        order, costs = eliminate_row(inverse, 1.0 / np.diag(row.matrix), value, int(asked[at]))
        if not np.isfinite(costs).all():
            raise SingularHessianError("the elimination met a singular H; use a larger damping")
        return _Path(order, row.scale * costs)

    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        while short.size:
            for at, path in zip(short, pool.map(one, short.tolist()), strict=True):
                paths[at] = path
            completed = completed and not deadline.expired()
            counts = _merged(paths, quota)
            lengths = np.array([path.order.size for path in paths])
            short = np.flatnonzero((counts >= lengths) & (lengths < np.minimum(sizes, quota)))
            asked[short] = np.minimum(2 * lengths[short] + 1, np.minimum(sizes, quota)[short])
    return paths, completed


def _merged(paths: list[_Path], quota: int) -> list[int]:
    """How many go of each row when always the cheapest next one goes; no more than their paths have."""
    if len(paths) == 1:
        return [quota]
    # A removal waits for those before it in its row, however cheap it is.
    keys = np.concatenate([np.maximum.accumulate(path.costs) for path in paths])
    row_of = np.repeat(np.arange(len(paths)), [path.order.size for path in paths])
    chosen = np.argsort(keys, kind="stable")[:quota]
    counts: list[int] = np.bincount(row_of[chosen], minlength=len(paths)).tolist()
    return counts
