"""Compiled kernels of the joint tree: the saddle-point bound of one node, its fixings, and its branching.

A node of the tree keeps the weights I, removes the weights O and leaves U open; k more of U are to be kept. With
c the unconstrained minimiser and I refitted freely, the problem on U is again of the form it had at the root,

    F(O) + min over u, k non-zeros, of ½ (u − v)ᵀ G (u − v),      G = H_UU − H_UI H_II⁻¹ H_IU ,

v being the values on U after O alone is removed. For any diagonal D > 0 with C = G − D ⪰ 0, replacing D_i u_i² by its
perspective D_i u_i²/z_i and linearising the convex ½ uᵀCu at *any* point x gives a bound that needs no convergence:

    ½ vᵀGv − ½ xᵀCx − ½ Σ of the k largest s_i²/D_i ,            s = Gv − Cx .            (certificate)

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

#: Status of a weight in a node.
OPEN, KEPT, REMOVED = 0, 1, 2
#: What became of a node.
PRUNED, SOLVED, BRANCH = 0, 1, 2
#: Relative error allowed for in a factorisation of a correlation matrix of unit diagonal, per row.
ROUNDING = 1e-15
#: Columns whose squared sine is below this are dependent.
DEPENDENT = 1e-13
#: Nodes with fewer choices than this times m³ are enumerated at once; with fewer than the second, when the bound fails.
DIRECT, AFTER_BOUND = 2.5, 15.0


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
def certificate(matrix, diagonal, target, point, n_kept, scores):
    """The bound of the module's docstring at x = `point`, less its rounding error; fills scores = s²/D.

    Written with e = v − x and q = Ge so that no large terms cancel:
    ½ eᵀq + Σ over the rest (q_i x_i + ½ D_i x_i²) − ½ Σ over the top k of q_i²/D_i.
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
    bound = 0.0
    for position in range(m):
        i = order[position]
        first = 0.5 * (target[i] - point[i]) * inner[i]
        if position < n_kept:
            second = -0.5 * inner[i] * inner[i] / diagonal[i]
        else:
            second = inner[i] * point[i] + 0.5 * diagonal[i] * point[i] * point[i]
        bound += first + second
        error += abs(first) + abs(second)
    return bound - ROUNDING * error, order


@numba.njit(cache=True, error_model="numpy", nogil=True)
def bound_node(matrix, target, n_kept, diagonal, share, barrier, barrier_end, n_steps, cutoff):
    """Maximise the certificate of one node.

    Parameters
    ----------
    matrix : (m, m), G
    target : (m,), v
    n_kept : int, k with 0 < k < m
    diagonal : (m,), a feasible D to start from
    share : (m,), z strictly inside (0, 1) to start from
    barrier, barrier_end : float
        First and last μ, relative to the cutoff.
    n_steps : int
    cutoff : float > 0
        The node is done when its bound reaches this.

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
        slope = kernel @ right
        ratio = slope / diagonal
        point = share * ratio
        bound, order = certificate(matrix, diagonal, target, point, n_kept, scores)
        if not np.isfinite(bound):
            break
        if bound > best:
            best = bound
            best_diagonal[:] = diagonal
            best_share[:] = share
            best_scores[:] = scores
            best_order = order
        if best >= cutoff:
            break
        system = np.empty((m, m))
        sides = np.empty((m, 2))
        for i in range(m):
            for j in range(m):
                system[i, j] = ratio[i] * kernel[i, j] * ratio[j] / cutoff
            system[i, i] += low[i] / share[i] + high[i] / (1.0 - share[i])
            sides[i, 0] = 0.5 * scores[i] / cutoff + mu / share[i] - mu / (1.0 - share[i])
            sides[i, 1] = 1.0
        steps = np.linalg.solve(system, sides)
        multiplier = (n_kept - np.sum(share) - np.sum(steps[:, 0])) / np.sum(steps[:, 1])
        move = steps[:, 0] + multiplier * steps[:, 1]
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
        if not np.isfinite(multiplier):
            break
        share = share + length * move
        low = low + dual_length * low_move
        high = high + dual_length * high_move
        # The diagonal: a damped Newton step stays inside the cone, the factorisation makes sure of it.
        ascent = np.empty(m)
        curvature = mu * inverse * inverse
        for i in range(m):
            gain = 0.5 * ratio[i] * ratio[i] * share[i] * (1.0 - share[i]) / cutoff
            ascent[i] = gain - mu * inverse[i, i] + mu / diagonal[i]
            curvature[i, i] += mu / (diagonal[i] * diagonal[i])
        change = np.linalg.solve(curvature, ascent)
        decrement = np.sqrt(max(0.0, np.dot(change, ascent)) / mu)
        if not np.isfinite(decrement):
            break
        step = 1.0 / (1.0 + decrement) if decrement > 0.5 else 1.0
        for _ in range(10):
            trial = diagonal + step * change
            if trial.min() > 0.0 and dominates(matrix, trial, lower):
                diagonal = trial
                break
            step *= 0.5
        if length > 0.5 and dual_length > 0.5 and decrement < 2.0:
            mu = max(barrier_end, 0.25 * mu)
    return best, best_diagonal, best_share, best_scores, best_order


@numba.njit(cache=True, error_model="numpy", nogil=True)
def reduce_node(hessian, root, centre, status):
    """(open indices, G, v, F(O)) of a node; see the module's docstring."""
    n = centre.size
    kept = np.nonzero(status == KEPT)[0]
    undecided = np.nonzero(status == OPEN)[0]
    removed = np.nonzero(status == REMOVED)[0]
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
def best_subset(matrix, slope, size, needed):
    """The `size` ≥ 2 columns S with the largest gain ½ slope_Sᵀ (matrix_SS)⁻¹ slope_S, if it exceeds `needed`.

    All but the last two columns are walked depth-first with Schur complements; the pairs that complete them are
    scanned without divisions. About 3 ns a subset.

    Returns
    -------
    gain, second : float
        The largest and the next; `needed` where no subset exceeds it.
    chosen : int (size,)
        −1 where no subset exceeds it.
    """
    m = slope.size
    levels = size - 2
    grams = np.empty((levels + 1, m, m))
    slopes = np.empty((levels + 1, m))
    gains = np.zeros(levels + 1)
    grams[0] = matrix
    slopes[0] = slope
    chosen = np.full(size, -1)
    best_chosen = np.full(size, -1)
    squares, pivots = np.empty(m), np.empty(m)
    # Gains are doubled throughout.
    best, second = 2.0 * needed, 2.0 * needed
    level, item = 0, 0
    while True:
        gram, part = grams[level], slopes[level]
        if level == levels:
            first = chosen[level - 1] + 1 if level > 0 else 0
            need = second - gains[level]
            for y in range(first, m):
                squares[y] = part[y] * part[y]
                pivots[y] = gram[y, y]
            for x in range(first + 1, m):
                row = gram[x]
                pivot, square, double = pivots[x], squares[x], 2.0 * part[x]
                hits = 0
                for y in range(first, x):
                    determinant = pivot * pivots[y] - row[y] * row[y]
                    value = square * pivots[y] + squares[y] * pivot - double * part[y] * row[y]
                    hits += value > need * determinant
                if hits > 0:
                    for y in range(first, x):
                        determinant = pivot * pivots[y] - row[y] * row[y]
                        if determinant <= DEPENDENT * pivot * pivots[y]:
                            continue
                        value = square * pivots[y] + squares[y] * pivot - double * part[y] * row[y]
                        if value > need * determinant:
                            value = value / determinant + gains[level]
                            if value > best:
                                best, second = value, best
                                chosen[size - 2], chosen[size - 1] = x, y
                                best_chosen[:] = chosen
                            else:
                                second = value
                            need = second - gains[level]
        elif item <= m - (size - level):
            pivot = gram[item, item]
            chosen[level] = item
            if pivot <= DEPENDENT * matrix[item, item]:
                item += 1
                continue
            gains[level + 1] = gains[level] + part[item] * part[item] / pivot
            below, rest = grams[level + 1], slopes[level + 1]
            for x in range(item + 1, m):
                ratio = gram[x, item] / pivot
                rest[x] = part[x] - ratio * part[item]
                for y in range(item + 1, x + 1):
                    below[x, y] = gram[x, y] - ratio * gram[y, item]
            level += 1
            item += 1
            continue
        if level == 0:
            break
        level -= 1
        item = chosen[level] + 1
    return 0.5 * best, 0.5 * second, best_chosen


@numba.njit(cache=True, error_model="numpy", nogil=True)
def count_subsets(m, size):
    """The binomial coefficient as a float."""
    count = 1.0
    for i in range(size):
        count *= (m - i) / (i + 1.0)
    return count


@numba.njit(cache=True, error_model="numpy", nogil=True)
def enumerate_kept(hessian, root, centre, status, undecided, matrix, target, base, to_keep, cutoff):
    """(outcome, bound, mask, value) of a node by looking at every choice of the weights to keep."""
    inner = matrix @ target
    height = 0.5 * np.dot(target, inner)
    rounding = 4.0 * ROUNDING * height
    if to_keep == 1:
        gains = 0.5 * inner * inner / np.diag(matrix)
        order = np.argsort(-gains)
        chosen = order[:1]
        gain, second = gains[order[0]], gains[order[1]]
    else:
        gain, second, chosen = best_subset(matrix, inner, to_keep, base + height - cutoff - rounding)
    mask = status != KEPT
    if chosen[0] < 0:
        return PRUNED, cutoff, mask, np.inf
    for x in chosen:
        mask[undecided[x]] = False
    value = mask_value(hessian, root, centre, mask)
    # How far the gain of the best is off its value tells what to allow for in the next best.
    rounding += 2.0 * abs(base + height - gain - value)
    return SOLVED, min(value, base + height - second - rounding), mask, value


@numba.njit(cache=True, error_model="numpy", nogil=True)
def process_node(hessian, root, centre, status, n_kept, diagonal, share, cutoff, barrier, barrier_end, n_steps):
    """Bound a node, fix what its reduced costs decide, and pick a weight to branch on.

    Parameters
    ----------
    hessian : (n, n), root : (r, n) with rootᵀroot = hessian, centre : (n,)
    status : int8 (n,)
        OPEN, KEPT or REMOVED; modified by the fixings.
    n_kept : int
        Weights kept in the end, over all n.
    diagonal, share : (n,)
        D and z of the parent; entries of open weights are modified.
    cutoff : float
        Masks of at least this value are of no interest.

    Returns
    -------
    outcome : int
        PRUNED, SOLVED (the mask is the best of the node) or BRANCH.
    bound : float
    branch : int
        A weight to branch on, −1 unless BRANCH.
    mask : bool (n,)
        A feasible mask.
    value : float
        Its objective, inf if there is none.
    """
    n = centre.size
    mask = np.zeros(n, np.bool_)
    best = -np.inf
    while True:
        n_open = np.sum(status == OPEN)
        to_keep = n_kept - np.sum(status == KEPT)
        to_remove = n_open - to_keep
        if to_keep == 0 or to_remove == 0:
            mask = status == REMOVED
            if to_keep == 0:
                mask = status != KEPT
            value = mask_value(hessian, root, centre, mask)
            return SOLVED, value, -1, mask, value
        undecided, matrix, target, base = reduce_node(hessian, root, centre, status)
        best = max(best, base)
        room = cutoff - base
        if room <= 0.0:
            return PRUNED, base, -1, mask, np.inf
        if to_remove <= 2:
            first, second = cheapest_removal(np.linalg.inv(matrix), target, to_remove)
            mask = status == REMOVED
            mask[undecided[first]] = True
            mask[undecided[second]] = True
            value = mask_value(hessian, root, centre, mask)
            return SOLVED, value, -1, mask, value
        effort = count_subsets(n_open, to_keep) / n_open**3
        if to_keep == 1 or effort < DIRECT:
            outcome, low, mask, value = enumerate_kept(
                hessian, root, centre, status, undecided, matrix, target, base, to_keep, cutoff
            )
            return outcome, max(best, low), -1, mask, value
        start = share[undecided]
        excess = to_keep - np.sum(start)
        if excess > 0.0:
            start = start + (1.0 - start) * (excess / np.sum(1.0 - start))
        else:
            start = start * (to_keep / np.sum(start))
        start = 0.9 * start + 0.1 * to_keep / n_open
        bound, inner, z, scores, order = bound_node(
            matrix, target, to_keep, diagonal[undecided], start, barrier, barrier_end, n_steps, room
        )
        best = max(best, base + bound)
        if bound >= room:
            return PRUNED, best, -1, mask, np.inf
        if effort < AFTER_BOUND:
            outcome, low, mask, value = enumerate_kept(
                hessian, root, centre, status, undecided, matrix, target, base, to_keep, cutoff
            )
            return outcome, max(best, low), -1, mask, value
        for x in range(n_open):
            diagonal[undecided[x]] = inner[x]
            share[undecided[x]] = z[x]
        last_in, first_out = scores[order[to_keep - 1]], scores[order[to_keep]]
        n_fixed = 0
        for position in range(n_open):
            x = order[position]
            if position < to_keep:
                if bound + 0.5 * (scores[x] - first_out) >= room:
                    status[undecided[x]] = KEPT
                    n_fixed += 1
            elif bound + 0.5 * (last_in - scores[x]) >= room:
                status[undecided[x]] = REMOVED
                n_fixed += 1
        if n_fixed > 0:
            continue
        # Branch on the weight that most wants to be kept: the child that removes it is soon cut off.
        mask = status == REMOVED
        by_share = np.argsort(-z)
        for position in range(to_keep, n_open):
            mask[undecided[by_share[position]]] = True
        return BRANCH, best, undecided[by_share[0]], mask, mask_value(hessian, root, centre, mask)
