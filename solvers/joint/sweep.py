"""`sweep`: one pass over the columns of a layer, each removal made up for by the columns to come (SparseGPT).

With M = C + λI of the layer's inputs and M⁻¹ = UᵀU, U upper, row j of U holds what the optimal brain surgeon needs to
remove the weights of column j once the columns before it are done: 1/U_jj² is their curvature with all later columns
re-optimised, and for rows r that lose w_rj

    e_rj = w_rj / U_jj ,      w_r,j+1… ← w_r,j+1… − e_rj U_j,j+1… .

Columns go in blocks. At the start of a block its mask is chosen, the least s_r w_rj² / U_jj² in each group of the
budget (a row, several rows or the layer), every block taking its share of each group's count. Of groups inside rows
(N:M) each is chosen when the sweep reaches it. Errors reach the columns of later blocks by one product a block. A
gradient moves the target: w − H⁻¹g takes the place of w.

Source: Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*, ICML 2023.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from solvers.budget import Budget, Partitioned
from solvers.curvature import Dense, Kronecker, LowRank
from solvers.errors import CapabilityError
from solvers.linalg import named
from solvers.problem import SelectionProblem
from solvers.ranking import smallest_of_rows
from solvers.regularise import regularised
from solvers.solution import Proposal
from solvers.solver import RANKED, Capability, Context, Solver, option

#: Columns that are corrected one by one; beyond them by products.
_PANEL = 16


@dataclass(frozen=True)
class SweepSolver(Solver):
    """SparseGPT's sweep over a layer, or over one block as a layer of one row; it proposes its own weights too."""

    name = "sweep"
    summary = "one pass over the columns, each removal made up for by later columns (SparseGPT)"
    reference = "Frantar and Alistarh, SparseGPT, ICML 2023"
    capabilities = frozenset({Capability.JOINT, Capability.LINEAR_TERM, Capability.OWN_WEIGHTS})
    curvatures = (Kronecker, Dense, LowRank)
    budgets = RANKED

    columns: int = option(128, "columns whose mask is chosen at once", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Sweep once; raises SingularHessianError, and CapabilityError for groups that do not fit the rows."""
        block, repair = regularised(problem.blocks[0])
        curvature = block.curvature
        if isinstance(curvature, Kronecker):
            inputs, scale, dtype = curvature.inputs, curvature.row_scale, curvature.dtype
        else:
            inputs, dtype = Dense(curvature.dense()), torch.float64
            scale = torch.ones(1, dtype=dtype, device=block.device)
        plan = _plan(problem.budget, scale.numel(), block.n // scale.numel(), self.columns)
        target = block.weights if block.gradient is None else block.weights - block.solve(block.gradient)
        with named(block.name):
            upper = inputs.inverse_root.to(dtype)
        # One row per column of the layer: what is read together lies together.
        columns = torch.empty((target.numel() // scale.numel(), scale.numel()), dtype=dtype, device=block.device)
        columns.copy_(target.view(scale.numel(), -1).T)
        pruned = _sweep(columns, upper, scale.to(dtype), plan).T.reshape(-1)
        weights = torch.where(pruned, 0.0, columns.T.reshape(-1).double())
        repairs = (repair,) if repair else ()
        return Proposal(pruned.cpu().numpy(), repairs=repairs, weights=weights.cpu().numpy())


@dataclass(frozen=True, eq=False)
class _Plan:
    """In which pieces columns are chosen and corrected.

    Attributes
    ----------
    blocks : list of int
        Columns at which blocks start, and their number.
    panels : list of list of int
        For each block the same of its panels.
    choices : dict
        Columns at which a mask is chosen: where it ends, and what each group of it loses, int64 (groups,).
    """

    blocks: list[int]
    panels: list[list[int]]
    choices: dict[int, tuple[int, torch.Tensor]]


def _plan(budget: Budget, rows: int, inputs: int, width: int) -> _Plan:
    """The pieces under a budget; raises CapabilityError for a partition that is none of rows, or none inside rows."""
    if not isinstance(budget, Partitioned):
        return _by_blocks(torch.tensor([budget.n_prune]), inputs, width)
    sizes = budget.lengths
    if rows % sizes.size == 0 and (sizes == sizes[0]).all():
        return _by_blocks(torch.from_numpy(budget.quotas), inputs, width)
    each = sizes.size // rows
    cuts = [*budget.starts[: each + 1].tolist()]
    if cuts[-1] != inputs or sizes.size % rows or (sizes.reshape(rows, each) != sizes[:each]).any():
        raise CapabilityError(
            f"sweep takes a partition of a layer into groups of equally many whole rows, or of each row in the same "
            f"way; of {rows} rows of {inputs} it cannot make {sizes.size} groups of {sizes.min()} to "
            f"{sizes.max()} weights"
        )
    lost = torch.from_numpy(budget.quotas).view(rows, each)
    choices = {low: (high, lost[:, at]) for at, (low, high) in enumerate(itertools.pairwise(cuts))}
    blocks = _some(cuts, width)
    panels = [_some([c for c in cuts if low <= c <= high], _PANEL) for low, high in itertools.pairwise(blocks)]
    return _Plan(blocks, panels, choices)


def _by_blocks(counts: torch.Tensor, inputs: int, width: int) -> _Plan:
    """A mask for each block of `width` columns, which takes its share of what each group loses."""
    blocks = [*range(0, inputs, width), inputs]
    pairs = list(itertools.pairwise(blocks))
    choices = {low: (high, counts * high // inputs - counts * low // inputs) for low, high in pairs}
    return _Plan(blocks, [[*range(low, high, _PANEL), high] for low, high in pairs], choices)


def _some(cuts: list[int], width: int) -> list[int]:
    """Those of rising numbers that are at least `width` apart, the first and last always."""
    found = cuts[:1]
    for cut in cuts[1:-1]:
        if cut - found[-1] >= width:
            found.append(cut)
    return [*found, cuts[-1]]


def _sweep(work: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """Prune `work` (d, R), one row per column of the layer, in place but for the pruned entries; their mask (d, R)."""
    pruned = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    gone, pivots, root = torch.empty_like(work), upper.diagonal().unsqueeze(1), scale.sqrt()
    for (start, stop), panels in zip(itertools.pairwise(plan.blocks), plan.panels, strict=True):
        errors = torch.empty_like(work[start:stop])
        for first, last in itertools.pairwise(panels):
            for j in range(first, last):
                if j in plan.choices:
                    end, counts = plan.choices[j]
                    # Squared last: entries of a tiny layer must not underflow.
                    scores = (work[j:end] / pivots[j:end] * root).square_()
                    mask = smallest_of_rows(scores.T.reshape(counts.numel(), -1), counts.to(work.device))
                    pruned[j:end] = mask.view(-1, end - j).T
                    torch.div(pruned[j:end], pivots[j:end], out=gone[j:end])
                error = torch.mul(work[j], gone[j], out=errors[j - start])
                work[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1.0)
            work[last:stop].addmm_(upper[first:last, last:stop].T, errors[first - start : last - start], alpha=-1.0)
        if stop < len(work):
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    return pruned
