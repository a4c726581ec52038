"""A selection problem over groups that go whole, as a problem over the groups: P = ∪ {G_g : z_g = 1}.

With w_g the weights of group g, zero elsewhere, removing the groups z ∈ {0, 1}^G costs

    ½ Σ_gh z_g z_h w_gᵀ H w_h − Σ_g z_g gᵀw_g ,

which is the selection objective of a problem whose g-th weight is u_g = ‖w_g‖, with curvature w_gᵀHw_h / (u_g u_h) and
gradient gᵀw_g / u_g. So rules, searches, bounds and proofs for single weights hold for groups at once: ranking by
magnitude is ranking by norm (Li et al., *Pruning filters for efficient ConvNets*, ICLR 2017), the diagonal saliency
takes all interactions inside a group into account. AᵀA + λI stays of that form, since λ‖w_g‖² = λ u_g²; groups that
share no component of a curvature become blocks of their own, and where none does the problem is diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
import torch

from solvers.arrays import Array, Index, Mask
from solvers.block import QuadraticBlock
from solvers.budget import Cardinality, Groups, Knapsack
from solvers.curvature import Curvature, Dense, Diagonal, Kronecker, LowRank
from solvers.curvature.unmeasured import Unmeasured
from solvers.errors import CapabilityError
from solvers.problem import Objective, SelectionProblem

_EPS = float(np.finfo(np.float64).eps)
#: Most groups that interact, as their curvature is a matrix.
MOST_GROUPS = 8192


@dataclass(frozen=True, eq=False)
class Aggregate:
    """A problem over groups, and the way back.

    Attributes
    ----------
    problem : SelectionProblem
        Of the selection objective, a weight for each group.
    place : int64 (n,)
        For each weight the number of its group there.
    rounding : float
        What the objective of a mask may be off by.
    """

    problem: SelectionProblem
    place: Index
    rounding: float

    def widen(self, gone: Mask) -> Mask:
        """The mask of weights (n,) of a mask of groups."""
        return np.asarray(gone[self.place])

    def narrow(self, pruned: Mask) -> Mask:
        """The mask of groups of a feasible mask of weights (n,)."""
        found = np.zeros(self.problem.n, dtype=bool)
        found[self.place] = pruned
        return found


def aggregate(problem: SelectionProblem) -> Aggregate:
    """The problem over its groups; raises CapabilityError where too many groups interact."""
    given = problem.budget
    assert isinstance(given, Groups) or (isinstance(given, Knapsack) and given.labels is not None)
    labels = np.asarray(given.labels)
    total = int(labels.max()) + 1
    if not problem.measured:
        parts = [np.arange(total)]
    elif all(isinstance(block.curvature, Diagonal) for block in problem.blocks):
        parts = [np.array([group]) for group in range(total)]
    else:
        parts = _parts(problem, labels, total)
    single = [part for part in parts if part.size == 1]
    several = [part for part in parts if part.size > 1]
    norms = np.sqrt(np.bincount(labels, weights=problem.weights**2, minlength=total))
    slopes = None
    if problem.gradient is not None:
        raw = np.bincount(labels, weights=problem.gradient * problem.weights, minlength=total)
        slopes = np.divide(raw, norms, out=np.zeros(total), where=norms > 0.0)
    order: list[Index] = []
    curvatures: list[Curvature] = []
    if not problem.measured:
        order, curvatures = parts, [Unmeasured(total, problem.blocks[0].device)]
    else:
        if single:
            order.append(np.concatenate(single))
            own = _own_costs(problem, labels, total)[order[0]]
            unit = np.where(norms[order[0]] > 0.0, norms[order[0]], 1.0)
            curvatures.append(Diagonal(torch.from_numpy(own / unit**2).to(problem.blocks[0].device)))
        for part in several:
            order.append(part)
            curvatures.append(_curvature(problem, labels, part, norms))
    blocks = [
        QuadraticBlock(
            norms[part], curvature=curvature, gradient=None if slopes is None else slopes[part], name=f"groups[{at}]"
        )
        for at, (part, curvature) in enumerate(zip(order, curvatures, strict=True))
    ]
    place = np.empty(total, dtype=np.int64)
    numbers = np.concatenate(order)
    place[numbers] = np.arange(total)
    budget = Cardinality(given.k) if isinstance(given, Groups) else Knapsack(given.table[:, numbers], given.limit)
    return Aggregate(
        SelectionProblem(blocks, budget, Objective.SELECTION),
        place[labels],
        _rounding(problem, labels, given.k if isinstance(given, Groups) else total) if problem.measured else 0.0,
    )


def _rounding(problem: SelectionProblem, labels: Index, most: int) -> float:
    """16 eps (Σ √H_ii |w_i|)² + 16 eps Σ |g_i w_i| over the `most` groups where that is largest."""
    size = np.abs(problem.weights)
    roots = np.bincount(labels, weights=np.sqrt(problem.diagonal) * size)
    total = float(np.sort(roots)[::-1][:most].sum()) ** 2
    if problem.gradient is not None:
        slopes = np.bincount(labels, weights=np.abs(problem.gradient) * size)
        total += float(np.sort(slopes)[::-1][:most].sum())
    return 16.0 * _EPS * total


def _components(problem: SelectionProblem) -> Index:
    """A number for the component of its curvature that each weight belongs to, int64 (n,)."""
    found, start = [], 0
    for block in problem.blocks:
        curvature = block.curvature
        count = block.n if isinstance(curvature, Diagonal) else curvature.n_components
        found.append(start + np.repeat(np.arange(count), block.n // count))
        start += count
    return np.concatenate(found)


def _parts(problem: SelectionProblem, labels: Index, total: int) -> list[Index]:
    """Groups that interact, directly or through others, together."""
    component = _components(problem)
    size = total + int(component[-1]) + 1
    graph = scipy.sparse.coo_matrix(
        (np.ones(labels.size, dtype=np.int8), (labels, total + component)), shape=(size, size)
    )
    _, part = scipy.sparse.csgraph.connected_components(graph.tocsr(), directed=False)
    order = np.argsort(part[:total], kind="stable")
    cuts = np.flatnonzero(np.diff(part[:total][order])) + 1
    return [np.sort(piece) for piece in np.split(order, cuts)]


def _own_costs(problem: SelectionProblem, labels: Index, total: int) -> Array:
    """w_gᵀHw_g of groups that share no component with others, float64 (groups,); the rest means nothing."""
    value = problem.weights * problem.multiply(problem.weights)
    return np.maximum(np.bincount(labels, weights=value, minlength=total), 0.0)


def _curvature(problem: SelectionProblem, labels: Index, part: Index, norms: Array) -> Curvature:
    """Of the groups `part` (m,), which interact."""
    number = np.full(norms.size, -1, dtype=np.int64)
    number[part] = np.arange(part.size)
    own, unit = number[labels], np.where(norms[part] > 0.0, norms[part], 1.0)
    found = []
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        if (own[where] >= 0).any():
            found.append((block, torch.from_numpy(own[where]).to(block.device)))
    scale = torch.from_numpy(unit).to(found[0][0].device)
    if len(found) == 1 and isinstance(found[0][0].curvature, LowRank):
        block, local = found[0]
        return LowRank(_pulled(block, local, part.size) / scale, block.damping)
    if part.size > MOST_GROUPS:
        raise CapabilityError(
            f"{part.size} groups interact, and their curvature would be a matrix; at most {MOST_GROUPS} can: use "
            "larger groups, or blocks of their own"
        )
    gram = torch.zeros((part.size, part.size), dtype=torch.float64, device=scale.device)
    for block, local in found:
        _add_gram(gram, block, local)
    gram = 0.5 * (gram + gram.T) / scale.unsqueeze(0) / scale.unsqueeze(1)
    return Dense(gram)


def _pulled(block: QuadraticBlock, local: torch.Tensor, count: int) -> torch.Tensor:
    """Σ_{i ∈ g} w_i a_i of a low-rank block, float64 (r, groups)."""
    inside = (local >= 0).nonzero().squeeze(1)
    factor, out = block.factor, torch.zeros((block.factor.shape[0], count), dtype=torch.float64, device=block.device)
    for piece in torch.split(inside, max(1, (1 << 24) // max(1, factor.shape[0]))):
        out.index_add_(1, local[piece], factor[:, piece].double() * block.weights[piece])
    return out


def _add_gram(gram: torch.Tensor, block: QuadraticBlock, local: torch.Tensor) -> None:
    """Add w_gᵀHw_h of one block; `local` (n,) numbers the groups, −1 for none of them."""
    curvature, weights = block.curvature, block.weights
    if isinstance(curvature, LowRank):
        pulled = _pulled(block, local, gram.shape[0])
        gram += pulled.T @ pulled
        inside = local >= 0
        gram.diagonal().index_add_(0, local[inside], block.damping * weights[inside].square())
        return
    if isinstance(curvature, Kronecker):
        table, rows = local.view(curvature.n_rows, -1), weights.view(curvature.n_rows, -1)
        everywhere = bool((table == table[0]).all()) and bool((table[0] >= 0).all())
        if everywhere:
            _scatter(gram, (rows.T * curvature.row_scale) @ rows * curvature.inputs.matrix, table[0])
            return
        for row in (table >= 0).any(1).nonzero().squeeze(1).tolist():
            index = (table[row] >= 0).nonzero().squeeze(1)
            matrix = curvature.inputs.matrix[index][:, index] * float(curvature.row_scale[row])
            _scatter(gram, matrix * torch.outer(rows[row][index], rows[row][index]), table[row][index])
        return
    index = (local >= 0).nonzero().squeeze(1)
    if index.numel() > MOST_GROUPS and not isinstance(curvature, Diagonal):
        raise CapabilityError(f"groups of {index.numel()} weights of block {block.name!r} interact, too many")
    if isinstance(curvature, Diagonal):
        gram.diagonal().index_add_(0, local[index], curvature.diagonal[index] * weights[index].square())
    else:
        _scatter(gram, curvature.submatrix(index, index) * torch.outer(weights[index], weights[index]), local[index])


def _scatter(gram: torch.Tensor, matrix: torch.Tensor, groups: torch.Tensor) -> None:
    """gram[g_i, g_j] += matrix[i, j]."""
    names, inverse = torch.unique(groups, return_inverse=True)
    half = torch.zeros((names.numel(), matrix.shape[1]), dtype=torch.float64, device=matrix.device)
    half.index_add_(0, inverse, matrix)
    whole = torch.zeros((names.numel(), names.numel()), dtype=torch.float64, device=matrix.device)
    whole.index_add_(1, inverse, half)
    gram[names.unsqueeze(1), names] += whole
