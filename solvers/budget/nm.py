"""N:M sparsity: of every m consecutive weights of a row n stay, which hardware can use.

A partition into groups of m, each of which loses m − n (Mishra et al., *Accelerating Sparse Deep Neural Networks*,
2021), so whatever keeps `Partitioned` keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solvers.arguments import integer
from solvers.budget.partitioned import Partitioned
from solvers.budget.pattern import Pattern
from solvers.errors import ProblemError


@dataclass(frozen=True)
class NM(Pattern):
    """n of every m weights along the inputs stay.

    Attributes
    ----------
    n, m : int, 0 ≤ n ≤ m, m ≥ 1
    inputs : int, optional
        Weights of a row of a layer; otherwise what the curvature knows (`Kronecker`), else a block is one row.
    dense_tail : bool
        Whether what is left of a row that m does not divide stays whole; otherwise it is refused.

    Raises
    ------
    ProblemError
        If the numbers make no sense.
    """

    n: int
    m: int
    inputs: int | None = None
    dense_tail: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "m", integer("m of n:m", self.m, 1, error=ProblemError))
        object.__setattr__(self, "n", integer("n of n:m", self.n, 0, self.m, error=ProblemError))
        if self.inputs is not None:
            object.__setattr__(self, "inputs", integer("inputs of n:m", self.inputs, 1, error=ProblemError))

    @property
    def kept(self) -> float:
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def resolve(self, rows: Sequence[tuple[int, int]]) -> Partitioned:
        """The groups; raises ProblemError if m does not divide a row, or the row length a block."""
        sizes, counts = [], []
        for block, (count, length) in enumerate(rows):
            inputs = length if self.inputs is None else self.inputs
            if (count * length) % inputs:
                raise ProblemError(f"block {block} has {count * length} weights, which rows of {inputs} do not divide")
            whole, tail = divmod(inputs, self.m)
            if tail and not self.dense_tail:
                raise ProblemError(
                    f"{self.n}:{self.m} does not fit rows of {inputs} weights (block {block}): {tail} are left over; "
                    "NM(..., dense_tail=True) keeps those"
                )
            repeated = count * length // inputs
            sizes.append(np.tile([self.m] * whole + [tail] * (tail > 0), repeated))
            counts.append(np.tile([self.m - self.n] * whole + [0] * (tail > 0), repeated))
        return Partitioned(np.concatenate(sizes), np.concatenate(counts))
