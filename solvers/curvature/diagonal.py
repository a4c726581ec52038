"""H = diag(h) + λI: weights that do not interact (LeCun, Denker and Solla, *Optimal brain damage*, NIPS 1990)."""

from __future__ import annotations

from functools import cached_property

import torch

from solvers.arguments import real_tensor, ridge_of
from solvers.curvature.base import Curvature
from solvers.curvature.restricted import Restricted, Solved
from solvers.errors import ProblemError, SingularHessianError
from solvers.linalg import Apply


class Diagonal(Curvature):
    """diag(h) + λI.

    Parameters
    ----------
    entries : (n,) tensor, float32 or float64, none negative
        h.
    damping : float ≥ 0
        λ.

    Raises
    ------
    ProblemError
        For a wrong shape or a negative entry.
    """

    rank = 0

    def __init__(self, entries: torch.Tensor, damping: float = 0.0) -> None:
        entries, damping = real_tensor(entries, "a diagonal curvature"), ridge_of(damping)
        if entries.ndim != 1 or entries.numel() == 0:
            raise ProblemError(f"a diagonal curvature must be a non-empty vector, not shape {tuple(entries.shape)}")
        self._dtype, self.damping = entries.dtype, damping
        self.entries = entries.double()
        if bool((self.entries < 0.0).any()):
            at = int((self.entries < 0.0).nonzero()[0])
            raise ProblemError(f"a diagonal curvature must not be negative; entry {at} is {float(self.entries[at])!r}")
        self.n = int(entries.numel())

    def __repr__(self) -> str:
        return f"Diagonal(n={self.n}, damping={self.damping:g}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def ridge(self) -> torch.Tensor:
        return self.diagonal

    @cached_property
    def diagonal(self) -> torch.Tensor:
        return self.entries + self.damping

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.diagonal.reshape(-1, *[1] * (x.ndim - 1)) * x

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((0, *x.shape[1:]))

    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        return z.new_zeros((self.n, *z.shape[1:]))

    def factor_columns(self, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros((0, index.numel()), dtype=torch.float64, device=self.device)

    def with_damping(self, damping: float) -> Diagonal:
        return Diagonal(self.entries, damping)

    def select(self, index: torch.Tensor) -> Diagonal:
        return Diagonal(self.entries[index], self.damping)

    def digest_arrays(self) -> tuple[torch.Tensor, ...]:
        return (self.entries,)

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        return self.inverse_diagonal.reshape(-1, *[1] * (x.ndim - 1)) * x

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        return _inverse(self.diagonal)

    def shifted_inverse(self, ridge: torch.Tensor) -> Apply:
        inverse = _inverse(self.diagonal + ridge)
        return lambda x: inverse * x

    def restrict(self, kept: torch.Tensor) -> DiagonalRestricted:
        index = kept.nonzero().squeeze(1)
        return DiagonalRestricted(self.diagonal[index], index)


class DiagonalRestricted(Restricted):
    """The kept entries (s,)."""

    def __init__(self, entries: torch.Tensor, kept: torch.Tensor) -> None:
        self.entries, self.kept = entries, kept

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self.entries * x

    def solve(self, right: torch.Tensor) -> Solved:
        zero = self.entries == 0.0
        outside = float(right[zero].norm())
        if outside > 0.0:
            return Solved(
                None,
                "diagonal",
                outside / float(right.norm()),
                "a kept weight has a gradient but no curvature, so the refit objective is unbounded below; use a "
                "larger damping",
            )
        return Solved(torch.where(zero, 0.0, right / torch.where(zero, 1.0, self.entries)), "diagonal", 0.0)

    def inverse_diagonal(self) -> torch.Tensor:
        return _inverse(self.entries)


def _inverse(entries: torch.Tensor) -> torch.Tensor:
    if bool((entries == 0.0).any()):
        at = int((entries == 0.0).nonzero()[0])
        raise SingularHessianError(f"H⁻¹ is needed but entry {at} of the diagonal is 0; use a larger damping")
    return 1.0 / entries
