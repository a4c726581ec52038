"""`sweep`: one pass over the columns of a layer, each removal made up for by the columns to come (SparseGPT).

With M = C + λI of the layer's inputs and M⁻¹ = UᵀU, U upper, row j of U holds what the optimal brain surgeon needs to
remove the weights of column j once the columns before it are done: 1/U_jj² is their curvature with all later columns
re-optimised, and for rows r that lose w_rj

    e_rj = w_rj / U_jj ,      w_r,j+1… ← w_r,j+1… − e_rj U_j,j+1… .

Columns go in blocks. At the start of a block its mask is chosen, the least s_r w_rj² / U_jj² in each group of the
budget (a row, several rows or the layer), every block taking its share of each group's count. Errors reach the columns
of later blocks by one product a block. A gradient moves the target: w − H⁻¹g takes the place of w.

Source: Frantar and Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*, ICML 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from solvers.budget import Budget, Partitioned
from solvers.curvature import Dense, Kronecker, LowRank
from solvers.errors import CapabilityError
from solvers.joint.kept import regularised
from solvers.linalg import named
from solvers.problem import SelectionProblem
from solvers.ranking import smallest_of_rows
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
        """Sweep once; raises SingularHessianError, and CapabilityError for groups that are not rows of equal number."""
        block, repair = regularised(problem.blocks[0])
        curvature = block.curvature
        if isinstance(curvature, Kronecker):
            inputs, scale, dtype = curvature.inputs, curvature.row_scale, curvature.dtype
        else:
            inputs, dtype = Dense(curvature.dense()), torch.float64
            scale = torch.ones(1, dtype=dtype, device=block.device)
        counts = _counts(problem.budget, scale.numel())
        target = block.weights if block.gradient is None else block.weights - block.solve(block.gradient)
        with named(block.name):
            upper = inputs.inverse_root.to(dtype)
        # One row per column of the layer: what is read together lies together.
        columns = torch.empty((target.numel() // scale.numel(), scale.numel()), dtype=dtype, device=block.device)
        columns.copy_(target.view(scale.numel(), -1).T)
        pruned = _sweep(columns, upper, scale.to(dtype), counts, self.columns).T.reshape(-1)
        weights = torch.where(pruned, 0.0, columns.T.reshape(-1).double())
        repairs = (repair,) if repair else ()
        return Proposal(pruned.cpu().numpy(), repairs=repairs, weights=weights.cpu().numpy())


def _counts(budget: Budget, rows: int) -> torch.Tensor:
    """What each group of rows loses, int64 (groups,); raises CapabilityError."""
    if isinstance(budget, Partitioned):
        sizes = set(budget.sizes)
        if len(sizes) == 1 and rows % len(budget.sizes) == 0:
            return torch.tensor(budget.counts)
        raise CapabilityError(
            f"sweep takes a partition of a layer into groups of equally many whole rows; of {rows} rows it cannot make "
            f"{len(budget.sizes)} groups of {min(sizes)} to {max(sizes)} weights"
        )
    return torch.tensor([budget.n_prune])


def _sweep(
    work: torch.Tensor, upper: torch.Tensor, scale: torch.Tensor, counts: torch.Tensor, width: int
) -> torch.Tensor:
    """Prune `work` (d, R), one row per column of the layer, in place but for the pruned entries; their mask (d, R)."""
    inputs, rows = work.shape
    pruned = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    counts, groups = counts.to(work.device), counts.numel()
    pivots = upper.diagonal().unsqueeze(1)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        part = work[start:stop]
        # Squared last: entries of a tiny layer must not underflow.
        scores = (part / pivots[start:stop] * scale.sqrt()).square_()
        table = scores.T.reshape(groups, -1)
        mask = smallest_of_rows(table, counts * stop // inputs - counts * start // inputs)
        mask = mask.view(rows, stop - start).T.contiguous()
        errors = _correct(part, mask / pivots[start:stop], upper[start:stop, start:stop])
        if stop < inputs:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
        pruned[start:stop] = mask
    return pruned


def _correct(part: torch.Tensor, gone: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """e (b, R) of a block of columns `part` (b, R), corrected in place; `gone` is the mask over U_jj."""
    errors = torch.empty_like(part)
    for first in range(0, part.shape[0], _PANEL):
        last = min(first + _PANEL, part.shape[0])
        for j in range(first, last):
            torch.mul(part[j], gone[j], out=errors[j])
            part[j + 1 : last].addr_(upper[j, j + 1 : last], errors[j], alpha=-1.0)
        part[last:].addmm_(upper[first:last, last:].T, errors[first:last], alpha=-1.0)
    return errors
