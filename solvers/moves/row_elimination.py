"""Backward elimination in one row of a layer: the optimal brain surgeon as a Cholesky factorisation of M⁻¹.

Removing i costs s v_i² / (2 N_ii) and takes v ← v − N_:i v_i/N_ii, N ← N − N_:i N_i:/N_ii, where N is the inverse of M
over the weights that are left. Since all rows of a layer begin with the same N = M⁻¹, what a row needs of its own N are
the columns of its pivots, which are those of a Cholesky factor of M⁻¹ pivoted by cost:

    l_t = (M⁻¹_:i − Σ_{u<t} l_u l_ui) / √N_ii ,      v ← v − l_t v_i/√N_ii ,      diag N ← diag N − l_t² .

Removing t of d weights takes about t²(d/2 − t/3) multiplications, one at a time and exactly, and the memory of the l.

Source: Hassibi and Stork, *Optimal Brain Surgeon*, NeurIPS 1993; Frantar, Singh and Alistarh, *Optimal Brain
Compression*, NeurIPS 2022, for rows that share an inverse.
"""

from __future__ import annotations

import numba
import numpy as np

from solvers.arrays import Array, Index

#: Removals after which columns of weights that are gone are dropped.
_STRIDE = 64


@numba.njit(cache=True, nogil=True)
def eliminate_row(inverse: Array, least: Array, value: Array, count: int) -> tuple[Index, Array]:
    """The first `count` weights that go, and v_i²/(2 N_ii) of each when it goes.

    Parameters
    ----------
    inverse : float64 (d, d)
        M⁻¹.
    least : float64 (d,)
        1 / M_ii, below which no N_ii lies.
    value : float64 (d,)
        v before, the minimiser over all weights.
    count : int ≤ d
    """
    alive = np.arange(value.size)
    value = value.copy()
    diagonal, least = np.diag(inverse).copy(), least.copy()
    columns = np.empty((count, value.size))
    order, costs = np.empty(count, dtype=np.int64), np.empty(count)
    gone = np.zeros(value.size, dtype=np.bool_)
    for step in range(count):
        if step and step % _STRIDE == 0:
            stay = np.flatnonzero(~gone)
            narrow = np.empty((count, stay.size))
            for t in range(step):
                for k in range(stay.size):
                    narrow[t, k] = columns[t, stay[k]]
            columns = narrow
            alive, value, diagonal, least = alive[stay], value[stay], diagonal[stay], least[stay]
            gone = np.zeros(stay.size, dtype=np.bool_)
        best, at = np.inf, -1
        for k in range(alive.size):
            if not gone[k]:
                cost = value[k] * value[k] / diagonal[k]
                if at < 0 or cost < best:
                    best, at = cost, k
        row, first = columns[step], inverse[alive[at]]
        for k in range(alive.size):
            row[k] = first[alive[k]]
        if step:
            row -= np.dot(np.ascontiguousarray(columns[:step, at]), columns[:step])
        root = np.sqrt(max(row[at], least[at]))
        shift = value[at] / root
        for k in range(alive.size):
            row[k] /= root
            value[k] -= row[k] * shift
            diagonal[k] = max(diagonal[k] - row[k] * row[k], least[k])
        order[step], costs[step] = alive[at], 0.5 * best
        gone[at] = True
    return order, costs
