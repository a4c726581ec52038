"""Incumbents of the joint tree: one-swap local optima of the refitted objective, with random restarts by kicks.

With N = H_SS⁻¹, v_S the refit, T = H_PS N, residual c_P = (H(ĉ − v))_P (ĉ the unconstrained
minimiser) and Schur complements σ_i = H_ii − T_i·H_iS, removing j ∈ S and putting back i ∈ P changes the objective by

    ½ v_j²/N_jj − ½ (c_i + T_ij v_j/N_jj)² / (σ_i + T_ij²/N_jj) ,

exactly and for all pairs at once in O(|P| |S|). Starts: backward elimination with refit (the optimal brain surgeon) and
forward selection (orthogonal matching pursuit with exact gains); then iterated local search.
"""
# The compiled functions carry no annotations: numba infers their types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import numba
import numpy as np

from solvers.exact.joint_kernels import mask_value


@numba.njit(cache=True, error_model="numpy", nogil=True)
def descend(hessian, root, centre, mask, n_swaps):
    """The one-swap local optimum reached from a mask (n,) by the steepest swaps, at most n_swaps, and its value."""
    mask = mask.copy()
    value = mask_value(hessian, root, centre, mask)
    for _ in range(n_swaps):
        kept, removed = np.nonzero(~mask)[0], np.nonzero(mask)[0]
        k, p = kept.size, removed.size
        if k == 0 or p == 0:
            break
        block = np.empty((k, k))
        cross = np.empty((p, k))
        for y in range(k):
            for x in range(k):
                block[x, y] = hessian[kept[x], kept[y]]
            for x in range(p):
                cross[x, y] = hessian[removed[x], kept[y]]
        inverse = np.linalg.inv(block)
        transfer = cross @ inverse
        # d = v − c: on the removed −c, on the kept the refit; the residual on the removed is −(Hd)_P.
        change = np.zeros(centre.size)
        for x in removed:
            change[x] = -centre[x]
        step = transfer.T @ centre[removed]
        for y in range(k):
            change[kept[y]] = step[y]
        residual = -(hessian @ change)
        best, put_back, taken = 0.0, -1, -1
        for x in range(p):
            schur = hessian[removed[x], removed[x]]
            for y in range(k):
                schur -= transfer[x, y] * cross[x, y]
            for y in range(k):
                weight = centre[kept[y]] + change[kept[y]]
                slope = residual[removed[x]] + transfer[x, y] * weight / inverse[y, y]
                curvature = schur + transfer[x, y] * transfer[x, y] / inverse[y, y]
                if not curvature > 0.0:
                    continue
                gain = 0.5 * weight * weight / inverse[y, y] - 0.5 * slope * slope / curvature
                if gain < best:
                    best, put_back, taken = gain, removed[x], kept[y]
        if put_back < 0:
            break
        mask[put_back], mask[taken] = False, True
        after = mask_value(hessian, root, centre, mask)
        if not after < value * (1.0 - 1e-10):
            mask[put_back], mask[taken] = True, False
            break
        value = after
    return mask, value


@numba.njit(cache=True, error_model="numpy", nogil=True)
def backward(hessian, centre, n_prune):
    """Remove n_prune weights one at a time, each time the cheapest under refit."""
    n = centre.size
    inverse = np.linalg.inv(hessian)
    values = centre.copy()
    mask = np.zeros(n, np.bool_)
    for _ in range(n_prune):
        best, item = np.inf, -1
        for i in range(n):
            if not mask[i]:
                cost = values[i] * values[i] / inverse[i, i]
                if item < 0 or cost < best:
                    best, item = cost, i
        mask[item] = True
        column = inverse[:, item].copy()
        pivot = column[item]
        values -= column * (values[item] / pivot)
        for i in range(n):
            if not mask[i]:
                for j in range(n):
                    inverse[i, j] -= column[i] * column[j] / pivot
    return mask


@numba.njit(cache=True, error_model="numpy", nogil=True)
def forward(hessian, centre, n_kept):
    """Keep n_kept weights, each time the one that lowers the refitted objective most."""
    n = centre.size
    schur = hessian.copy()
    residual = hessian @ centre
    mask = np.ones(n, np.bool_)
    for _ in range(n_kept):
        best, item = -1.0, -1
        for i in range(n):
            if mask[i]:
                gain = residual[i] * residual[i] / schur[i, i] if schur[i, i] > 1e-14 * hessian[i, i] else 0.0
                if gain > best:
                    best, item = gain, i
        mask[item] = False
        column = schur[:, item].copy()
        pivot = column[item]
        if pivot > 1e-14 * hessian[item, item]:
            residual -= column * (residual[item] / pivot)
            for i in range(n):
                if mask[i]:
                    for j in range(n):
                        schur[i, j] -= column[i] * column[j] / pivot
    return mask


@numba.njit(cache=True, error_model="numpy", nogil=True)
def kicked(hessian, root, centre, mask, value, generator, rounds):
    """Iterated local search: exchange a few pairs, descend, accept what is not much worse; returns the best.

    `generator` is a numpy Generator.
    """
    best_mask, best = mask.copy(), value
    current, height = mask.copy(), value
    n_kept, n_removed = np.sum(~mask), np.sum(mask)
    most = min(6, n_kept, n_removed)
    for _ in range(rounds):
        trial = current.copy()
        size = generator.integers(1, most + 1)
        kept = generator.permutation(np.nonzero(~trial)[0])[:size]
        removed = generator.permutation(np.nonzero(trial)[0])[:size]
        for t in range(size):
            trial[kept[t]] = True
            trial[removed[t]] = False
        trial, reached = descend(hessian, root, centre, trial, 50 * centre.size)
        if reached <= height * (1.0 + 0.02 * generator.random()):
            current, height = trial, reached
        if reached < best:
            best_mask, best = trial.copy(), reached
    return best_mask, best
