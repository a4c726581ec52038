"""What a run is asked to do, checked as a whole before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cbs_opt import BlockSpec, Update
from experiments.networks.experiment import Experiment
from solvers import Objective, make_solver
from solvers.allocation import ALLOCATIONS
from solvers.bounds import METHODS
from solvers.errors import OptionError, UnknownNameError


class Rounding(str, Enum):
    """How a sparsity becomes a number of weights."""

    EXACT = "exact"
    """n_kept = int(n (1 − sparsity))."""
    PUBLISHED = "published"
    """As many as the published CBS code keeps, see `published_kept`."""

    def n_kept(self, n: int, sparsity: float) -> int:
        """Weights which stay of ``n``."""
        return published_kept(n, sparsity) if self is Rounding.PUBLISHED else int(n * (1.0 - sparsity))


def published_kept(n_weights: int, sparsity: float) -> int:
    """How many weights the published CBS code really keeps.

    It permutes the weights, cuts them into chunks of ``c = ceil(n / min(floor(sqrt n), 1000))``, and keeps
    ``ceil(c (1 − sparsity))`` of each full chunk: 3,382 instead of 3,235 of MLPNet's 32,360 at 90 %, and 712 instead
    of 647 at 98 %.
    """
    chunk = -(-n_weights // min(int(n_weights**0.5), 1000))
    # The subtraction is exact to 1e-16; a product which should be whole must not be rounded up.
    per_chunk = -int(-(chunk * (1.0 - sparsity) - 1e-9) // 1)
    return min(n_weights, (n_weights // chunk) * per_chunk)


@dataclass(frozen=True)
class RunOptions:
    """A run: every combination of solver, sparsity, seed and update, the rest in common.

    Raises
    ------
    OptionError, UnknownNameError, BackendError
        From the constructor, for the first value which cannot work.
    """

    experiment: Experiment
    solvers: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    updates: tuple[str, ...]
    fisher_samples: int
    fisher_batch: int
    damping: float
    blocks: str
    objective: str | None
    update_scale: float
    first_order: bool
    stages: int
    rounding: Rounding
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    allocation: str | None
    time_limit: float | None
    bound: str | None
    data_dir: Path | None
    checkpoint: Path | None
    refit: bool
    overwrite: bool
    reference: bool

    def __post_init__(self) -> None:
        for what, values in (
            ("--solver", self.solvers),
            ("--sparsity", self.sparsities),
            ("--seed", self.seeds),
            ("--update", self.updates),
        ):
            if not values:
                raise OptionError(f"{what} needs at least one value")
            twice = {v for v in values if values.count(v) > 1}
            if twice:
                raise OptionError(f"{what} names {next(iter(twice))!r} twice")
        for solver in self.solvers:
            make_solver(solver)
        for sparsity in self.sparsities:
            if not 0.0 <= sparsity < 1.0:
                hint = f"; write {sparsity / 100:g} for {sparsity:g} %" if 1.0 < sparsity < 100.0 else ""
                raise OptionError(f"--sparsity must lie in [0, 1), got {sparsity!r}{hint}")
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise OptionError(f"--seed must be a whole number from 0 to 2^63 - 1, got {seed}")
        for update in self.updates:
            Update.parse(update)
        if self.objective is not None:
            Objective.parse(self.objective)
        if self.bound is not None and self.bound not in METHODS:
            raise UnknownNameError.of("bound", self.bound, METHODS)
        if self.bound is not None and self.stages > 1:
            raise OptionError("--bound judges one problem, and stages solve a new one each; leave one of them out")
        BlockSpec.parse(self.blocks)
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise UnknownNameError.of("allocation", self.allocation, ALLOCATIONS)
        for what, value in (
            ("--fisher-samples", self.fisher_samples),
            ("--fisher-batch", self.fisher_batch),
            ("--stages", self.stages),
        ):
            if value < 1:
                raise OptionError(f"{what} must be at least 1, got {value}")
        if not (math.isfinite(self.damping) and self.damping >= 0.0):
            raise OptionError(f"--damping must be finite and not negative, got {self.damping!r}")
        if not (math.isfinite(self.update_scale) and self.update_scale >= 0.0):
            raise OptionError(f"--update-scale must be finite and not negative, got {self.update_scale!r}")
        if self.time_limit is not None and not (math.isfinite(self.time_limit) and self.time_limit > 0.0):
            raise OptionError(f"--time-limit must be a positive number of seconds, got {self.time_limit!r}")

        if self.stages > 1:
            self._check_stages()

    def _check_stages(self) -> None:
        """Stages search damping and length of the combinatorial update themselves."""
        if self.updates != (Update.COMBINATORIAL.value,):
            raise OptionError(f"--stages {self.stages} goes with --update combinatorial only, got {self.updates}")
        if self.update_scale != 1.0:
            raise OptionError(f"--stages {self.stages} searches the update's length itself; leave --update-scale out")
        if self.time_limit is not None:
            raise OptionError(f"--stages {self.stages} keeps no time limit; leave --time-limit out")
        if self.damping == 0.0:
            raise OptionError(f"--stages {self.stages} needs a positive --damping to start from")

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return len(self.solvers) * len(self.sparsities) * len(self.seeds) * len(self.updates)
