"""Kinds of curvature: the matrix H of a block, one file per kind behind one interface (`solvers.curvature.base`)."""

from __future__ import annotations

from solvers.curvature.base import Curvature
from solvers.curvature.dense import Dense
from solvers.curvature.diagonal import Diagonal
from solvers.curvature.kronecker import Kronecker
from solvers.curvature.low_rank import LowRank
from solvers.curvature.restricted import Restricted, Solved
from solvers.curvature.unmeasured import Unmeasured

__all__ = ["Curvature", "Dense", "Diagonal", "Kronecker", "LowRank", "Restricted", "Solved", "Unmeasured"]
