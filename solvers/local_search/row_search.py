"""Swaps by the selection objective in the rows of a layer, and removals moved between rows.

Each row is one dense table (`solvers.moves.selection_swaps`): with x = 1 on P, Q = s diag(w) M diag(w) and
s_i = (Qx)_i − g_i w_i, putting i back gains s_i − ½Q_ii, removing j costs s_j + ½Q_jj; `solvers.layer_rows` moves
removals between rows.
"""

from __future__ import annotations

import numpy as np

from solvers.arrays import Mask
from solvers.layer_rows import LayerRow, Settled
from solvers.local_search.working_set import ROUNDING
from solvers.moves import selection_swaps


def settle_row(row: LayerRow, pruned: Mask, least_gain: float, min_gain: float = 0.0) -> Settled:
    """Best swaps until none gains the larger of two figures, or what rounding could fake."""
    table = row.scale * row.matrix * row.weights[:, None] * row.weights
    linear, half = row.gradient * row.weights, 0.5 * np.diag(table)
    low, high = np.zeros(row.n, dtype=np.int64), np.full(row.n, row.n, dtype=np.int64)
    pruned, swaps, made = pruned.copy(), 0, 1
    while True:
        forces = table @ pruned - linear
        value = 0.5 * float((forces - linear)[pruned].sum())
        if not made:
            break
        rounding = ROUNDING * (float(half[pruned].sum()) + float(np.abs(linear)[pruned].sum()) + abs(value))
        made, _ = selection_swaps.steepest_descent(
            table, forces, pruned, low, high, max(least_gain, min_gain, rounding), 10 * row.n
        )
        swaps += made
    costs, gains = np.where(pruned, np.inf, forces + half), np.where(pruned, forces - half, -np.inf)
    return Settled(pruned, value, swaps, costs, gains)
