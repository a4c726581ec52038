"""Kinds of budget: which weights may be removed, one file per kind behind one interface (`solvers.budget.base`)."""

from __future__ import annotations

from solvers.budget.base import Budget
from solvers.budget.cardinality import Cardinality
from solvers.budget.partitioned import Partitioned

__all__ = ["Budget", "Cardinality", "Partitioned"]
