"""H_SS of a Kronecker curvature: one system s_r M_{S_r S_r} x_r = b_r per row, M = C + λI, many rows at a time.

The kept inputs of each row are gathered into a batch, short rows being filled up by unit rows, factorised by one
batched Cholesky per batch, and corrected by steps of iterative refinement. Rows whose system is singular to float64
get the minimum-norm solution, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from solvers.curvature.restricted import INSIDE, PIVOT_FLOOR, Restricted, Solved
from solvers.errors import SingularHessianError
from solvers.linalg import relative_pivots

#: Entries of a batch of gathered systems.
_BATCH_ENTRIES = 1 << 24
_REFINEMENTS = 2


class KroneckerRestricted(Restricted):
    """The kept weights of all rows.

    Parameters
    ----------
    matrix : float64 (d, d)
        M = C + λI.
    row_scale : float64 (R,)
    kept : bool (R·d,)
    """

    def __init__(self, matrix: torch.Tensor, row_scale: torch.Tensor, kept: torch.Tensor) -> None:
        self.matrix, self.row_scale = matrix, row_scale
        self.mask = kept.reshape(row_scale.numel(), -1)
        self.kept = kept.nonzero().squeeze(1)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """(s,) as rows (R, d), zero where pruned."""
        full = torch.zeros(self.mask.shape, dtype=torch.float64, device=x.device)
        full[self.mask] = x
        return full

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return (self._spread(x) @ self.matrix * self.row_scale.unsqueeze(1))[self.mask]

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
        systems = self.matrix[position.unsqueeze(2), position.unsqueeze(1)]
        systems = torch.where(real.unsqueeze(2) & real.unsqueeze(1), systems, 0.0)
        systems.diagonal(dim1=1, dim2=2).add_((~real).double())
        return systems

    @staticmethod
    def _broken(factor: torch.Tensor, info: torch.Tensor, systems: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Which systems are singular to float64, (b,)."""
        return (info != 0) | ~((relative_pivots(factor, systems) > PIVOT_FLOOR) | ~real).all(1)

    def solve(self, right: torch.Tensor) -> Solved:
        if self.kept.numel() == 0 or not bool(right.any()):
            return Solved(torch.zeros_like(right), "none", 0.0)
        wanted, out = self._spread(right), torch.zeros(self.mask.shape, dtype=torch.float64, device=right.device)
        singular, outside = 0, 0.0
        for rows, position, real in self._batches():
            systems = self._systems(position, real)
            scale = self.row_scale[rows].unsqueeze(1)
            vector = torch.where(real, torch.gather(wanted[rows], 1, position), 0.0)
            vector = torch.where(scale > 0.0, vector / torch.where(scale > 0.0, scale, 1.0), vector)
            factor, info = torch.linalg.cholesky_ex(systems)
            broken = self._broken(factor, info, systems, real) | (scale.squeeze(1) == 0.0)
            factor[broken] = torch.eye(factor.shape[1], dtype=torch.float64, device=factor.device)
            x = torch.cholesky_solve(vector.unsqueeze(2), factor)
            for _ in range(_REFINEMENTS):
                x = x + torch.cholesky_solve(vector.unsqueeze(2) - systems @ x, factor)
            x = x.squeeze(2)
            for at in broken.nonzero().squeeze(1).tolist():
                matrix = systems[at] if float(scale[at]) > 0.0 else torch.zeros_like(systems[at])
                x[at], left = _minimum_norm(matrix, vector[at], real[at])
                singular, outside = singular + bool(vector[at].any()), max(outside, left)
            solved = torch.zeros((rows.numel(), self.mask.shape[1]), dtype=torch.float64, device=right.device)
            out[rows] = solved.scatter_(1, position, torch.where(real, x, 0.0))
        if outside > INSIDE:
            return Solved(None, "batched", outside, "a row of the layer is singular and its gradient leaves its range, "
                          "so the refit objective is unbounded below; use a larger damping")  # fmt: skip
        found = out[self.mask]
        residual = float((self.multiply(found) - right).norm()) / float(right.norm())
        repair = f"H of the kept weights is singular to float64 in {singular} rows; the minimum-norm update was taken"
        return Solved(found, "batched", residual, repair if singular else "")

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
