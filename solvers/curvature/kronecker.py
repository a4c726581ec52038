"""H = diag(s) ⊗ (C + λI): the rows of a layer share one input moment.

A layer of R rows (neurons, filters) and d inputs has n = R·d weights, row after row. With C = mean of x xᵀ over the
inputs x and s = 1, ½ (v − w)ᵀH(v − w) is half the mean squared error of the layer's output (SparseGPT, ALPS); with s
the mean squared gradient of the loss at each output it is in units of the loss (Martens and Grosse, *K-FAC*, ICML
2015). Rows do not interact, so everything is a batch of d × d problems that share one matrix:

    H⁻¹ = diag(1/s) ⊗ (C + λI)⁻¹ ,      H_SS is block-diagonal with the blocks s_r (C + λI)_{S_r S_r} .
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from solvers.arguments import real_tensor
from solvers.curvature.base import Curvature
from solvers.curvature.dense import Dense
from solvers.curvature.kronecker_restricted import KroneckerRestricted
from solvers.errors import CapabilityError, ProblemError, SingularHessianError
from solvers.linalg import Apply, lower_gram


class Kronecker(Curvature):
    """diag(s) ⊗ (C + λI).

    Parameters
    ----------
    row_scale : (R,) tensor, none negative
        s.
    input_moment : (d, d) tensor, float32 or float64
        C, symmetric positive semidefinite.
    damping : float ≥ 0
        λ, in units of C.

    Raises
    ------
    ProblemError
        For shapes that do not fit, a negative scale, or a C that is not positive semidefinite.
    """

    def __init__(self, row_scale: torch.Tensor, input_moment: torch.Tensor, damping: float = 0.0) -> None:
        row_scale = real_tensor(row_scale, "row_scale")
        if row_scale.ndim != 1 or row_scale.numel() == 0:
            raise ProblemError(f"row_scale must be a non-empty vector, not shape {tuple(row_scale.shape)}")
        inputs = Dense(input_moment, damping)
        scale = row_scale.to(inputs.device, torch.float64)
        if bool((scale < 0.0).any()):
            at = int((scale < 0.0).nonzero()[0])
            raise ProblemError(f"row_scale must not be negative; entry {at} is {float(scale[at])!r}")
        self._set(scale, inputs)

    def _set(self, row_scale: torch.Tensor, inputs: Dense) -> None:
        self.row_scale, self.inputs, self.damping = row_scale, inputs, inputs.damping
        self.n_rows, self.n_inputs = int(row_scale.numel()), inputs.n
        self.n = self.n_rows * self.n_inputs
        self.n_components = self.n_rows

    def __repr__(self) -> str:
        return f"Kronecker(rows={self.n_rows}, inputs={self.n_inputs}, damping={self.damping:g}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs.dtype

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.inputs.rank

    @property
    def ridge(self) -> torch.Tensor:
        return (self.damping * self.row_scale).repeat_interleave(self.n_inputs)

    def _by_rows(self, x: torch.Tensor, matrix: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Rows of x times a symmetric or projecting matrix (d, k), scaled; (R·k,) or (R·k, m)."""
        many = x.reshape(self.n_rows, matrix.shape[0], -1)
        out = torch.einsum("rdm,dk->rkm", many, matrix) if many.shape[2] > 1 else (many[:, :, 0] @ matrix).unsqueeze(2)
        out = out * scale.reshape(-1, 1, 1)
        return out.reshape(-1, *x.shape[1:])

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_rows(x, self.inputs.matrix, self.row_scale)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_rows(x, self.inputs.root.T, self.row_scale.sqrt())

    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        return self._by_rows(z, self.inputs.root, self.row_scale.sqrt())

    def factor_columns(self, index: torch.Tensor) -> torch.Tensor:
        row = torch.div(index, self.n_inputs, rounding_mode="floor")
        return self.inputs.root[:, index % self.n_inputs] * self.row_scale[row].sqrt()

    def quadratic(self, x: torch.Tensor) -> torch.Tensor:
        # Through C: the factor would have to be found first.
        rows = x.reshape(self.n_rows, self.n_inputs)
        return 0.5 * (self.row_scale * ((rows @ self.inputs.matrix) * rows).sum(1).clamp_min(0.0)).sum()

    @cached_property
    def diagonal(self) -> torch.Tensor:
        return torch.outer(self.row_scale, self.inputs.diagonal).reshape(-1)

    def submatrix(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        first, second = self.index_of(rows), self.index_of(columns)
        one, other = self.component_of(first), self.component_of(second)
        part = self.inputs.matrix[first % self.n_inputs][:, second % self.n_inputs] * self.row_scale[one].unsqueeze(1)
        return torch.where(one.unsqueeze(1) == other, part, 0.0)

    def with_damping(self, damping: float) -> Kronecker:
        other = object.__new__(Kronecker)
        other._set(self.row_scale, self.inputs.with_damping(damping))
        return other

    def select(self, index: torch.Tensor) -> Curvature:
        return Dense(self.submatrix(index, index))

    def split(self) -> list[Curvature]:
        rows: list[Curvature] = []
        for row in range(self.n_rows):
            part = object.__new__(Kronecker)
            part._set(self.row_scale[row : row + 1], self.inputs)
            rows.append(part)
        return rows

    def digest_arrays(self) -> tuple[torch.Tensor, ...]:
        return self.row_scale, self.inputs.measured_part

    @property
    def _inverse_scale(self) -> torch.Tensor:
        if bool((self.row_scale == 0.0).any()):
            at = int((self.row_scale == 0.0).nonzero()[0])
            raise SingularHessianError(f"H⁻¹ is needed but the scale of row {at} is 0; no loss was seen through it")
        return 1.0 / self.row_scale

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(self.n_rows, self.n_inputs, -1).transpose(0, 1).reshape(self.n_inputs, -1)
        solved = self.inputs.solve(rows).reshape(self.n_inputs, self.n_rows, -1).transpose(0, 1)
        return (solved * self._inverse_scale.reshape(-1, 1, 1)).reshape(x.shape)

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        return torch.outer(self._inverse_scale, self.inputs.inverse_diagonal).reshape(-1)

    def _spectrum(self, profile: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (d,) and eigenvectors (d, d) of E⁻¹(C + λI)E⁻¹, E = diag(profile), in its dtype; kept."""
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = self.__dict__.get("_scaled_spectrum")
        if found is None or found[0].dtype != profile.dtype or not torch.equal(found[0], profile):
            wide = profile.double()
            scaled = (self.inputs.matrix / wide.unsqueeze(0) / wide.unsqueeze(1)).to(profile.dtype)
            values, vectors = torch.linalg.eigh(scaled)
            found = profile, values.clamp_min(0.0), vectors
            self.__dict__["_scaled_spectrum"] = found
        return found[1], found[2]

    def penalised(self, metric: torch.Tensor) -> Callable[[float], Apply]:
        """As `Curvature.penalised`, for a metric t_r e_c; one eigendecomposition serves all rows, ρ and masks.

        With D = diag(t) ⊗ E and E⁻¹(C + λI)E⁻¹ = QΛQᵀ the inverse is Q(s_r/t_r² Λ + ρI)⁻¹Qᵀ for row r, one d × d
        matrix for all rows where s_r/t_r² is the same in all. Rows of t_r = 0 follow the others.

        Raises
        ------
        CapabilityError
            For any other metric.
        """
        table = metric.view(self.n_rows, self.n_inputs)
        profile = table[table[:, 0].argmax()]
        size = (table[:, 0] / profile[0]).double()
        if not torch.allclose(table, torch.outer(size.to(metric.dtype), profile), rtol=1e-5, atol=0.0):
            raise CapabilityError(
                "a Kronecker curvature takes a metric t_r e_c, one profile over the inputs of all rows"
            )
        ratio = self.row_scale / size.square().clamp_min(1e-300)
        common = ratio[size.argmax()]
        ratio = torch.where(size > 0.0, ratio, common)
        values, vectors = self._spectrum(profile)
        shared = bool(torch.allclose(ratio, common, rtol=1e-5, atol=0.0))

        def at(penalty: float) -> Apply:
            if shared and 3 * self.n_rows >= self.n_inputs:
                # Formed once per penalty, it saves a product per application.
                lower = lower_gram(vectors * (values * float(common) + penalty).rsqrt(), panel=256).tril()
                inverse = lower + lower.tril(-1).T
                return lambda x: (x.view(table.shape) @ inverse).view(-1)
            weights = 1.0 / (torch.outer(ratio.to(values.dtype), values) + penalty)
            return lambda x: ((x.view(table.shape) @ vectors).mul_(weights) @ vectors.T).view(-1)

        return at

    def restrict(self, kept: torch.Tensor) -> KroneckerRestricted:
        return KroneckerRestricted(self.inputs, self.row_scale, kept)
