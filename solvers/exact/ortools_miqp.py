"""MathOpt with GSCIP (OR-Tools' build of SCIP) on the models of `solvers.exact.formulation`.

Each square gets its own epigraph, z_j² ≤ t_j, and each perspective its own rotated cone, p_i² ≤ s_i (1 − x_i); SCIP
outer-approximates them one by one. Where no diagonal can be split off H, an indicator x_i = 1 ⇒ p_i = 0 takes the
place of the perspective.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.budget import Bounded, Groups, Knapsack
from solvers.errors import BackendError
from solvers.exact.formulation import FEASIBILITY, Model, build
from solvers.problem import SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, ANYTIME, PROVING, RANKED, Context, Solver, option


@dataclass(frozen=True)
class OrtoolsMiqpSolver(Solver):
    """OR-Tools MathOpt, GSCIP."""

    name = "ortools_miqp"
    summary = "mixed-integer conic model in OR-Tools' SCIP"
    reference = "Bestuzheva et al., The SCIP Optimization Suite 8.0, 2021; Guenluek and Linderoth, Math. Program. 2010"
    capabilities = ANY_PROBLEM | ANYTIME | PROVING
    budgets = (*RANKED, Bounded, Groups, Knapsack)
    as_items = True
    apart = True
    max_weights = 1000
    requires = ("ortools",)

    isolated: bool = option(False, "run in a child process that is killed when it overstays the time limit")
    log: bool = option(False, "print the log of SCIP")

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The incumbent and safe bound of GSCIP."""
        if self.isolated:
            from solvers.exact.isolation import run_isolated

            return run_isolated(self, problem, context)
        model = build(problem, context)
        if model.settled or context.deadline.expired():
            return model.settle(context)
        return _solve(model, context, self.log)


def _solve(model: Model, context: Context, log: bool) -> Proposal:
    from ortools.math_opt.python import mathopt

    program = mathopt.Model(name="cbs")
    kept, start = _assemble(program, model)
    remaining = context.deadline.remaining()
    parameters = mathopt.SolveParameters(
        time_limit=None if math.isinf(remaining) else datetime.timedelta(seconds=remaining),
        relative_gap_tolerance=0.0,
        absolute_gap_tolerance=0.0,
        random_seed=context.seed % (2**31 - 1),
        threads=1,
        enable_output=log,
    )
    parameters.gscip.real_params["numerics/feastol"] = FEASIBILITY
    parameters.gscip.real_params["numerics/dualfeastol"] = FEASIBILITY
    # Beyond what SoPlex can do in double precision, and it says so on stderr every time.
    parameters.gscip.bool_params["constraints/nonlinear/tightenlpfeastol"] = False
    # The tangent planes of the many small cones need few rounds; more only slow the nodes down.
    parameters.gscip.int_params["separating/maxrounds"] = 2
    hints = mathopt.ModelSolveParameters(solution_hints=[mathopt.SolutionHint(variable_values=start)])
    try:
        result = mathopt.solve(program, mathopt.SolverType.GSCIP, params=parameters, model_params=hints)
    except Exception as error:
        # MathOpt's own error path may raise an unrelated AttributeError (google/or-tools #4606).
        raise BackendError(f"MathOpt/GSCIP failed: {type(error).__name__}: {error}") from error
    ended = result.termination.reason
    reasons = mathopt.TerminationReason
    if ended in (reasons.UNBOUNDED, reasons.INFEASIBLE_OR_UNBOUNDED, reasons.NUMERICAL_ERROR, reasons.OTHER_ERROR):
        raise BackendError(f"MathOpt/GSCIP ended with {ended.value}: {result.termination.detail or 'no detail'}")
    values = None
    if ended is not reasons.INFEASIBLE and result.has_primal_feasible_solution():
        found = result.variable_values()
        values = 1.0 - np.array([found[variable] for variable in kept])
    claimed = float(result.termination.objective_bounds.dual_bound)
    if ended is reasons.INFEASIBLE:
        raise BackendError(
            "MathOpt/GSCIP calls the model infeasible, but it always has a solution; the tolerances failed"
        )
    reason = Reason.COMPLETED if ended is reasons.OPTIMAL else Reason.TIME_LIMIT
    return model.proposal(values, claimed, reason, context, nodes=float(result.solve_stats.node_count))


def _assemble(program: Any, model: Model) -> tuple[list[Any], dict[Any, float]]:
    """Fill the MathOpt model; (the kept y = 1 − x, the incumbent as a hint).

    The binaries are y, not x, so that the cones have variables for factors.
    """
    kept = [program.add_binary_variable(name=f"y{i}") for i in range(model.free.size)]
    cost = [(variable, -float(c)) for variable, c in zip(kept, model.linear, strict=True)]
    hint = dict(zip(kept, (1.0 - model.start).tolist(), strict=True))
    for places, coefficients, low, high in model.rows:
        total = float(coefficients.sum())
        constraint = program.add_linear_constraint(lb=total - high, ub=total - low)
        for at, value in zip(places, coefficients, strict=True):
            constraint.set_coefficient(kept[at], float(value))
    changes = [program.add_variable(lb=-limit, ub=limit, name=f"p{i}") for i, limit in enumerate(model.change_limit)]
    position = {int(weight): at for at, weight in enumerate(model.free)}
    for i, change in enumerate(changes):
        at = position.get(i)
        curvature, limit = float(model.curvature[i]), float(model.change_limit[i])
        if at is not None and math.isfinite(limit):
            # A perspective alone lets p_i reach the square root of the tolerance where y_i = 0.
            program.add_linear_constraint(change - limit * kept[at] <= 0.0)
            program.add_linear_constraint(change + limit * kept[at] >= 0.0)
        elif at is not None:
            # Two inequalities: GSCIP rejects an equality, and MathOpt fails to say so.
            for implied in (change <= 0.0, change >= 0.0):
                program.add_indicator_constraint(indicator=kept[at], activate_on_zero=True, implied_constraint=implied)
        if curvature > 0:
            epigraph = program.add_variable(lb=0.0, ub=model.height, name=f"s{i}")
            cost.append((epigraph, 1.0))
            if at is None:
                program.add_quadratic_constraint(curvature * change * change - epigraph <= 0.0)
                continue
            # p² ≤ s·y as 4p² + (s − y)² ≤ (s + y)²: separating the product directly stalls short of the tolerance.
            total = program.add_variable(lb=0.0, ub=model.height + 1.0, name=f"a{i}")
            excess = program.add_variable(lb=-1.0, ub=model.height, name=f"b{i}")
            program.add_linear_constraint(total - epigraph - kept[at] == 0.0)
            program.add_linear_constraint(excess - epigraph + kept[at] == 0.0)
            program.add_quadratic_constraint(4.0 * curvature * change * change + excess * excess - total * total <= 0.0)
    all_removed = model.columns.sum(axis=1)
    for j in range(model.n_rows):
        z = program.add_variable(name=f"z{j}")
        t = program.add_variable(lb=0.0, ub=model.height, name=f"t{j}")
        cost.append((t, 1.0))
        row = program.add_linear_constraint(lb=-float(all_removed[j]), ub=-float(all_removed[j]))
        row.set_coefficient(z, -1.0)
        for variable, value in zip(kept, model.columns[j], strict=True):
            if value:
                row.set_coefficient(variable, -float(value))
        for variable, value in zip(changes, model.changes[j], strict=False):
            if value:
                row.set_coefficient(variable, float(value))
        program.add_quadratic_constraint(z * z - t <= 0.0)
    program.minimize(sum(c * variable for variable, c in cost if c) + float(model.linear.sum()))
    return kept, hint
