"""Quadratic blocks and selection problems: what a solver is given.

A block holds weights w, a factor A (rows are gradients divided by the square root of their
number), a damping λ ≥ 0 and possibly a mean gradient g, and stands for H = AᵀA + λI, which is
never formed. A problem is one or more blocks, H being block-diagonal over them, that share one
budget ``n_prune``. With P the removed weights and S the kept ones the two objectives are

* selection (CBS-S):  ½ w_Pᵀ H_PP w_P − g_Pᵀ w_P
* joint (CBS):        min over v with v_P = 0 of  gᵀ(v − w) + ½ (v − w)ᵀ H (v − w)

after Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from solvers import linalg
from solvers.errors import ProblemError, UnknownNameError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Objective(str, Enum):
    """What the mask is judged by: CBS-S (kept weights stay) or CBS (kept weights re-optimised)."""

    SELECTION = "selection"
    JOINT = "joint"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: Objective | str) -> Objective:
        """The objective of that name; raises UnknownNameError."""
        try:
            return cls(value)
        except ValueError:
            raise UnknownNameError.of("objective", str(value), [o.value for o in cls]) from None


def _as_tensor(value: Any, what: str, name: str) -> torch.Tensor:
    """`value` as a floating tensor, without a copy where that is possible."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach()
    else:
        try:
            array = np.asarray(value)
            if not array.flags.writeable or any(stride < 0 for stride in array.strides):
                array = array.copy()
            tensor = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            raise ProblemError(
                f"block {name!r}: {what} cannot be read as numbers ({error}); pass a numpy array or a torch tensor"
            ) from error
    if tensor.is_complex():
        raise ProblemError(f"block {name!r}: {what} is complex ({tensor.dtype}); pass real numbers")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
    return tensor


def _require_finite(tensor: torch.Tensor, what: str, name: str) -> None:
    """Raise ProblemError naming the first entry that is NaN or infinite."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    rows = max(1, linalg.CHUNK_ENTRIES // max(1, flat.shape[1]))
    for start in range(0, flat.shape[0], rows):
        bad = ~torch.isfinite(flat[start : start + rows])
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            where = (start + row, column) if tensor.ndim == 2 else (column,)
            raise ProblemError(
                f"block {name!r}: {what}{list(where)} is {float(flat[start + row, column])}; "
                "remove or repair values that are not finite"
            )


@dataclass(frozen=True)
class ProblemArrays:
    """A small problem as dense numpy float64 arrays, for exact backends.

    Attributes
    ----------
    weights : (n,)
    factor : (R, n), block-diagonal over the blocks, R the sum of their rows
    damping : (n,), the damping of the block each weight belongs to
    gradient : (n,), zeros where no gradient is given
    """

    weights: Array
    factor: Array
    damping: Array
    gradient: Array

    @property
    def hessian(self) -> Array:
        """H = AᵀA + diag(damping), dense (n, n)."""
        return self.factor.T @ self.factor + np.diag(self.damping)


@dataclass(frozen=True, eq=False)
class QuadraticBlock:
    """One block of the quadratic model of the loss.

    Parameters
    ----------
    weights : (n,) array or tensor
        The weights w; kept as float64.
    factor : (r, n) array or tensor, float32 or float64
        A; kept as it is, without a copy, on whatever device it lies.
    damping : float ≥ 0
        λ in H = AᵀA + λI.
    gradient : (n,) array or tensor, optional
        Mean gradient g; None is the stationary-point assumption of the optimal brain surgeon.
    name : str
        Used in messages and reports.

    Raises
    ------
    ProblemError
        For shapes that do not fit, values that are not finite, or a negative damping.
    """

    weights: torch.Tensor
    factor: torch.Tensor
    damping: float = 0.0
    gradient: torch.Tensor | None = None
    name: str = "block"

    def __post_init__(self) -> None:
        name = self.name
        factor = _as_tensor(self.factor, "factor", name)
        weights = _as_tensor(self.weights, "weights", name)
        if weights.ndim != 1 or weights.numel() == 0:
            raise ProblemError(f"block {name!r}: weights must be a non-empty vector, not shape {tuple(weights.shape)}")
        if factor.ndim != 2 or factor.shape[1] != weights.shape[0] or factor.shape[0] == 0:
            raise ProblemError(
                f"block {name!r}: factor has shape {tuple(factor.shape)} but must be (rows ≥ 1, {weights.shape[0]}): "
                "one column per weight, one row per gradient"
            )
        weights = weights.to(device=factor.device, dtype=torch.float64)
        gradient = None
        if self.gradient is not None:
            gradient = _as_tensor(self.gradient, "gradient", name)
            if gradient.shape != weights.shape:
                raise ProblemError(
                    f"block {name!r}: gradient has shape {tuple(gradient.shape)}, weights {tuple(weights.shape)}; "
                    "they must be the same"
                )
            gradient = gradient.to(device=factor.device, dtype=torch.float64)
            _require_finite(gradient, "gradient", name)
        try:
            damping = float(self.damping)
        except (TypeError, ValueError):
            raise ProblemError(f"block {name!r}: damping must be a number, not {self.damping!r}") from None
        if not math.isfinite(damping) or damping < 0:
            raise ProblemError(f"block {name!r}: damping must be finite and not negative, not {damping!r}")
        _require_finite(weights, "weights", name)
        _require_finite(factor, "factor", name)
        for field, value in (("weights", weights), ("factor", factor), ("gradient", gradient), ("damping", damping)):
            object.__setattr__(self, field, value)

    def __repr__(self) -> str:
        return (
            f"QuadraticBlock({self.name!r}, n={self.n}, rows={self.n_rows}, damping={self.damping:g}, "
            f"gradient={'yes' if self.gradient is not None else 'no'}, {self.factor.dtype}, {self.device})"
        )

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.weights.shape[0])

    @property
    def n_rows(self) -> int:
        """Number of rows r of the factor."""
        return int(self.factor.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the factor lies."""
        return self.factor.device

    def tensor_of(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """A copy of a numpy array (a mask, a vector) on this block's device."""
        return torch.tensor(array, device=self.device)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """A x for x of shape (n,) or (n, m); float64, accumulated in float64."""
        return linalg.project(self.factor, x)

    def back_project(self, z: torch.Tensor) -> torch.Tensor:
        """Aᵀ z for z of shape (r,) or (r, m); float64, accumulated in float64."""
        return linalg.back_project(self.factor, z)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """H x for x of shape (n,) or (n, m), float64."""
        return self.back_project(self.project(x)) + self.damping * x

    def columns(self, index: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor:
        """A[:, index] as float64, shape (r, m); `index` holds positions, or is a mask of shape (n,)."""
        chosen = torch.as_tensor(index, device=self.device)
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero().squeeze(1)
        return linalg.gather_columns(self.factor, chosen).double()

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """H_ii, float64 (n,)."""
        return linalg.column_squares(self.factor) + self.damping

    @cached_property
    def gram(self) -> torch.Tensor:
        """A Aᵀ, float64 (r, r)."""
        return linalg.gram_of(self.factor)

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        """diag(H⁻¹), float64 (n,).

        Raises
        ------
        SingularHessianError
            If λ = 0 and AᵀA has no inverse, or λ is too small for float64 to tell it from zero.
        """
        return linalg.inverse_diagonal(self)

    @cached_property
    def woodbury_factor(self) -> torch.Tensor:
        """Cholesky factor of K = λI + AAᵀ, float64 (r, r); raises SingularHessianError."""
        return linalg.woodbury_cholesky(self)

    def arrays(self) -> ProblemArrays:
        """The block as dense numpy float64 arrays."""
        return ProblemArrays(
            weights=self.weights.cpu().numpy(),
            factor=self.factor.detach().cpu().double().numpy(),
            damping=np.full(self.n, self.damping),
            gradient=np.zeros(self.n) if self.gradient is None else self.gradient.cpu().numpy(),
        )


@dataclass(frozen=True, eq=False)
class SelectionProblem:
    """Choose exactly `n_prune` weights to remove from `blocks`, one budget over all of them.

    Weights are numbered through the blocks in order; masks are numpy bool of shape (n,), True =
    removed.

    Parameters
    ----------
    blocks : sequence of QuadraticBlock
    n_prune : int, 0 ≤ n_prune ≤ n
    objective : {"selection", "joint"} or Objective

    Raises
    ------
    ProblemError
        If there is no block or the budget is not an integer in [0, n].
    UnknownNameError
        For an objective that does not exist.
    """

    blocks: tuple[QuadraticBlock, ...]
    n_prune: int
    objective: Objective = Objective.SELECTION

    def __init__(
        self,
        blocks: Sequence[QuadraticBlock] | QuadraticBlock,
        n_prune: int,
        objective: Objective | str = Objective.SELECTION,
    ) -> None:
        members = (blocks,) if isinstance(blocks, QuadraticBlock) else tuple(blocks)
        if not members:
            raise ProblemError("a problem needs at least one block; the list of blocks is empty")
        for member in members:
            if not isinstance(member, QuadraticBlock):
                raise ProblemError(f"blocks must be QuadraticBlock, not {type(member).__name__}")
        if isinstance(n_prune, bool) or not isinstance(n_prune, (int, np.integer)):
            raise ProblemError(f"n_prune must be an integer, not {n_prune!r}")
        total = sum(block.n for block in members)
        if not 0 <= n_prune <= total:
            raise ProblemError(f"n_prune must lie in [0, {total}], the number of weights, not {int(n_prune)}")
        object.__setattr__(self, "blocks", members)
        object.__setattr__(self, "n_prune", int(n_prune))
        object.__setattr__(self, "objective", Objective.parse(objective))

    def __repr__(self) -> str:
        return (
            f"SelectionProblem(n={self.n}, n_prune={self.n_prune}, objective={self.objective.value!r}, "
            f"blocks={len(self.blocks)})"
        )

    @cached_property
    def n(self) -> int:
        """Number of weights over all blocks."""
        return sum(block.n for block in self.blocks)

    @property
    def n_kept(self) -> int:
        """Number of weights that stay."""
        return self.n - self.n_prune

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The range of each block in the common numbering."""
        ends = np.cumsum([block.n for block in self.blocks])
        return tuple(slice(int(end) - block.n, int(end)) for block, end in zip(self.blocks, ends, strict=True))

    @cached_property
    def weights(self) -> Array:
        """w over all blocks, float64 (n,)."""
        return np.concatenate([block.weights.cpu().numpy() for block in self.blocks])

    @cached_property
    def has_gradient(self) -> bool:
        """Whether any block carries a first-order term."""
        return any(block.gradient is not None for block in self.blocks)

    @cached_property
    def gradient(self) -> Array | None:
        """g over all blocks, float64 (n,) with zeros where a block has none; None where no block has one."""
        if not self.has_gradient:
            return None
        return np.concatenate([np.zeros(b.n) if b.gradient is None else b.gradient.cpu().numpy() for b in self.blocks])

    @cached_property
    def diagonal(self) -> Array:
        """H_ii over all blocks, float64 (n,)."""
        return np.concatenate([block.diagonal.cpu().numpy() for block in self.blocks])

    @cached_property
    def scale(self) -> float:
        """½ Σ H_ii w_i² + Σ |g_i w_i|: the size against which absolute tolerances are measured."""
        quadratic = 0.5 * float(self.diagonal @ self.weights**2)
        linear = 0.0 if self.gradient is None else float(np.abs(self.gradient * self.weights).sum())
        return quadratic + linear

    def multiply(self, x: Array) -> Array:
        """H x over all blocks, float64 (n,)."""
        parts = []
        for block, where in zip(self.blocks, self.slices, strict=True):
            part = block.tensor_of(x[where])
            parts.append(block.multiply(part).cpu().numpy())
        return np.concatenate(parts)

    def arrays(self) -> ProblemArrays:
        """The whole problem as dense numpy float64 arrays (for small n)."""
        parts = [block.arrays() for block in self.blocks]
        factor = np.zeros((sum(p.factor.shape[0] for p in parts), self.n))
        row = 0
        for part, where in zip(parts, self.slices, strict=True):
            factor[row : row + part.factor.shape[0], where] = part.factor
            row += part.factor.shape[0]
        return ProblemArrays(
            weights=self.weights,
            factor=factor,
            damping=np.concatenate([p.damping for p in parts]),
            gradient=np.concatenate([p.gradient for p in parts]),
        )

    def with_n_prune(self, n_prune: int) -> SelectionProblem:
        """The same blocks (and what is cached on them) with another budget."""
        return SelectionProblem(self.blocks, n_prune, self.objective)

    def with_objective(self, objective: Objective | str) -> SelectionProblem:
        """The same blocks and budget under the other objective."""
        return SelectionProblem(self.blocks, self.n_prune, objective)

    def without_gradient(self) -> SelectionProblem:
        """The same problem with g = 0."""
        return SelectionProblem([replace(b, gradient=None) for b in self.blocks], self.n_prune, self.objective)

    def check_mask(self, pruned: npt.NDArray[Any]) -> Mask:
        """`pruned` as a bool mask of shape (n,) with exactly n_prune True; raises ProblemError."""
        mask = np.asarray(pruned)
        if mask.dtype != np.bool_:
            raise ProblemError(f"a mask must be of dtype bool, not {mask.dtype}")
        if mask.shape != (self.n,):
            raise ProblemError(f"the mask has shape {mask.shape}, the problem {self.n} weights; they must match")
        count = int(mask.sum())
        if count != self.n_prune:
            raise ProblemError(f"the mask removes {count} weights; the problem asks for exactly {self.n_prune}")
        return mask

    def selection_value(self, pruned: Mask) -> float:
        """CBS-S of a mask, float64; the mask may remove any number of weights."""
        total = 0.0
        for block, where in zip(self.blocks, self.slices, strict=True):
            mask = block.tensor_of(pruned[where])
            x = torch.where(mask, block.weights, 0.0)
            value = 0.5 * block.project(x).square().sum() + 0.5 * block.damping * x.square().sum()
            if block.gradient is not None:
                value = value - block.gradient @ x
            total += float(value)
        return total

    def joint_value(self, pruned: Mask) -> float:
        """CBS of a mask (objective after the combinatorial update), float64; −inf if unbounded."""
        from solvers.refit import refit

        return refit(self, pruned).value

    def value(self, pruned: Mask) -> float:
        """The problem's own objective for a mask."""
        return self.selection_value(pruned) if self.objective is Objective.SELECTION else self.joint_value(pruned)
