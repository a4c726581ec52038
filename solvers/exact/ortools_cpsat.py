"""CP-SAT on the selection objective in integers.

With Q = H∘(wwᵀ) and Boolean x_i (removed), y_ij = x_i ∧ x_j,

    minimise  Σ_{i<j} ⟦s Q_ij⟧ y_ij + Σ_i ⟦s (½ Q_ii − g_i w_i)⟧ x_i     subject to Σ x = n_prune,

⟦·⟧ rounding to the nearest integer, plus the products of the cardinality row with each x_i,
Σ_j y_ij = (n_prune − 1) x_i (Adams & Sherali, 1986); of a partition, each group has such rows, a limit on costs is a
row in integers that loses no mask. A mask selects n_prune
single and n_prune (n_prune − 1)/2 paired coefficients, so the integer objective is off by at most E, the sum of that
many largest rounding errors; the bound is (claimed − E)/s, less the rounding of Q itself. Tangent planes of the convex
objective are added as rows, without which the root bound is worthless.
The joint objective has no such form: its value is not a sum over pairs of removed weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.budget import Bounded, Knapsack
from solvers.errors import BackendError
from solvers.exact.formulation import Model, Row, build
from solvers.problem import Array, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANYTIME, PROVING, RANKED, SELECTION_PROBLEM, Context, Solver, option

#: The absolute values of all coefficients sum to less than this, far from the 64-bit overflow.
_LARGEST_SUM = 2.0**52
#: Rounding error aimed at, relative to the incumbent.
_ACCURACY = 1e-7
#: Frank–Wolfe steps, and how many of the last ones give a tangent plane.
_WALK = 400
_TANGENTS = 20


@dataclass(frozen=True)
class OrtoolsCpSatSolver(Solver):
    """OR-Tools CP-SAT."""

    name = "ortools_cpsat"
    summary = "linearised integer model in CP-SAT (selection objective only)"
    reference = "Perron and Furnon, OR-Tools 9.15; Adams and Sherali, Management Science 1986"
    capabilities = SELECTION_PROBLEM | ANYTIME | PROVING
    budgets = (*RANKED, Bounded, Knapsack)
    apart = True
    max_weights = 300
    requires = ("ortools",)

    workers: int = option(1, "threads of the portfolio; interleaved, so that results stay deterministic", minimum=1)
    isolated: bool = option(False, "run in a child process that is killed when it overstays the time limit")
    log: bool = option(False, "print the log of CP-SAT")

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """The incumbent of CP-SAT and its bound, less the scaling error."""
        if self.isolated:
            from solvers.exact.isolation import run_isolated

            return run_isolated(self, problem, context)
        model = build(problem, context)
        if model.settled or context.deadline.expired():
            return model.settle(context)
        return self._solve(problem, model, context)

    def _solve(self, problem: SelectionProblem, model: Model, context: Context) -> Proposal:
        from ortools.sat.python import cp_model

        arrays = problem.arrays()
        values = arrays.hessian * np.outer(arrays.weights, arrays.weights)
        pairs = values[np.ix_(model.free, model.free)]
        single = 0.5 * np.diag(pairs) - (arrays.gradient * arrays.weights)[model.free]
        above = np.triu_indices(model.free.size, 1)
        paired = pairs[above]
        scale = _scale(single, paired, model.most, model)
        rounded_single, rounded_paired = np.rint(single * scale), np.rint(paired * scale)
        error = _worst(single * scale - rounded_single, model.most)
        error += _worst(paired * scale - rounded_paired, model.most * (model.most - 1) // 2)

        # An entry of Q is off by a few units in the last place of √Q_ii √Q_jj; what must stay does not count.
        roots = np.sort(np.sqrt(np.diag(pairs)))[-model.most :]
        slopes = np.sort(np.abs((arrays.gradient * arrays.weights)[model.free]))[-model.most :]
        rounding = 16 * float(np.finfo(float).eps) * float(roots.sum() ** 2 + slopes.sum())
        program = cp_model.CpModel()
        x = [program.new_bool_var(f"x{i}") for i in range(model.free.size)]
        terms: list[dict[int, Any]] = [{} for _ in x]
        both = []
        for i, j in zip(above[0].tolist(), above[1].tolist(), strict=True):
            y = program.new_bool_var(f"y{i}_{j}")
            program.add_implication(y, x[i])
            program.add_implication(y, x[j])
            program.add_bool_or(y, x[i].negated(), x[j].negated())
            terms[i][j] = terms[j][i] = y
            both.append(y)
        for row in model.rows:
            members = row.places.tolist()
            if not _counts(row):
                _limit(program, x, row)
                continue
            count = int(row.low)
            program.add(sum(x[at] for at in members) == count)
            for at, variable in enumerate(x):
                own = int(at in members)
                program.add(sum(terms[at][other] for other in members if other != at) == (count - own) * variable)
        cost = cp_model.LinearExpr.weighted_sum(
            [*x, *both], [int(c) for c in rounded_single] + [int(c) for c in rounded_paired]
        )
        program.minimize(cost)
        for slope, level in _tangents(pairs, single, model):
            # Rounded down, less the errors of both sides: valid for every mask.
            whole = np.floor(slope * scale)
            floor = math.floor((level - rounding) * scale - error - 2.0)
            program.add(cost >= cp_model.LinearExpr.weighted_sum(x, [int(c) for c in whole]) + floor)
        start = model.start.astype(bool)
        for variable, value in zip(x, start, strict=True):
            program.add_hint(variable, bool(value))
        for y, value in zip(both, (start[above[0]] & start[above[1]]), strict=True):
            program.add_hint(y, bool(value))

        engine = cp_model.CpSolver()
        engine.parameters.num_workers = self.workers
        engine.parameters.interleave_search = self.workers > 1
        engine.parameters.random_seed = context.seed % (2**31 - 1)
        engine.parameters.log_search_progress = self.log
        remaining = context.deadline.remaining()
        if math.isfinite(remaining):
            engine.parameters.max_time_in_seconds = max(remaining, 1e-3)
        status = engine.solve(program)
        if status in (cp_model.MODEL_INVALID, cp_model.INFEASIBLE):
            raise BackendError(
                f"CP-SAT calls the model {engine.status_name(status)}, but it always has a solution: "
                f"{program.validate()}"
            )
        found = None
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            found = np.array([engine.boolean_value(variable) for variable in x], dtype=np.float64)
        bound = (engine.best_objective_bound - error - 1e-9) / scale - rounding
        mask, value = model.better(found)
        # Before the first bound CP-SAT reports the least value of the objective's own range, which is valid but weak.
        bound = max(float(bound), model.least) if math.isfinite(bound) else model.least
        bound = min(bound, value)
        context.record(value, bound)
        reason = Reason.COMPLETED if status == cp_model.OPTIMAL else Reason.TIME_LIMIT
        statistics = {"branches": float(engine.num_branches)}
        return Proposal(mask, bound=bound, reason=reason, statistics=statistics)


def _counts(row: Row) -> bool:
    """Whether a row says how many of its weights go."""
    return row.low == row.high and bool((row.coefficients == 1.0).all())


def _limit(program: Any, x: list[Any], row: Row) -> None:
    """A row in integers; costs that are none are rounded so that no mask is lost."""
    scale = 1.0
    total = float(np.abs(row.coefficients).sum())
    if (row.coefficients != np.rint(row.coefficients)).any() or total > 2.0**40:
        scale = 2.0**40 / max(total, 1e-300)
    scaled = row.coefficients * scale
    up, down = np.ceil(scaled), np.floor(scaled)
    chosen = [x[at] for at in row.places]
    if math.isfinite(row.low):
        program.add(sum(int(c) * v for c, v in zip(up, chosen, strict=True)) >= math.ceil(row.low * scale - 1e-3))
    if math.isfinite(row.high):
        program.add(sum(int(c) * v for c, v in zip(down, chosen, strict=True)) <= math.floor(row.high * scale + 1e-3))


def _tangents(pairs: Array, single: Array, model: Model) -> list[tuple[Array, float]]:
    """(slope (f,), level) with slope·x + level ≤ the objective of every mask x: where convexity is seen by the LP.

    The objective is rewritten with the largest shift of the diagonal of Q that leaves it convex (x² = x), and
    linearised at the later iterates of a Frank–Wolfe walk over the relaxed masks.
    """
    norms = np.sqrt(np.diag(pairs))
    active = norms > 0
    shift = np.zeros(single.size)
    if active.any():
        scaled = pairs[np.ix_(active, active)] / np.outer(norms[active], norms[active])
        share = float(np.linalg.eigvalsh(scaled)[0]) - 8 * single.size * float(np.finfo(float).eps)
        shift[active] = max(share, 0.0) * norms[active] ** 2
    convex = pairs - np.diag(shift)
    linear = single - 0.5 * np.diag(convex)
    x = model.start
    found = []
    for step in range(_WALK):
        image = convex @ x
        slope = image + linear
        if step >= _WALK - _TANGENTS:
            found.append((slope, -0.5 * float(x @ image)))
        vertex = model.vertex(slope).astype(np.float64)
        direction = vertex - x
        curvature = float(direction @ convex @ direction)
        gain = -float(slope @ direction)
        if gain <= 0.0:
            return [*found, (slope, -0.5 * float(x @ image))]
        x = x + min(1.0, gain / curvature if curvature > 0.0 else 1.0) * direction
    return found


def _scale(single: Array, paired: Array, n_prune: int, model: Model) -> float:
    """Integer units per unit of the objective: accurate to 1e-7 of the incumbent unless that would overflow."""
    total = float(np.abs(single).sum() + np.abs(paired).sum())
    if total == 0.0:
        return 1.0
    wanted = 0.25 * n_prune * (n_prune + 1) / (_ACCURACY / model.scale)
    return min(wanted, _LARGEST_SUM / total)


def _worst(errors: Array, count: int) -> float:
    """The sum of the `count` largest absolute errors."""
    magnitudes = np.sort(np.abs(errors))[::-1]
    return float(magnitudes[:count].sum())
