"""What the thresholding solvers (`iht`, `admm`) share: metrics, and approximate refits on a support.

Thresholding keeps the largest D_i|v_i|. The metric D² decides what "large" means:

* ``identity``  D² = 1, plain magnitude;
* ``diagonal``  D_i² = H_ii, the saliency that ignores interaction;
* ``obs``       D_i² = 1/[H⁻¹]_ii, the saliency of the optimal brain surgeon, between the two.

Vectors are float64 tensors (n,) on the problem's device throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from solvers.block import QuadraticBlock
from solvers.curvature import Kronecker, LowRank
from solvers.curvature.factor_products import back_project, project
from solvers.joint.kept import KEPT_SYSTEMS, kept_system
from solvers.linalg import Apply, cholesky, cholesky_solve, named
from solvers.problem import SelectionProblem
from solvers.ranking import smallest
from solvers.regularise import regularised
from solvers.tensors import ProblemTensors

METRICS = ("obs", "diagonal", "identity")

#: Supports of up to this many weights are refitted exactly instead of by conjugate gradients.
_DIRECT = 400
#: So are supports of low-rank blocks with up to this many rows, through the r × r system.
_DIRECT_ROWS = 3000


def search_problem(problem: SelectionProblem) -> tuple[ProblemTensors, list[str]]:
    """(the problem's vectors with as much damping as the search needs, repairs)."""
    blocks, repairs = [], []
    for given in problem.blocks:
        block, repair = regularised(given)
        blocks.append(block)
        if repair:
            repairs.append(repair)
    return ProblemTensors(blocks), repairs


def metric_of(vectors: ProblemTensors, kind: str) -> torch.Tensor:
    """D² (n,); all blocks in the units of H so that they compete fairly."""
    if kind == "identity":
        return torch.ones_like(vectors.weights)
    return vectors.diagonal if kind == "diagonal" else torch.cat([_obs_metric(block) for block in vectors.blocks])


def _obs_metric(block: QuadraticBlock) -> torch.Tensor:
    curvature = block.curvature
    if isinstance(curvature, LowRank) and block.n > curvature.rank:
        # In the working precision of the kept system, which is enough for a metric.
        everything = torch.ones(block.n, dtype=torch.bool, device=block.device)
        return 1.0 / kept_system(block, everything).scores(torch.arange(block.n, device=block.device))[1]
    if isinstance(curvature, Kronecker):
        # Without 1/s_r, which may be infinite.
        return torch.outer(curvature.row_scale, 1.0 / curvature.inputs.inverse_diagonal).view(-1)
    return 1.0 / block.inverse_diagonal


def keep_largest(scores: torch.Tensor, n_kept: int) -> torch.Tensor:
    """The kept mask of the `n_kept` largest scores, bool (n,); ties are pruned from the lower index on."""
    return ~smallest(scores, scores.numel() - n_kept)


def refine(
    blocks: Sequence[QuadraticBlock], kept: Sequence[torch.Tensor], solution: Sequence[torch.Tensor], steps: int
) -> tuple[torch.Tensor, float]:
    """(v (n,), joint objective of v) on a support: exactly where that is cheap, else after some steps.

    Parameters
    ----------
    blocks : regularised blocks
    kept, solution : one tensor per block
        The support, and where conjugate gradients start from.
    steps : int
        Of conjugate gradients.
    """
    parts, total = [], 0.0
    for block, mask, start in zip(blocks, kept, solution, strict=True):
        curvature = block.curvature
        if isinstance(curvature, LowRank) and curvature.rank <= _DIRECT_ROWS and int(mask.sum()) > _DIRECT:
            system = kept_system(block, mask)
            value, objective = system.solution(), system.objective()
        else:
            value = _refined(block, mask, start, steps)
            objective = block.change(value - block.weights)
        parts.append(value)
        total += objective
    return torch.cat(parts), total


def _refined(block: QuadraticBlock, kept: torch.Tensor, start: torch.Tensor, steps: int) -> torch.Tensor:
    """One block by a dense solve or by conjugate gradients preconditioned by the diagonal."""
    index = kept.nonzero().squeeze(1)
    value = torch.where(kept, start, 0.0)
    downhill = -block.multiply(value - block.weights)
    if block.gradient is not None:
        downhill = downhill - block.gradient
    downhill = downhill[index]
    if index.numel() <= _DIRECT and isinstance(block.curvature, KEPT_SYSTEMS):
        with named(block.name):
            factor = cholesky(block.curvature.submatrix(index, index), f"H of {index.numel()} kept weights")
        value[index] += cholesky_solve(factor, downhill)
        return value
    multiply = _restricted_product(block, index)
    diagonal, step_sum = block.diagonal[index], torch.zeros_like(downhill)
    direction = torch.zeros_like(downhill)
    previous = first = 1.0
    for step in range(steps):
        scaled = downhill / diagonal
        inner = float(downhill @ scaled)
        first = inner if step == 0 else first
        if inner <= 1e-28 * first:
            break
        direction = scaled if step == 0 else scaled + (inner / previous) * direction
        previous = inner
        image = multiply(direction)
        curvature = float(direction @ image)
        if curvature <= 0.0:
            break
        step_sum = step_sum + (inner / curvature) * direction
        downhill = downhill - (inner / curvature) * image
    value[index] += step_sum
    return value


def _restricted_product(block: QuadraticBlock, index: torch.Tensor) -> Apply:
    """x ↦ H_SS x for x (s,): through the gathered columns of a factor, or through all of H."""
    if isinstance(block.curvature, LowRank):
        columns, damping = block.factor.index_select(1, index), block.damping
        return lambda x: back_project(columns, project(columns, x)) + damping * x

    def product(x: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(block.n, dtype=torch.float64, device=x.device)
        full[index] = x
        return block.multiply(full)[index]

    return product
