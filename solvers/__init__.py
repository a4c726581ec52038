"""Choosing which weights to remove, as a combinatorial optimisation problem with interchangeable solvers.

import solvers
problem = solvers.load_problem("block.npz", n_prune=20, objective="joint")
solution = solvers.solve(problem, "branch_bound", time_limit=60.0)
print(solution.objective, solution.bound, solution.status)
"""

from __future__ import annotations

from solvers.block import QuadraticBlock
from solvers.bounds import Bound, bound
from solvers.budget import NM, Bounded, Budget, Cardinality, Groups, Knapsack, Partitioned, Tiles
from solvers.curvature import Curvature, Dense, Diagonal, Kronecker, LowRank
from solvers.errors import (
    BackendError,
    CapabilityError,
    CBSError,
    OptionError,
    ProblemError,
    SingularHessianError,
    UnknownNameError,
)
from solvers.formats import export_problem
from solvers.instances import Instance, available_instances, load_instance
from solvers.problem import Objective, ProblemArrays, SelectionProblem
from solvers.refit import Refit
from solvers.registry import available_solvers, describe, make_solver
from solvers.solution import Proposal, Reason, Solution, Status, TracePoint
from solvers.solver import Capability, Context, Deadline, Need, Solver, option
from solvers.solving import solve
from solvers.storage import load_block, load_problem, save_block

__all__ = [
    "NM",
    "BackendError",
    "Bound",
    "Bounded",
    "Budget",
    "CBSError",
    "Capability",
    "CapabilityError",
    "Cardinality",
    "Context",
    "Curvature",
    "Deadline",
    "Dense",
    "Diagonal",
    "Groups",
    "Instance",
    "Knapsack",
    "Kronecker",
    "LowRank",
    "Need",
    "Objective",
    "OptionError",
    "Partitioned",
    "ProblemArrays",
    "ProblemError",
    "Proposal",
    "QuadraticBlock",
    "Reason",
    "Refit",
    "SelectionProblem",
    "SingularHessianError",
    "Solution",
    "Solver",
    "Status",
    "Tiles",
    "TracePoint",
    "UnknownNameError",
    "available_instances",
    "available_solvers",
    "bound",
    "describe",
    "export_problem",
    "load_block",
    "load_instance",
    "load_problem",
    "make_solver",
    "option",
    "save_block",
    "solve",
]
