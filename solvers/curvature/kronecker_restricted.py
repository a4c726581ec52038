"""H_SS of a Kronecker curvature: one system s_r M_{S_r S_r} x_r = b_r per row, M = C + λI, many rows at a time.

Rows with few kept inputs are gathered into a batch, short rows being filled up by unit rows, factorised by one batched
Cholesky per batch, and corrected by steps of iterative refinement. That costs k³/3 and the gathering of k² entries a
row; conjugate gradients on all rows at once cost two products of (R, d) with (d, d) a step and about as many steps
whatever k is, so that they take over where rows are long. M⁻¹, one matrix for all rows, preconditions them: on S its
inverse is M_SS less what the pruned inputs explain. They run in the dtype of C, are restarted from the float64 residual
and end at `RESIDUAL` in every row; rows that are there are left out of the products. Rows whose system is singular to
float64 get the minimum-norm solution, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from solvers.curvature.dense import Dense
from solvers.curvature.restricted import INSIDE, PIVOT_FLOOR, Restricted, Solved
from solvers.errors import SingularHessianError
from solvers.linalg import relative_pivots

#: Relative residual, in every row, at which conjugate gradients end; the objective is then right to about its square.
RESIDUAL = 1e-6
#: What a row costs, in multiply-adds of a large product as measured: k³ and k² of a Cholesky factorisation, d² of CG.
_CUBE, _SQUARE, _STEPS = 5.0, 400.0, 240.0
_MAX_STEPS, _RESTARTS = 300, 4
#: Rows that are done are left out once no more than this share is not.
_COMPACT = 0.8
#: Entries of a batch of gathered systems.
_BATCH_ENTRIES = 1 << 22
_REFINEMENTS = 2


class KroneckerRestricted(Restricted):
    """The kept weights of all rows.

    Parameters
    ----------
    inputs : Dense of d inputs
        M = C + λI.
    row_scale : float64 (R,)
    kept : bool (R·d,)
    """

    def __init__(self, inputs: Dense, row_scale: torch.Tensor, kept: torch.Tensor) -> None:
        self.inputs, self.matrix, self.row_scale = inputs, inputs.matrix, row_scale
        self.mask = kept.reshape(row_scale.numel(), -1)
        self.kept = kept.nonzero().squeeze(1)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """(s,) as rows (R, d), zero where pruned."""
        full = torch.zeros(self.mask.shape, dtype=torch.float64, device=x.device)
        full[self.mask] = x
        return full

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return (self._spread(x) @ self.matrix * self.row_scale.unsqueeze(1))[self.mask]

    def solve(self, right: torch.Tensor) -> Solved:
        if self.kept.numel() == 0 or not bool(right.any()):
            return Solved(torch.zeros_like(right), "none", 0.0)
        wanted, scale = self._spread(right), self.row_scale.unsqueeze(1)
        target = torch.where(scale > 0.0, wanted / torch.where(scale > 0.0, scale, 1.0), 0.0)
        # A row without scale has solutions only where nothing is asked of it.
        lost = bool((wanted != 0.0)[self.row_scale == 0.0].any())
        out = self._conjugate(target) if self._long() and not lost else None
        method, singular, outside = "conjugate gradients", 0, 1.0 if lost else 0.0
        if out is None:
            method = "batched"
            out, singular, left = self._factorised(target)
            outside = max(outside, left)
        if outside > INSIDE:
            return Solved(None, method, outside, "a row of the layer is singular and its gradient leaves its range, "
                          "so the refit objective is unbounded below; use a larger damping")  # fmt: skip
        found = out[self.mask]
        residual = float((self.multiply(found) - right).norm()) / float(right.norm())
        repair = f"H of the kept weights is singular to float64 in {singular} rows; the minimum-norm update was taken"
        return Solved(found, method, residual, repair if singular else "")

    def _long(self) -> bool:
        """Whether conjugate gradients are cheaper and M has an inverse to precondition them with."""
        counts = self.mask.sum(1).double()
        direct = _CUBE * float(counts.pow(3).sum()) + _SQUARE * float(counts.square().sum())
        if direct <= _STEPS * self.mask.numel() * self.mask.shape[1]:
            return False
        try:
            return self.inputs.inverse is not None
        except SingularHessianError:
            return False

    def _conjugate(self, target: torch.Tensor) -> torch.Tensor | None:
        """x (R, d) with M_SS x = b in every row to `RESIDUAL`; None where that is not reached."""
        dtype = self.inputs.dtype
        keep, matrix, inverse = self.mask.to(dtype), self.matrix.to(dtype), self.inputs.inverse.to(dtype)
        norm = target.norm(dim=1, keepdim=True)
        norm = torch.where(norm > 0.0, norm, 1.0)
        wanted = target / norm
        x, residual = torch.zeros_like(target), wanted
        rows = torch.arange(len(target), device=target.device)
        for _ in range(_RESTARTS):
            worst = residual.norm(dim=1)
            # What is not a number is not there.
            left = ~(worst <= RESIDUAL)
            if not bool(left.any()):
                return x * norm
            rows, residual, size = rows[left], residual[left], worst[left]
            # To half of what is asked for, so that rounding does not ask for another round.
            goal, unit = (0.5 * RESIDUAL / size).to(dtype), size.unsqueeze(1)
            step = _preconditioned(matrix, inverse, keep[rows], (residual / unit).to(dtype), goal)
            x[rows] += step.double() * unit
            residual = wanted[rows] - (x[rows] @ self.matrix) * self.mask[rows]
        return None

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows (b,), positions (b, k), which of them are real (b, k)), rows of like size together."""
        counts = self.mask.sum(1)
        order = counts.argsort(descending=True, stable=True)
        start = 0
        while start < order.numel():
            width = int(counts[order[start]])
            if width == 0:
                return
            rows = order[start : start + max(1, _BATCH_ENTRIES // (width * width))]
            rows = rows[counts[rows] > 0]
            start += max(1, _BATCH_ENTRIES // (width * width))
            position = self.mask[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
            real = torch.arange(width, device=rows.device) < counts[rows].unsqueeze(1)
            yield rows, position, real

    def _systems(self, position: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """M of the kept inputs of each row (b, k, k), the identity where a row is short."""
        systems = self.matrix.view(-1).take(position.unsqueeze(2) * self.matrix.shape[0] + position.unsqueeze(1))
        if not bool(real.all()):
            systems.masked_fill_(~(real.unsqueeze(2) & real.unsqueeze(1)), 0.0)
            systems.diagonal(dim1=1, dim2=2).add_((~real).double())
        return systems

    @staticmethod
    def _broken(factor: torch.Tensor, info: torch.Tensor, systems: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Which systems are singular to float64, (b,)."""
        return (info != 0) | ~((relative_pivots(factor, systems) > PIVOT_FLOOR) | ~real).all(1)

    def _factorised(self, target: torch.Tensor) -> tuple[torch.Tensor, int, float]:
        """(x (R, d), singular rows of which something is asked, the largest share of a right side out of range)."""
        out = torch.zeros_like(target)
        singular, outside = 0, 0.0
        for rows, position, real in self._batches():
            systems = self._systems(position, real)
            vector = torch.where(real, torch.gather(target[rows], 1, position), 0.0)
            factor, info = torch.linalg.cholesky_ex(systems)
            broken = self._broken(factor, info, systems, real)
            factor[broken] = torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device)
            x = torch.cholesky_solve(vector.unsqueeze(2), factor)
            for _ in range(_REFINEMENTS):
                x = x + torch.cholesky_solve(vector.unsqueeze(2) - systems @ x, factor)
            x = x.squeeze(2)
            for at in broken.nonzero().squeeze(1).tolist():
                x[at], left = _minimum_norm(systems[at], vector[at], real[at])
                singular, outside = singular + bool(vector[at].any()), max(outside, left)
            out[rows] = torch.zeros_like(target[rows]).scatter_(1, position, torch.where(real, x, 0.0))
        return out, singular, outside

    def inverse_diagonal(self) -> torch.Tensor:
        out = torch.zeros(self.mask.shape, dtype=torch.float64, device=self.matrix.device)
        for rows, position, real in self._batches():
            systems = self._systems(position, real)
            factor, info = torch.linalg.cholesky_ex(systems)
            broken = self._broken(factor, info, systems, real) | (self.row_scale[rows] == 0.0)
            if bool(broken.any()):
                row = int(rows[broken.nonzero()[0, 0]])
                raise SingularHessianError(
                    f"H of the kept weights of row {row} is singular to float64; use a larger damping"
                )
            diagonal = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2) / self.row_scale[rows].unsqueeze(1)
            spread = torch.zeros((rows.numel(), self.mask.shape[1]), dtype=torch.float64, device=out.device)
            out[rows] = spread.scatter_(1, position, torch.where(real, diagonal, 0.0))
        return out[self.mask]


def _preconditioned(
    matrix: torch.Tensor, inverse: torch.Tensor, keep: torch.Tensor, right: torch.Tensor, goal: torch.Tensor
) -> torch.Tensor:
    """Conjugate gradients on the rows whose residual is not yet down to their `goal`, all of them at once.

    Parameters
    ----------
    matrix, inverse : (d, d)
        M and M⁻¹.
    keep : (R, d)
        1 on S and 0 on P.
    right : (R, d)
        Of norm at most 1 in each row, zero on P.
    goal : (R,)
    """
    found, rows = torch.zeros_like(right), torch.arange(len(right), device=right.device)
    x, residual = torch.zeros_like(right), right.clone()
    direction, before = torch.zeros_like(right), torch.ones_like(goal)
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(_MAX_STEPS):
        left = ~(residual.norm(dim=1) <= goal)
        count = int(left.sum())
        if count <= _COMPACT * rows.numel():
            found[rows] = x
            if count == 0:
                return found
            state = (rows, keep, goal, x, residual, direction, before)
            rows, keep, goal, x, residual, direction, before = (part[left] for part in state)
        better = (residual @ inverse).mul_(keep)
        inner = torch.linalg.vecdot(residual, better)
        direction = torch.addcmul(better, direction, (inner / before.clamp_min(tiny)).unsqueeze(1))
        image = (direction @ matrix).mul_(keep)
        length = torch.where(inner > tiny, inner / torch.linalg.vecdot(direction, image).clamp_min(tiny), 0.0)
        x.addcmul_(direction, length.unsqueeze(1))
        residual.addcmul_(image, length.unsqueeze(1), value=-1.0)
        before = inner
    found[rows] = x
    return found


def _minimum_norm(matrix: torch.Tensor, right: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(x (k,), share of the right-hand side outside the range) of one singular system."""
    index = real.nonzero().squeeze(1)
    values, vectors = torch.linalg.eigh(matrix[index][:, index])
    inside = values > index.numel() * 2.3e-16 * values[-1]
    basis = vectors[:, inside]
    coordinates = basis.T @ right[index]
    norm = float(right.norm())
    outside = float((right[index] - basis @ coordinates).norm()) / norm if norm > 0.0 else 0.0
    x = torch.zeros_like(right)
    x[index] = basis @ (coordinates / values[inside])
    return x, outside
