"""Swaps by the joint objective in the rows of a layer, and removals moved between rows.

Each row is a dense joint problem of d weights, searched by steepest descent on its tableau
(`solvers.moves.joint_swaps`), where removing i costs ½ s v_i²/N_ii and putting j back gains ½ s ρ_j²/σ_j;
`solvers.layer_rows` moves removals between rows.
"""

from __future__ import annotations

import numpy as np

from solvers.arrays import Array, Mask
from solvers.layer_rows import LayerRow, Settled
from solvers.moves import joint_swaps


def settle_row(row: LayerRow, pruned: Mask, least_gain: float) -> Settled:
    """Best swaps until none gains; raises numpy.linalg.LinAlgError where M_SS is singular."""
    slope = row.gradient / row.scale
    linear = row.matrix @ row.weights - slope
    constant = 0.5 * float(row.weights @ (linear - slope))
    low, high = np.zeros(row.n, dtype=np.int64), np.full(row.n, row.n, dtype=np.int64)
    kept, swaps = ~pruned, 0
    best: tuple[float, Mask, Array, Array] | None = None
    made = 1
    while made:
        table, solution = joint_swaps.build(row.matrix, linear, kept)
        value = constant - 0.5 * float(linear[kept] @ solution[kept])
        # Beyond rounding: a nearly singular M would have this go round for ever.
        if best is not None and not value < best[0]:
            break
        best = value, kept.copy(), np.diag(table).copy(), solution.copy()
        least = max(least_gain / row.scale, 1e-12 * abs(value))
        _, made = joint_swaps.descend(table, solution, kept, low, high, least, joint_swaps.REFRESH)
        swaps += made
    assert best is not None
    value, kept, diagonal, solution = best
    alone = 0.5 * row.scale * solution**2 / np.abs(diagonal)
    # On kept weights the diagonal is −N_ii, and the cost v²/(2N_ii).
    costs = np.where(kept, alone, np.inf)
    gains = np.where(kept, -np.inf, alone)
    return Settled(~kept, row.scale * value, swaps, costs, gains)
