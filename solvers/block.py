"""A block of the quadratic model of the loss: weights, curvature, possibly a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import torch

from solvers.arguments import instance, number, real_tensor
from solvers.arrays import ProblemArrays
from solvers.curvature import Curvature, LowRank
from solvers.errors import CapabilityError, ProblemError
from solvers.linalg import named

#: Entries that are looked at together.
_CHUNK_ENTRIES = 1 << 24


class QuadraticBlock:
    """One block: w, H and g of  gᵀ(v − w) + ½ (v − w)ᵀH(v − w).

    Parameters
    ----------
    weights : (n,) array or tensor
        The weights w; kept as float64 on the curvature's device (without a curvature: as they are).
    factor : (r, n) array or tensor, float32 or float64
        A of H = AᵀA + λI: short for ``curvature=LowRank(factor, damping)``. Kept as it is, without a copy.
    damping : float ≥ 0
        λ of that.
    gradient : (n,) array or tensor, optional
        Mean gradient g; None is the stationary-point assumption of the optimal brain surgeon.
    name : str
        Used in messages and reports.
    curvature : Curvature
        H of any other kind, instead of `factor` and `damping`.

    Raises
    ------
    ProblemError
        For shapes that do not fit, values that are not finite, a negative damping, or two curvatures or none.
    """

    __slots__ = ("curvature", "gradient", "name", "weights")

    weights: torch.Tensor
    curvature: Curvature
    gradient: torch.Tensor | None
    name: str

    def __init__(
        self,
        weights: Any,
        factor: Any = None,
        damping: float = 0.0,
        gradient: Any = None,
        name: str = "block",
        *,
        curvature: Curvature | None = None,
    ) -> None:
        instance("the name of a block", name, str, error=ProblemError)
        if (factor is None) == (curvature is None):
            raise ProblemError(f"block {name!r}: give either a factor or a curvature")
        values = real_tensor(weights, f"block {name!r}: weights")
        if values.ndim != 1 or values.numel() == 0:
            raise ProblemError(f"block {name!r}: weights must be a non-empty vector, not shape {tuple(values.shape)}")
        if curvature is None:
            curvature = _low_rank(factor, damping, values.numel(), name)
        elif not isinstance(curvature, Curvature):
            raise ProblemError(f"block {name!r}: curvature must be a Curvature, not {type(curvature).__name__}")
        if curvature.n != values.numel():
            raise ProblemError(
                f"block {name!r}: the curvature is that of {curvature.n} weights, but there are {values.numel()}"
            )
        _require_finite(values, "weights", name)
        for array in curvature.digest_arrays():
            _require_finite(array, "factor" if isinstance(curvature, LowRank) else "curvature", name)
        if curvature.measured:
            values = values.to(device=curvature.device, dtype=torch.float64)
        slope = None
        if gradient is not None:
            slope = real_tensor(gradient, f"block {name!r}: gradient")
            if slope.shape != values.shape:
                raise ProblemError(
                    f"block {name!r}: gradient has shape {tuple(slope.shape)}, weights {tuple(values.shape)}; "
                    "they must be the same"
                )
            slope = slope.to(device=values.device, dtype=torch.float64)
            _require_finite(slope, "gradient", name)
        for field, value in (("weights", values), ("curvature", curvature), ("gradient", slope), ("name", name)):
            object.__setattr__(self, field, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a QuadraticBlock cannot be changed; build another one with the new {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a QuadraticBlock cannot be changed; {name} stays")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.weights, self.curvature, self.gradient, self.name)

    def __repr__(self) -> str:
        gradient = "yes" if self.gradient is not None else "no"
        return f"QuadraticBlock({self.name!r}, n={self.n}, {self.curvature!r}, gradient={gradient})"

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.weights.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the weights and the curvature lie."""
        return self.weights.device

    @property
    def low_rank(self) -> LowRank:
        """The curvature, if it is of low rank; raises CapabilityError for the other kinds."""
        if not isinstance(self.curvature, LowRank):
            raise CapabilityError(f"block {self.name!r}: a factor is needed, but its curvature is {self.curvature!r}")
        return self.curvature

    @property
    def factor(self) -> torch.Tensor:
        """A of a low-rank curvature; raises CapabilityError for the other kinds."""
        return self.low_rank.factor

    @property
    def damping(self) -> float:
        """λ."""
        return self.curvature.damping

    @property
    def diagonal(self) -> torch.Tensor:
        """H_ii, float64 (n,)."""
        return self.curvature.diagonal

    @property
    def inverse_diagonal(self) -> torch.Tensor:
        """diag(H⁻¹), float64 (n,); raises SingularHessianError."""
        with named(self.name):
            return self.curvature.inverse_diagonal

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """H⁻¹ x for x of shape (n,) or (n, m), float64; raises SingularHessianError."""
        with named(self.name):
            return self.curvature.solve(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """H x for x of shape (n,) or (n, m), float64."""
        return self.curvature.multiply(x)

    def tensor_of(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A copy of a numpy array (a mask, a vector) on this block's device."""
        return torch.tensor(array, device=self.device)

    def arrays(self) -> ProblemArrays:
        """The block as dense numpy float64 arrays."""
        curvature = self.curvature
        columns = curvature.factor_columns(torch.arange(self.n, device=self.device)).double().cpu().numpy()
        width = self.n // curvature.n_components
        parts = [columns[:, start : start + width] for start in range(0, self.n, width)]
        return ProblemArrays(
            weights=self.weights.cpu().numpy(),
            factor=scipy.linalg.block_diag(*parts),
            damping=curvature.ridge.cpu().numpy(),
            gradient=np.zeros(self.n) if self.gradient is None else self.gradient.cpu().numpy(),
        )

    def change(self, step: torch.Tensor) -> float:
        """gᵀd + ½ dᵀHd of a step d (n,)."""
        value = self.curvature.quadratic(step)
        return float(value if self.gradient is None else value + self.gradient @ step)

    def without_gradient(self) -> QuadraticBlock:
        """The same block with g = 0, and what is cached on its curvature."""
        return self if self.gradient is None else _rebuild(self.weights, self.curvature, None, self.name)

    def with_damping(self, damping: float) -> QuadraticBlock:
        """The same block with another λ."""
        if damping == self.damping:
            return self
        return _rebuild(self.weights, self.curvature.with_damping(damping), self.gradient, self.name)

    def split(self) -> list[QuadraticBlock]:
        """One block per component of the curvature, in order."""
        parts = self.curvature.split()
        if len(parts) == 1:
            return [self]
        weights = torch.split(self.weights, parts[0].n)
        gradients = [None] * len(parts) if self.gradient is None else torch.split(self.gradient, parts[0].n)
        names = [f"{self.name}[{number}]" for number in range(len(parts))]
        return [_rebuild(*part) for part in zip(weights, parts, gradients, names, strict=True)]

    def select(self, index: torch.Tensor) -> QuadraticBlock:
        """The block of the weights `index` (m,) alone."""
        gradient = None if self.gradient is None else self.gradient[index]
        return _rebuild(self.weights[index], self.curvature.select(index), gradient, self.name)


def _rebuild(weights: torch.Tensor, curvature: Curvature, gradient: torch.Tensor | None, name: str) -> QuadraticBlock:
    """A block of parts that are known to be good."""
    block = object.__new__(QuadraticBlock)
    for field, value in (("weights", weights), ("curvature", curvature), ("gradient", gradient), ("name", name)):
        object.__setattr__(block, field, value)
    return block


def _low_rank(factor: Any, damping: Any, n: int, name: str) -> LowRank:
    rows = real_tensor(factor, f"block {name!r}: factor")
    if rows.ndim != 2 or rows.shape[1] != n or rows.shape[0] == 0:
        raise ProblemError(
            f"block {name!r}: factor has shape {tuple(rows.shape)} but must be (rows ≥ 1, {n}): "
            "one column per weight, one row per gradient"
        )
    return LowRank(rows, number(f"block {name!r}: damping", damping, least=0, error=ProblemError))


def _require_finite(tensor: torch.Tensor, what: str, name: str) -> None:
    """Raise ProblemError naming the first entry that is NaN or infinite."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    rows = max(1, _CHUNK_ENTRIES // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        bad = ~torch.isfinite(flat[start : start + rows])
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            where = (start + row, column) if tensor.ndim == 2 else (column,)
            raise ProblemError(
                f"block {name!r}: {what}{list(where)} is {float(flat[start + row, column])}; "
                "remove or repair values that are not finite"
            )
