"""How each network is pruned in stages for the tables: one nested path per seed, most sparse last.

A network on its way to 98 % passes 90 %. So one path of stages per seed gives the whole table: it stops at each
sparsity of the table for some polishing stages, the state at the end of which is the table's entry, and goes on from
there. All settings were chosen on held-out training images.
"""

from __future__ import annotations

from dataclasses import dataclass

from cbs_opt import FisherOptions, StageOptions
from experiments.catalog.cifarnet import CIFARNET
from experiments.catalog.mlpnet import MLPNET
from experiments.catalog.resnet20 import RESNET20
from solvers.errors import UnknownNameError


@dataclass(frozen=True)
class Phase:
    """Some stages with the same options.

    Attributes
    ----------
    levels
        (sparsity, stages at it): the first of these stages removes weights, the others polish.
    regrow
        As in `cbs_opt.StageOptions`.
    n_rows
        Rows per stage, instead of the plan's.
    """

    levels: tuple[tuple[float, int], ...]
    regrow: float = 0.0
    n_rows: int | None = None

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsity after each stage."""
        return tuple(level for level, count in self.levels for _ in range(count))


@dataclass(frozen=True)
class Plan:
    """Settings of a table.

    Attributes
    ----------
    experiment, solver
        Names.
    fisher, stages
        Options of every stage; levels and regrowth come from the phases.
    phases
        One after the other.
    reported
        Sparsities of the table.
    augment
        Whether training images are cropped and flipped at random.
    bfloat16
        Whether the network runs in bfloat16 for gradients and held-out losses (never for the reported accuracy).
    """

    experiment: str
    solver: str
    fisher: FisherOptions
    stages: StageOptions
    phases: tuple[Phase, ...]
    reported: tuple[float, ...]
    augment: bool = False
    bfloat16: bool = False


# Swaps pay where few weights are left; before that they only cost time.
_MLPNET = Plan(
    experiment="mlpnet-mnist",
    solver="obs[chunks=2,pool=0]",
    fisher=MLPNET.staged.fisher,
    stages=MLPNET.staged.options,
    phases=(
        Phase(((0.5, 6), (0.6, 3), (0.7, 3), (0.8, 3), (0.85, 2))),
        Phase(
            (
                (0.9, 5),
                (0.92, 1),
                (0.935, 1),
                (0.95, 6),
                (0.96, 2),
                (0.967, 1),
                (0.975, 1),
                (0.98, 14),
                (0.984, 2),
                (0.987, 2),
                (0.99, 14),
            ),
            regrow=0.3,
        ),
    ),
    reported=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
)

_RESNET20 = Plan(
    experiment="resnet20-cifar10",
    solver="obs[chunks=2,pool=0]",
    fisher=RESNET20.staged.fisher,
    stages=RESNET20.staged.options,
    phases=(
        Phase(((0.3, 2), (0.4, 3), (0.5, 4), (0.6, 4), (0.65, 1))),
        Phase(
            (
                (0.675, 1),
                (0.7, 8),
                (0.73, 1),
                (0.76, 1),
                (0.78, 1),
                (0.8, 12),
                (0.82, 1),
                (0.84, 1),
                (0.86, 1),
                (0.88, 2),
                (0.9, 10),
            )
        ),
    ),
    reported=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    augment=True,
    bfloat16=True,
)

_CIFARNET = Plan(
    experiment="cifarnet-cifar10",
    solver="obs[chunks=2,pool=0]",
    fisher=CIFARNET.staged.fisher,
    stages=CIFARNET.staged.options,
    phases=(
        Phase(
            (
                (0.3, 2),
                (0.4, 2),
                (0.5, 3),
                (0.6, 3),
                (0.65, 1),
                (0.7, 3),
                (0.75, 1),
                (0.8, 6),
                (0.82, 1),
                (0.84, 1),
                (0.86, 1),
                (0.88, 2),
                (0.9, 8),
            )
        ),
    ),
    reported=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    augment=True,
    bfloat16=True,
)

PLANS = {plan.experiment: plan for plan in (_MLPNET, _RESNET20, _CIFARNET)}


def get_plan(name: str) -> Plan:
    """The plan of an experiment; raises UnknownNameError."""
    try:
        return PLANS[name]
    except KeyError:
        raise UnknownNameError.of("table", name, PLANS) from None
