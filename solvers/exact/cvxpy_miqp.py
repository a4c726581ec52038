"""CVXPY on the models of `solvers.exact.formulation`: SCIP, or Gurobi, MOSEK and CPLEX where they are installed.

CVXPY's status words are not trusted: it calls a time limit ``optimal_inaccurate``. What is read is the solver's own
dual bound: of SCIP and Gurobi from the model object that CVXPY hands back, of MOSEK and CPLEX, which hand nothing back,
only from a proof of optimality at a relative gap of 1e-9 (on a time limit they have no bound).

CVXPY hands a model to SCIP in time quadratic in its size (10 s for 200 weights, joint), during which no limit is kept.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.budget import Bounded, Groups, Knapsack
from solvers.errors import BackendError, SingularHessianError
from solvers.exact.formulation import FEASIBILITY, Model, build
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, ANYTIME, PROVING, RANKED, Context, Solver, option

#: Solver → (module it needs, name CVXPY knows it by).
_ENGINES = {
    "scip": ("pyscipopt", "SCIP"),
    "gurobi": ("gurobipy", "GUROBI"),
    "mosek": ("mosek", "MOSEK"),
    "cplex": ("cplex", "CPLEX"),
}
_GAP = 1e-9


@dataclass(frozen=True)
class CvxpyMiqpSolver(Solver):
    """Any mixed-integer conic solver that CVXPY can drive."""

    name = "cvxpy_miqp"
    summary = "mixed-integer conic model through CVXPY: SCIP, or a commercial solver where installed"
    reference = "Diamond and Boyd, CVXPY, JMLR 2016; Guenluek and Linderoth, Math. Program. 2010"
    capabilities = ANY_PROBLEM | ANYTIME | PROVING
    budgets = (*RANKED, Bounded, Groups, Knapsack)
    as_items = True
    apart = True
    max_weights = 200
    requires = ("cvxpy",)

    solver: str = option("scip", "engine behind CVXPY", choices=tuple(_ENGINES))
    isolated: bool = option(False, "run in a child process that is killed when it overstays the time limit")
    log: bool = option(False, "print the log of the engine")

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The incumbent and safe bound of the engine."""
        module, _ = _ENGINES[self.solver]
        if importlib.util.find_spec(module) is None:
            raise BackendError(f"solver {self.spec!r} needs {module}, which is not installed; pip install {module}")
        if self.isolated:
            from solvers.exact.isolation import run_isolated

            return run_isolated(self, problem, context)
        model = build(problem, context)
        if model.settled or context.deadline.expired():
            return model.settle(context)
        if model.joint and not np.isfinite(model.change_limit[model.free]).all():
            raise SingularHessianError(
                "cvxpy_miqp needs a non-singular H for the joint objective (CVXPY has no indicator constraints); "
                "use ortools_miqp, or a larger damping"
            )
        return self._solve(model, context)

    def _solve(self, model: Model, context: Context) -> Proposal:
        import cvxpy

        kept = cvxpy.Variable(model.free.size, boolean=True)
        program = cvxpy.Problem(*_assemble(cvxpy, model, kept))
        remaining = context.deadline.remaining()
        options = _parameters(self.solver, remaining, context.seed)
        try:
            with warnings.catch_warnings():
                # "Solution may be inaccurate" is how CVXPY reports a time limit; the bound says it better.
                warnings.filterwarnings("ignore", message="Solution may be inaccurate")
                program.solve(  # type: ignore[no-untyped-call]
                    solver=_ENGINES[self.solver][1], verbose=self.log, **options
                )
        except cvxpy.error.SolverError:
            # Raised, too, when a limit was hit before a solution was found: the incumbent then stands.
            if context.deadline.expired():
                return model.proposal(None, -math.inf, Reason.TIME_LIMIT, context)
            raise
        if program.status in ("infeasible", "unbounded", "infeasible_or_unbounded"):
            raise BackendError(
                f"CVXPY/{self.solver} calls the model {program.status}, but it always has a solution; "
                "the tolerances failed"
            )
        claimed, complete, nodes = _dual_bound(self.solver, program)
        values = None if kept.value is None else 1.0 - kept.value
        reason = Reason.COMPLETED if complete else Reason.TIME_LIMIT
        return model.proposal(values, claimed, reason, context, nodes=nodes)


def _assemble(cvxpy: Any, model: Model, kept: Any) -> tuple[Any, list[Any]]:
    """(objective, constraints). No constant in the objective, so that the engine's bound is ours."""
    epigraph = cvxpy.Variable(model.n_rows, bounds=[0.0, model.height])
    removed = 1 - kept
    image = model.columns @ removed
    constraints = []
    for places, coefficients, low, high in model.rows:
        if places.size:
            value = coefficients @ removed[places]
            constraints += [value == low] if low == high else []
            constraints += [value >= low] if low < high and math.isfinite(low) else []
            constraints += [value <= high] if low < high and math.isfinite(high) else []
    cost = cvxpy.sum(epigraph)
    if model.linear.any():
        linear = cvxpy.Variable()
        constraints.append(linear == model.linear @ removed)
        cost = cost + linear
    if model.joint:
        change = cvxpy.Variable(model.problem.n, bounds=[-model.change_limit, model.change_limit])
        image = image + model.changes @ change
        limit = model.change_limit[model.free]
        moving = change[model.free]
        constraints += [moving <= cvxpy.multiply(limit, kept), moving >= -cvxpy.multiply(limit, kept)]
        always = np.setdiff1d(np.arange(model.problem.n), model.free)
        curved = np.flatnonzero(model.curvature[model.free] > 0)
        if curved.size:
            perspective = cvxpy.Variable(curved.size, bounds=[0.0, model.height])
            # p² ≤ s·y as ‖(2p, y − s)‖ ≤ y + s, all at once: one by one, CVXPY takes minutes for 400 weights.
            bent = cvxpy.multiply(2.0 * np.sqrt(model.curvature[model.free[curved]]), moving[curved])
            inside = cvxpy.vstack([bent, kept[curved] - perspective])
            constraints.append(cvxpy.SOC(kept[curved] + perspective, inside, axis=0))
            cost = cost + cvxpy.sum(perspective)
        if always.size and model.curvature[always].any():
            square = cvxpy.Variable(always.size)
            constraints.append(cvxpy.square(cvxpy.multiply(np.sqrt(model.curvature[always]), change[always])) <= square)
            cost = cost + cvxpy.sum(square)
    constraints.append(cvxpy.square(image) <= epigraph)
    return cvxpy.Minimize(cost), constraints


def _parameters(solver: str, seconds: float, seed: int) -> dict[str, Any]:
    """Tolerances, limit and seed in the engine's own words."""
    limited = math.isfinite(seconds)
    if solver == "scip":
        parameters: dict[str, Any] = {
            "numerics/feastol": FEASIBILITY,
            "numerics/dualfeastol": FEASIBILITY,
            "limits/gap": 0.0,
            "limits/absgap": 0.0,
            "separating/maxrounds": 2,
            "constraints/nonlinear/tightenlpfeastol": False,
            "randomization/randomseedshift": seed % 2**31,
        }
        if limited:
            parameters["limits/time"] = seconds
        return {"scip_params": parameters}
    if solver == "gurobi":
        parameters = {"FeasibilityTol": 1e-9, "IntFeasTol": 1e-9, "MIPGap": _GAP, "MIPGapAbs": 0.0, "Threads": 1}
        parameters["Seed"] = seed % 2_000_000_000
        return parameters | ({"TimeLimit": seconds} if limited else {})
    if solver == "mosek":
        parameters = {"MSK_DPAR_MIO_TOL_REL_GAP": _GAP, "MSK_DPAR_MIO_TOL_ABS_GAP": 0.0}
        return {"mosek_params": parameters | ({"MSK_DPAR_MIO_MAX_TIME": seconds} if limited else {})}
    parameters = {"mip.tolerances.mipgap": _GAP, "mip.tolerances.integrality": 1e-9, "threads": 1}
    return {"cplex_params": parameters | ({"timelimit": seconds} if limited else {})}


def _dual_bound(solver: str, program: Any) -> tuple[float, bool, float]:
    """(dual bound in solver units, whether the search was completed, nodes)."""
    extra = program.solver_stats.extra_stats
    if solver == "scip":
        engine = extra["model"]
        status = engine.getStatus()
        if status not in ("optimal", "timelimit", "gaplimit"):
            raise BackendError(f"CVXPY/SCIP ended with {status!r}")
        bound = float(engine.getDualbound())
        if abs(bound) >= engine.infinity():
            bound = -math.inf
        return bound, status == "optimal", float(engine.getNTotalNodes())
    if solver == "gurobi":
        return float(extra.ObjBound), int(extra.Status) == 2, float(extra.NodeCount)
    if program.status == "optimal":
        return float(program.value) - _GAP * abs(float(program.value)), True, math.nan
    return -math.inf, False, math.nan
