"""The two models, written once; every MIQP backend translates this and nothing else.

With H d₀ = −g, c = w + d₀ (for the joint objective; c = w and a linear term for the selection objective), x_i = 1
where weight i is removed, and a splitting H = H₀ + D, D = diag(d) ≥ 0, H₀ = B₀ᵀB₀ ⪰ 0:

* selection   min ½‖z‖² + ½ Σ d_i w_i² x_i − Σ g_i w_i x_i,          z = −B₀ (w∘x)
* joint       min ½‖z‖² + ½ Σ d_i (s_i + c_i² x_i) − ½ d₀ᵀH d₀,      z = B₀ (p − c∘x),  p_i² ≤ s_i (1 − x_i)

both with Σ x = n_prune, or with the linear rows of any other budget (`solvers.budget.linear`), where weights of one
group go together: x_i = x_j. p = v − c on the kept weights and 0 on the removed ones, so the joint model
is the selection model plus a change of the kept weights, and every term is non-negative. Three
things make these models tractable:

* the factored z instead of xᵀQx: outer approximation then cuts in few dimensions, one term z_j² ≤ t_j each;
* the diagonal part is exact on binaries (x² = x), and in the joint model a perspective (Günlük & Linderoth, 2010) that
  forbids p_i ≠ 0 on removed weights without any big-M;
* removing weight i costs at least ½ c_i² / (H⁻¹)_ii whatever else is done (joint ≤ selection), so weights for which
  this exceeds an incumbent are fixed as kept, and |p_i| ≤ sqrt(2 U (H⁻¹)_ii) is a valid bound.

Values are scaled so that the incumbent is `TARGET` before they reach a solver, which makes its absolute
tolerances relative ones. See `Model.safe_bound` for what is subtracted from a claimed bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy

from solvers.errors import BackendError
from solvers.exact.completion import Completed, complete_square, hessian_root
from solvers.exact.incumbent import local_optimum
from solvers.exact.joint_square import Square, prepare
from solvers.exact.splitting import optimal_diagonal
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import RANKED, Context, Deadline

#: The incumbent's value in the units the solvers see.
TARGET = 1.0
#: Feasibility and integrality tolerance asked of the solvers.
FEASIBILITY = 1e-9

Ints = npt.NDArray[np.int64]


class Row(NamedTuple):
    """low ≤ Σ coefficients · x[places] ≤ high; either limit may be infinite."""

    places: Ints
    coefficients: Array
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Model:
    """A mixed-integer second-order cone model in solver units, n weights of which `free` may be removed.

    Variables: x (f,) binary, p (f or n,) free, z (m,) free. With `joint` False there is no p.

        minimise   Σ_j z_j² + linear·x + Σ_i curvature_i · p_i² / (1 − x_i)
        subject to the rows of the budget,   z = columns @ x + changes @ p,   p_i = 0 where x_i = 1

    Attributes
    ----------
    free : int (f,)
        Indices of the weights that may be removed; the others are kept in every better mask.
    columns : (m, f)
    linear : (f,)
    changes : (m, n)
        For the joint model, over all n weights (those that are never removed may change too).
    curvature : (n,)
        Zero where the perspective has nothing to work with; the backend then needs an indicator.
    change_limit : (n,)
        |p_i| ≤ change_limit_i in every mask that is as good as the incumbent; inf where none is known.
    scale : float
        Solver units per unit of the objective (less its constant).
    square : Square or None
        Of the joint model, whose objective is solver value / scale + square.constant: it knows what rounding hides.
    incumbent : numpy bool (n,)
        A good mask, and
    incumbent_value : float
        its objective.
    """

    problem: SelectionProblem
    joint: bool
    free: Ints
    columns: Array
    linear: Array
    changes: Array
    curvature: Array
    change_limit: Array
    scale: float
    square: Square | None
    incumbent: Mask
    incumbent_value: float

    @property
    def least(self) -> float:
        """What no mask can fall below: 0 without a gradient, for both objectives are then sums of squares."""
        return -math.inf if self.problem.has_gradient else 0.0

    @property
    def settled(self) -> bool:
        """Whether fixing left a single mask, or all weights are zero: there is nothing to solve then."""
        return self.free.size in (0, self.problem.budget.n_prune) or self._worthless

    @property
    def _worthless(self) -> bool:
        return not self.joint and self.problem.scale == 0.0

    def settle(self, context: Context) -> Proposal:
        """The incumbent, proven by the fixing alone or, when time ran out, not proven."""
        if not self.settled:
            return self.proposal(None, -math.inf, Reason.TIME_LIMIT, context)
        bound = self.incumbent_value
        if not self._worthless:
            bound -= _slack(self.incumbent_value)
        context.record(self.incumbent_value, bound)
        return Proposal(self.incumbent, bound=bound, statistics={"nodes": 0.0})

    @property
    def height(self) -> float:
        """No single non-negative term exceeds this in a mask as good as the incumbent, in solver units."""
        gain = float(-np.sort(self.linear)[: self.most].clip(max=0.0).sum())
        return (TARGET + gain) * (1.0 + 1e-4)

    @property
    def n_rows(self) -> int:
        """Number of z."""
        return int(self.columns.shape[0])

    @property
    def most(self) -> int:
        """How many weights go at most."""
        count = self.problem.budget.n_prune
        return self.free.size if count is None else count

    @property
    def rows(self) -> list[Row]:
        """The budget, over places within `free`."""
        budget = self.problem.budget.linear(self.problem.n)
        found, items = [], budget.labels[self.free]
        # The first weight of an item speaks for it, the others follow.
        order = np.argsort(items, kind="stable")
        names, first = np.unique(items[order], return_index=True)
        speaker = order[first]
        for coefficients, low, high in zip(budget.matrix[:, names], budget.low, budget.high, strict=True):
            some = np.flatnonzero(coefficients)
            # What the rounding of a sum of costs may amount to.
            slack = 0.0 if low == high else 1e-13 * float(np.abs(coefficients).sum())
            found.append(Row(speaker[some], coefficients[some], float(low) - slack, float(high) + slack))
        for at, lead in zip(order, speaker[np.searchsorted(names, items[order])], strict=True):
            if at != lead:
                found.append(Row(np.array([lead, at]), np.array([1.0, -1.0]), 0.0, 0.0))
        return found

    @property
    def start(self) -> Array:
        """The incumbent as values of x, float64 (f,)."""
        return self.incumbent[self.free].astype(np.float64)

    def mask(self, x: npt.ArrayLike) -> Mask:
        """The mask of a solver's x (f,): of a number the largest, so that rounding noise cannot change it.

        Else what is nearer to one, or the incumbent where noise in the costs makes that exceed the limit.
        """
        budget, values = self.problem.budget, np.full(self.problem.n, np.inf)
        values[self.free] = -np.asarray(x, dtype=np.float64)
        if isinstance(budget, RANKED):
            return budget.cheapest_of(values)
        found = values < -0.5
        return self.incumbent if budget.violation(found) else found

    def vertex(self, slope: Array) -> Mask:
        """About the least slopeᵀx over the masks of the budget, bool (f,)."""
        budget, free = self.problem.budget, self.free
        values = np.full(self.problem.n, 1e3 * float(np.abs(slope).max(initial=1e-300)))
        values[free] = slope
        if isinstance(budget, RANKED):
            return budget.cheapest_of(values)[free]
        return budget.over_items.cheapest_of(values)[free]

    def margin(self) -> float:
        """What the tolerances of a solver may hide, in solver units.

        Each of the m terms z_j² ≤ t_j may be violated by the feasibility tolerance τ, each z_j may be off by τ at
        the slope 2|z_j|, and each x_i may be off an integer by τ at the slope 2 zᵀb_i + linear_i. Σ z² and the
        positive linear terms are at most TARGET plus the gain N that the negative linear terms allow; that adds up
        to the figure below. The change p enters z like x does. Rounding in the solver's own data is at the level of
        1e-15 of the largest coefficients and is added too. What the LP solver's dual tolerance (asked at τ, too) may
        hide in theory has no useful bound and is not covered; in practice it is orders of magnitude below.
        """
        gain = float(-np.sort(self.linear)[: self.most].clip(max=0.0).sum())
        height = math.sqrt(TARGET + gain)
        column_norms = np.linalg.norm(self.columns, axis=0)
        slope = 2.0 * height * (float(column_norms.sum()) + self.n_rows) + TARGET - float(self.linear.clip(max=0).sum())
        tolerance = FEASIBILITY * (self.n_rows + TARGET + gain + slope)
        rounding = 1e-15 * (float((column_norms**2).sum()) + float(np.abs(self.linear).sum()))
        return tolerance + rounding

    def safe_bound(self, claimed: float) -> float:
        """A lower bound on the objective from a dual bound in solver units; −inf stays −inf."""
        if not math.isfinite(claimed):
            return -math.inf if claimed < 0 or math.isnan(claimed) else self.incumbent_value
        height = (claimed - self.margin()) / self.scale
        if self.square is None:
            return height
        return self.square.safe(height, self.incumbent_value - self.square.constant)

    def proposal(
        self, x: npt.ArrayLike | None, claimed: float, reason: Reason, context: Context, **statistics: float
    ) -> Proposal:
        """The better of the solver's mask and the incumbent, with the safe bound.

        Where the claimed bound exceeds the value of the best mask (as it may within the tolerances), the bound is that
        value less the margin. Fixing weights removed only masks worse than the incumbent, so the bound holds for all.
        """
        mask, value = self.better(x)
        bound = min(max(self.safe_bound(claimed), self.least), value)
        context.record(value, bound)
        return Proposal(mask, bound=bound, reason=reason, statistics=statistics)

    def better(self, x: npt.ArrayLike | None) -> tuple[Mask, float]:
        """The mask of a solver's x (f,) and its value, or the incumbent where that is as good.

        Which of several equally good masks SCIP finds may depend on where its tables lie in memory.
        """
        if x is not None:
            mask = self.mask(x)
            value = self.problem.value(mask)
            if value < self.incumbent_value - 1e-9 * abs(self.incumbent_value):
                return mask, value
        return self.incumbent, self.incumbent_value


def _split(
    root: Array, square: Completed | None, n_kept: int, unit: float, deadline: Deadline | None = None
) -> tuple[Array, Array]:
    """(B₀ (m, n), d (n,)) with H = B₀ᵀB₀ + diag(d), H₀ ⪰ 0.

    The tightest d for the joint model (`solvers.exact.splitting`), the largest in proportion to diag(H) for the
    selection model (`square` None), zero where H is singular.
    """
    n = root.shape[1]
    norms = np.linalg.norm(root, axis=0)
    active = norms > 0
    if not active.all():
        base, diagonal = np.zeros((root.shape[0], n)), np.zeros(n)
        if active.any():
            inner = None if square is None else replace(square, centre=square.centre[active])
            part, diagonal[active] = _split(root[:, active], inner, n_kept, unit, deadline)
            base = np.zeros((part.shape[0], n))
            base[:, active] = part
        return base, diagonal
    if root.shape[0] < n:
        return root, np.zeros(n)
    scaled = root / norms
    # Rounding in H is of the order n·eps of its diagonal; stay clear of it so that H₀ is certainly PSD.
    noise = 4 * n * np.finfo(float).eps
    smallest = float(np.linalg.svd(scaled, compute_uv=False)[-1]) ** 2
    if smallest <= 100 * noise:
        return root, np.zeros(n)
    correlation = scaled.T @ scaled
    if square is None:
        share = np.full(n, smallest - noise)
    else:
        share, _ = optimal_diagonal(correlation, square.centre * norms, n_kept, unit, deadline)
        share = (share - noise).clip(min=0.0)
    values, vectors = np.linalg.eigh(correlation - np.diag(share))
    if values[0] < -noise:
        raise BackendError(f"the splitting of H left the eigenvalue {values[0]:.1e}; report this problem")
    values = values.clip(min=0.0)
    positive = values > 0.0
    base = (np.sqrt(values[positive])[:, None] * vectors.T[positive]) * norms
    return base, share * norms**2


def build(problem: SelectionProblem, context: Context) -> Model:
    """The model of a problem, its incumbent and its scaling.

    Raises
    ------
    ProblemError
        If the joint objective is unbounded below (λ = 0 and g outside the range of H).
    """
    arrays = problem.arrays()
    joint = problem.objective is Objective.JOINT
    scaled = prepare(arrays.weights, arrays.factor, arrays.damping, arrays.gradient) if joint else None
    square = complete_square(arrays)
    incumbent = local_optimum(problem, arrays, context)
    value = problem.value(incumbent)
    context.record(value)
    root = hessian_root(arrays)
    inverse = inverse_diagonal(root)
    constant = 0.0 if scaled is None else scaled.constant
    free = np.arange(problem.n)
    if square is not None:
        # ½ c_i²/(H⁻¹)_ii + constant bounds every mask that removes i, under either objective.
        least = 0.5 * square.centre**2 / inverse
        # No mask worse than the incumbent is of interest; the slack covers the rounding of `least` alone.
        slack = _slack(value) + 1e-12 * (least + abs(square.constant))
        may_go = (least + square.constant <= value + slack) | incumbent
        labels = problem.budget.linear(problem.n).labels
        whole = np.bincount(labels, weights=~may_go) == 0.0
        free = np.flatnonzero(whole[labels])
    centre = square.centre if joint and square is not None else arrays.weights
    height = value - constant
    gains = np.zeros(0) if joint else (arrays.gradient * arrays.weights)[free]
    gone = int(incumbent.sum())
    unit = _unit(height, gains, 0.5 * (np.square(root).sum(0) * centre**2)[free], gone)
    # A third of what is left: beyond a few hundred weights the splitting takes a while.
    remaining = context.deadline.remaining()
    share = None if math.isinf(remaining) else Deadline(remaining / 3)
    base, diagonal = _split(root, square if joint else None, max(1, problem.n - gone), unit, share)
    scale = TARGET / unit
    factor = math.sqrt(0.5 * scale)
    linear = 0.5 * diagonal * centre**2
    if not joint:
        linear = linear - arrays.gradient * arrays.weights
    columns = -(base * centre)[:, free] * factor
    if joint:
        # In units where every column of the full root has length one, so that p is of the size of z.
        norms = np.linalg.norm(root, axis=0)
        units = np.where(norms > 0, 1.0 / np.where(norms > 0, norms, 1.0), 1.0)
        changes = base * units
        curvature = diagonal * units**2
        # A column of zeros can change nothing, so its p is fixed.
        limit = np.zeros(problem.n)
        limit[norms > 0] = np.sqrt(2.0 * max(height, 1e-12 * unit) * inverse[norms > 0]) * factor * norms[norms > 0]
        limit[norms > 0] = limit[norms > 0] * (1 + 1e-6) + 1e-6
    else:
        changes, curvature, limit = np.zeros((base.shape[0], 0)), np.zeros(0), np.zeros(0)
    return Model(
        problem=problem,
        joint=joint,
        free=free,
        columns=columns,
        linear=linear[free] * scale,
        changes=changes,
        curvature=curvature,
        change_limit=limit,
        scale=scale,
        square=scaled,
        incumbent=incumbent,
        incumbent_value=value,
    )


def _slack(value: float) -> float:
    """More than the rounding of a value and of the costs of single removals."""
    return 1e-9 * abs(value)


def _unit(height: float, gains: Array, costs: Array, n_prune: int) -> float:
    """The size of the optimum that tolerances should be relative to.

    `gains` (f,) and `costs` (f,) are the linear and quadratic terms of the weights that may be removed. Never below
    1e-10 of their costs, where float64 knows nothing; what must stay does not count.
    """
    # With a linear term the value may vanish by cancellation; its parts do not.
    size = max(abs(height), 1e-3 * float(np.sort(np.abs(gains))[:n_prune].sum()))
    return max(size, 1e-10 * float(costs.sum()), 1e-290)


def inverse_diagonal(root: Array) -> Array:
    """An upper estimate of diag(H⁻¹), float64 (n,); inf where H is singular, and for columns that are zero."""
    n = root.shape[1]
    inverse = np.full(n, np.inf)
    active = np.linalg.norm(root, axis=0) > 0
    count = int(active.sum())
    if count == 0 or root.shape[0] < count:
        return inverse
    triangular = np.linalg.qr(root[:, active], mode="r")
    norms = np.linalg.norm(triangular, axis=0)
    scaled = triangular / norms
    condition = float(np.linalg.cond(scaled))
    if not math.isfinite(condition) or condition > 1e12:
        return inverse
    inner = scipy.linalg.solve_triangular(scaled, np.eye(count))
    inverse[active] = np.sum(inner**2, axis=1) / norms**2 * (1.0 + 1e-14 * n * condition)
    return inverse
