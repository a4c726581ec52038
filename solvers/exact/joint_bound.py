"""The saddle-point bound of one node of the joint tree: a certificate, and the path that maximises it.

A node of the tree keeps the weights I, removes the weights O and leaves U open; k more of U are to be kept. With
c the unconstrained minimiser and I refitted freely, the problem on U is again of the form it had at the root,

    F(O) + min over u, k non-zeros, of ½ (u − v)ᵀ G (u − v),      G = H_UU − H_UI H_II⁻¹ H_IU ,

v being the values on U after O alone is removed. For any diagonal D > 0 with C = G − D ⪰ 0, replacing D_i u_i² by its
perspective D_i u_i²/z_i and linearising the convex ½ uᵀCu at *any* point x gives a bound that needs no convergence:

    ½ vᵀGv − ½ xᵀCx − ½ Σ of the k largest s_i²/D_i ,            s = Gv − Cx .            (certificate)

Where k is said for each of several groups, so are the largest: of each group its own, and z sums to k in each.

Maximising it over x and D is the semidefinite relaxation of Dong, Chen & Linderoth (2015), "Regularization vs.
relaxation"; equivalently max over D, min over z in the capped simplex, of

    φ(D, z) = min over u of  ½ (u − v)ᵀ G (u − v) + ½ Σ D_i u_i² (1/z_i − 1) ,

concave in D and convex in z. `bound_node` follows the central path of that saddle: a primal-dual Newton step in z
(Hessian diag(s/D) (C⁻¹ + Z/D)⁻¹ diag(s/D), by the Woodbury identity finite also at z = 0) and a Newton step in D of the
barrier μ log det(G − D) + μ Σ log D_i, whose Hessian is μ (C⁻¹ ∘ C⁻¹). Both children of a node inherit a feasible D:
a principal submatrix of C is PSD, and so is the Schur complement left when a weight is kept.
"""
# The compiled functions carry no annotations: numba infers their types.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import numba
import numpy as np

#: Relative error allowed for in a factorisation of a correlation matrix of unit diagonal, per row.
ROUNDING = 1e-15


@numba.njit(cache=True, error_model="numpy", nogil=True)
def dominates(matrix, diagonal, lower):
    """Whether matrix − diag(diagonal) is certainly PSD: its Cholesky factor exists with room for rounding.

    `lower` (m, m) is scratch space.
    """
    m = diagonal.size
    largest = 0.0
    for j in range(m):
        largest = max(largest, matrix[j, j])
    for j in range(m):
        pivot = matrix[j, j] - diagonal[j] - 4.0 * ROUNDING * m * largest
        for q in range(j):
            pivot -= lower[j, q] * lower[j, q]
        if not pivot > 0.0:
            return False
        root = np.sqrt(pivot)
        lower[j, j] = root
        for i in range(j + 1, m):
            entry = matrix[i, j]
            for q in range(j):
                entry -= lower[i, q] * lower[j, q]
            lower[i, j] = entry / root
    return True


@numba.njit(cache=True, error_model="numpy", nogil=True)
def certificate(matrix, diagonal, target, point, owner, keeps, scores):
    """The bound of the module's docstring at x = `point`, less its rounding error; fills scores = s²/D.

    Written with e = v − x and q = Ge so that no large terms cancel:
    ½ eᵀq + Σ over the rest (q_i x_i + ½ D_i x_i²) − ½ Σ over the top of q_i²/D_i.
    """
    m = target.size
    error = 0.0
    inner = np.empty(m)
    for i in range(m):
        total, absolute = 0.0, 0.0
        for j in range(m):
            part = matrix[i, j] * (target[j] - point[j])
            total += part
            absolute += abs(part)
        inner[i] = total
        slope = total + diagonal[i] * point[i]
        scores[i] = slope * slope / diagonal[i]
        error += absolute * (abs(target[i] - point[i]) + min(abs(point[i]), 1e300) + abs(slope) / diagonal[i])
    order = np.argsort(-scores)
    bound, left = 0.0, keeps.copy()
    for position in range(m):
        i = order[position]
        first = 0.5 * (target[i] - point[i]) * inner[i]
        if left[owner[i]] > 0:
            left[owner[i]] -= 1
            second = -0.5 * inner[i] * inner[i] / diagonal[i]
        else:
            second = inner[i] * point[i] + 0.5 * diagonal[i] * point[i] * point[i]
        bound += first + second
        error += abs(first) + abs(second)
    return bound - ROUNDING * error, order


@numba.njit(cache=True, error_model="numpy", nogil=True)
def saddle(matrix, target, diagonal, share):
    """(C⁻¹, (C⁻¹ + Z/D)⁻¹, s/D at the minimiser over u) for D and z."""
    m = target.size
    rest = matrix.copy()
    for i in range(m):
        rest[i, i] -= diagonal[i]
    inverse = np.linalg.inv(rest)
    inverse = 0.5 * (inverse + inverse.T)
    right = target + inverse @ (diagonal * target)
    kernel = inverse.copy()
    for i in range(m):
        kernel[i, i] += share[i] / diagonal[i]
    kernel = np.linalg.inv(kernel)
    return inverse, kernel, (kernel @ right) / diagonal


@numba.njit(cache=True, error_model="numpy", nogil=True)
def improve_share(kernel, ratio, scores, owner, keeps, mu, cutoff, share, low, high):
    """A primal-dual Newton step in z and its multipliers, in place; (finite, primal length, dual length)."""
    m = share.size
    system = np.empty((m, m))
    count = keeps.size
    sides = np.zeros((m, 1 + count))
    for i in range(m):
        for j in range(m):
            system[i, j] = ratio[i] * kernel[i, j] * ratio[j] / cutoff
        system[i, i] += low[i] / share[i] + high[i] / (1.0 - share[i])
        sides[i, 0] = 0.5 * scores[i] / cutoff + mu / share[i] - mu / (1.0 - share[i])
        sides[i, 1 + owner[i]] = 1.0
    steps = np.linalg.solve(system, sides)
    if count == 1:
        multiplier = (keeps[0] - np.sum(share) - np.sum(steps[:, 0])) / np.sum(steps[:, 1])
        if not np.isfinite(multiplier):
            return False, 0.0, 0.0
        move = steps[:, 0] + multiplier * steps[:, 1]
    else:
        missing, sums = keeps.astype(np.float64), np.zeros((count, count))
        for i in range(m):
            missing[owner[i]] -= share[i] + steps[i, 0]
            sums[owner[i]] += steps[i, 1:]
        multipliers = np.linalg.solve(sums, missing)
        if not np.isfinite(multipliers).all():
            return False, 0.0, 0.0
        move = steps[:, 0] + np.ascontiguousarray(steps[:, 1:]) @ multipliers
    length, dual_length = 1.0, 1.0
    low_move, high_move = np.empty(m), np.empty(m)
    for i in range(m):
        low_move[i] = (mu - low[i] * move[i]) / share[i] - low[i]
        high_move[i] = (mu + high[i] * move[i]) / (1.0 - share[i]) - high[i]
        if move[i] < 0.0:
            length = min(length, -0.95 * share[i] / move[i])
        elif move[i] > 0.0:
            length = min(length, 0.95 * (1.0 - share[i]) / move[i])
        if low_move[i] < 0.0:
            dual_length = min(dual_length, -0.95 * low[i] / low_move[i])
        if high_move[i] < 0.0:
            dual_length = min(dual_length, -0.95 * high[i] / high_move[i])
    share += length * move
    low += dual_length * low_move
    high += dual_length * high_move
    return True, length, dual_length


@numba.njit(cache=True, error_model="numpy", nogil=True)
def improve_diagonal(matrix, inverse, ratio, share, mu, cutoff, diagonal, lower, stop):
    """A damped Newton step in D, in place, kept inside the cone by the factorisation; the Newton decrement."""
    m = diagonal.size
    ascent = np.empty(m)
    curvature = mu * inverse * inverse
    for i in range(m):
        gain = 0.5 * ratio[i] * ratio[i] * share[i] * (1.0 - share[i]) / cutoff
        ascent[i] = gain - mu * inverse[i, i] + mu / diagonal[i]
        curvature[i, i] += mu / (diagonal[i] * diagonal[i])
    change = np.linalg.solve(curvature, ascent)
    decrement = np.sqrt(max(0.0, np.dot(change, ascent)) / mu)
    if not np.isfinite(decrement):
        return decrement
    step = 1.0 / (1.0 + decrement) if decrement > 0.5 else 1.0
    for _ in range(10):
        if stop[0]:
            break
        trial = diagonal + step * change
        if trial.min() > 0.0 and dominates(matrix, trial, lower):
            diagonal[:] = trial
            break
        step *= 0.5
    return decrement


@numba.njit(cache=True, error_model="numpy", nogil=True)
def bound_node(matrix, target, owner, keeps, diagonal, share, barrier, barrier_end, n_steps, cutoff, stop):
    """Maximise the certificate of one node.

    Parameters
    ----------
    matrix : (m, m), G
    target : (m,), v
    owner : int64 (m,), keeps : int64 (groups,)
        The group of each weight, and the k of each group, above 0 and below its size.
    diagonal : (m,), a feasible D to start from
    share : (m,), z strictly inside (0, 1) to start from
    barrier, barrier_end : float
        First and last μ, relative to the cutoff.
    n_steps : int
    cutoff : float > 0
        The node is done when its bound reaches this.
    stop : bool (1,)
        Whether time is up; the best bound so far is returned.

    Returns
    -------
    bound : float
    diagonal, share, scores : (m,)
        The D, z and s²/D belonging to it.
    order : int (m,)
        Indices by falling score.
    """
    m = target.size
    diagonal = diagonal.copy()
    share = share.copy()
    best = -np.inf
    best_diagonal, best_share = diagonal.copy(), share.copy()
    scores = np.zeros(m)
    best_scores = np.zeros(m)
    best_order = np.arange(m)
    lower = np.zeros((m, m))
    if stop[0]:
        return best, best_diagonal, best_share, best_scores, best_order
    # Feasible in exact arithmetic already; this is for the rounding of G.
    for _ in range(60):
        if dominates(matrix, diagonal, lower):
            break
        diagonal *= 0.8
    else:
        return best, best_diagonal, best_share, best_scores, best_order
    mu = barrier
    low, high = mu / share, mu / (1.0 - share)
    for _ in range(n_steps):
        inverse, kernel, ratio = saddle(matrix, target, diagonal, share)
        bound, order = certificate(matrix, diagonal, target, share * ratio, owner, keeps, scores)
        if not np.isfinite(bound):
            break
        if bound > best:
            best = bound
            best_diagonal[:] = diagonal
            best_share[:] = share
            best_scores[:] = scores
            best_order = order
        if best >= cutoff or stop[0]:
            break
        finite, length, dual_length = improve_share(kernel, ratio, scores, owner, keeps, mu, cutoff, share, low, high)
        if not finite:
            break
        decrement = improve_diagonal(matrix, inverse, ratio, share, mu, cutoff, diagonal, lower, stop)
        if not np.isfinite(decrement):
            break
        if length > 0.5 and dual_length > 0.5 and decrement < 2.0:
            mu = max(barrier_end, 0.25 * mu)
    return best, best_diagonal, best_share, best_scores, best_order
