"""Kinds of budget: which weights may be removed, one file per kind behind one interface (`solvers.budget.base`)."""

from __future__ import annotations

from solvers.budget.base import Budget
from solvers.budget.bounded import Bounded
from solvers.budget.cardinality import Cardinality
from solvers.budget.groups import Groups, Tiles
from solvers.budget.knapsack import Knapsack
from solvers.budget.linear import LinearRows
from solvers.budget.nm import NM
from solvers.budget.partitioned import GroupReach, Partitioned, as_partition, places
from solvers.budget.pattern import Pattern, Sparsity
from solvers.budget.text import parse

__all__ = [
    "NM",
    "Bounded",
    "Budget",
    "Cardinality",
    "GroupReach",
    "Groups",
    "Knapsack",
    "LinearRows",
    "Partitioned",
    "Pattern",
    "Sparsity",
    "Tiles",
    "as_partition",
    "parse",
    "places",
]
