"""Selection problems: what a solver is given.

A problem is one or more blocks (`solvers.block`), H being block-diagonal over them, that share one budget
(`solvers.budget`). With P the removed weights and S the kept ones the two objectives are

* selection (CBS-S):  ½ w_Pᵀ H_PP w_P − g_Pᵀ w_P
* joint (CBS):        min over v with v_P = 0 of  gᵀ(v − w) + ½ (v − w)ᵀ H (v − w)

after Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import torch

from solvers.arrays import Array as Array
from solvers.arrays import Mask as Mask
from solvers.arrays import ProblemArrays as ProblemArrays
from solvers.block import QuadraticBlock
from solvers.budget import Budget, Cardinality, Pattern, parse
from solvers.curvature import Kronecker
from solvers.errors import CapabilityError, ProblemError, UnknownNameError
from solvers.plain import plainly
from solvers.refit import Refit, refit
from solvers.tensors import ProblemTensors


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


class SelectionProblem:
    """Choose the weights to remove from `blocks`, one budget over all of them.

    Weights are numbered through the blocks in order; masks are numpy bool of shape (n,), True = removed.

    Parameters
    ----------
    blocks : sequence of QuadraticBlock
    budget : Budget, Pattern, int or str
        Which masks are allowed; an integer k is short for ``Cardinality(k)``, exactly k removed, a text such as
        ``"2:4"`` for what `solvers.budget.parse` makes of it.
    objective : {"selection", "joint"} or Objective
    n_prune : int
        Another name for an integer `budget`.

    Raises
    ------
    ProblemError
        If there is no block, the budget cannot be met, or it is given twice or not at all.
    UnknownNameError
        For an objective that does not exist.
    """

    blocks: tuple[QuadraticBlock, ...]
    budget: Budget
    objective: Objective

    def __init__(
        self,
        blocks: Sequence[QuadraticBlock] | QuadraticBlock,
        budget: Budget | Pattern | int | str | None = None,
        objective: Objective | str = Objective.SELECTION,
        *,
        n_prune: int | None = None,
    ) -> None:
        try:
            members = (blocks,) if isinstance(blocks, QuadraticBlock) else tuple(blocks)
        except TypeError:
            raise ProblemError(f"blocks must be a list of QuadraticBlock, not a {type(blocks).__name__}") from None
        if not members:
            raise ProblemError("a problem needs at least one block; the list of blocks is empty")
        for member in members:
            if not isinstance(member, QuadraticBlock):
                raise ProblemError(f"blocks must be QuadraticBlock, not {type(member).__name__}")
        if (budget is None) == (n_prune is None):
            raise ProblemError("give either a budget or n_prune, the number of weights to remove")
        wanted = n_prune if budget is None else parse(budget) if isinstance(budget, str) else budget
        self.blocks = members
        if isinstance(wanted, Pattern):
            wanted = wanted.resolve([_rows_of(block) for block in members])
        self.budget = wanted if isinstance(wanted, Budget) else Cardinality(wanted)  # type: ignore[arg-type]
        self.budget.check(self.n)
        self.objective = Objective.parse(objective)

    def __repr__(self) -> str:
        return (
            f"SelectionProblem(n={self.n}, {self._limit}, objective={self.objective.value!r}, "
            f"blocks={len(self.blocks)})"
        )

    @property
    def n_prune(self) -> int:
        """Number of weights that go; raises CapabilityError where the budget does not settle it."""
        count = self.budget.n_prune
        if count is None:
            raise CapabilityError(
                f"a {type(self.budget).__name__} budget does not settle how many weights go, so what counts on a "
                "number cannot be had under it"
            )
        return count

    @property
    def _limit(self) -> str:
        count = self.budget.n_prune
        return type(self.budget).__name__ if count is None else f"n_prune={count}"

    @property
    def measured(self) -> bool:
        """Whether every block has a curvature."""
        return all(block.curvature.measured for block in self.blocks)

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
        return np.asarray(self.tensors.diagonal.cpu().numpy())

    @cached_property
    def scale(self) -> float:
        """½ Σ H_ii w_i² + Σ |g_i w_i|: the size against which absolute tolerances are measured."""
        quadratic = 0.5 * float(self.diagonal @ self.weights**2)
        linear = 0.0 if self.gradient is None else float(np.abs(self.gradient * self.weights).sum())
        return quadratic + linear

    def multiply(self, x: Array) -> Array:
        """H x over all blocks, float64 (n,)."""
        return np.asarray(self.tensors.multiply(self.tensors.of(x)).cpu().numpy())

    @cached_property
    def tensors(self) -> ProblemTensors:
        """w, g, diagonal and products as float64 tensors on the blocks' device, for solvers of large problems."""
        return ProblemTensors(self.blocks)

    def arrays(self) -> ProblemArrays:
        """The whole problem as dense numpy float64 arrays (for small n)."""
        parts = [block.arrays() for block in self.blocks]
        return ProblemArrays(
            weights=self.weights,
            factor=scipy.linalg.block_diag(*[part.factor for part in parts]),
            damping=np.concatenate([part.damping for part in parts]),
            gradient=np.concatenate([part.gradient for part in parts]),
        )

    def with_n_prune(self, n_prune: int) -> SelectionProblem:
        """The same blocks (and what is cached on them), exactly `n_prune` weights to be removed."""
        return self.with_budget(Cardinality(n_prune))

    def with_budget(self, budget: Budget | Pattern | str) -> SelectionProblem:
        """The same blocks (and what is cached on them) under another budget."""
        return SelectionProblem(self.blocks, budget, self.objective)

    def with_objective(self, objective: Objective | str) -> SelectionProblem:
        """The same blocks and budget under the other objective."""
        return SelectionProblem(self.blocks, self.budget, objective)

    def without_gradient(self) -> SelectionProblem:
        """The same problem with g = 0."""
        return SelectionProblem([b.without_gradient() for b in self.blocks], self.budget, self.objective)

    def check_mask(self, pruned: npt.NDArray[Any]) -> Mask:
        """`pruned` as a bool mask of shape (n,) that the budget allows; raises ProblemError."""
        try:
            mask = np.asarray(pruned)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"a mask must be a numpy array of bool, not a {type(pruned).__name__}") from error
        if mask.dtype != np.bool_:
            raise ProblemError(f"a mask must be of dtype bool, not {mask.dtype}")
        if mask.shape != (self.n,):
            raise ProblemError(f"the mask has shape {mask.shape}, the problem {self.n} weights; they must match")
        violation = self.budget.violation(mask)
        if violation:
            raise ProblemError(f"the mask does not keep the budget: {violation}")
        return mask

    def change(self, weights: Array) -> float:
        """gᵀ(v − w) + ½ (v − w)ᵀH(v − w) of other weights v (n,), float64."""
        parts = zip(self.blocks, self.slices, strict=True)
        return sum(block.change(block.tensor_of(weights[where]) - block.weights) for block, where in parts)

    @plainly
    def selection_value(self, pruned: Mask) -> float:
        """CBS-S of a mask, float64; the mask may remove any number of weights."""
        total = 0.0
        for block, where in zip(self.blocks, self.slices, strict=True):
            mask = block.tensor_of(pruned[where])
            total += block.change(torch.where(mask, -block.weights, 0.0))
        return total

    @plainly
    def refit(self, pruned: Mask) -> Refit:
        """CBS-U of a mask that may remove any number of weights; raises ProblemError if it does not fit."""
        return refit(self, pruned)

    def joint_value(self, pruned: Mask) -> float:
        """CBS of a mask (objective after the combinatorial update), float64; −inf if unbounded."""
        return self.refit(pruned).value

    def value(self, pruned: Mask) -> float:
        """The problem's own objective for a mask."""
        return self.selection_value(pruned) if self.objective is Objective.SELECTION else self.joint_value(pruned)


def _rows_of(block: QuadraticBlock) -> tuple[int, int]:
    """(rows, weights of each) of a block; one row where its curvature knows none."""
    curvature = block.curvature
    return (curvature.n_rows, curvature.n_inputs) if isinstance(curvature, Kronecker) else (1, block.n)
