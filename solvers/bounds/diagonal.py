"""The perspective bound of the joint objective with the best diagonal, one for all rows of a layer.

Write CBS as c₀ + min over x with at most n_kept entries of ½xᵀHx − aᵀx, where a = Hw − g and c₀ = ½wᵀHw − gᵀw. Let
0 < D = diag(d) ⪯ H and S = H − D. Since ½xᵀSx ≥ xᵀSv − ½vᵀSv for any v, what is left separates over the weights:

    bound(d, v) = c₀ − ½ vᵀSv − ½ · sum of the n_kept largest β_i²/d_i ,    β = a − Sv ,

and (d, v) is the certificate. With D = λI this is the bound of `solvers.bounds.perspective`; a larger diagonal makes it
tight. Rows of a `Kronecker` block share D, each times its row scale: S is then d × d, and a row costs a product.

For a fixed D the best v is found by ADMM on β, whose linear step is one product in the eigenbasis of D^(−½)HD^(−½) and
whose other step, the proximal map of ½ · (sum of the n_kept largest squares), is known up to one number:
z_i = clip(ρ(|y_i|/τ − 1), 0, 1) with Σz = n_kept, and γ_i = ρy_i/(ρ + z_i). The bound is concave in (d, β) together,
with the supergradient p_i = ½ Σ_rows v²(1/z − 1) for d_i. In between, d moves by Newton steps on the model

    −Σ p_i d_i²/δ_i + μ log det(H − diag δ) ,

whose gradient at δ = d is p and which bends as the bound does for a fixed β; μ falls to a small share of its value.

References
----------
Frangioni & Gentile (2007); Zheng, Sun & Li (2014); Dong, Chen & Linderoth (2015) for the best diagonal; Argyriou,
Foygel & Srebro (2012) for the proximal map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from solvers.block import QuadraticBlock
from solvers.bounds.certificate import EPS, Bound, Certificate
from solvers.curvature import Kronecker
from solvers.errors import CapabilityError
from solvers.problem import Array, SelectionProblem
from solvers.solver import Deadline

#: Largest matrix that is decomposed.
MAX_INPUTS = 3072
_INNER = 30
_STEPS = 60
_NEWTON = 3
_BARRIER = 3e-3
_PENALTY = 0.3


def largest_inputs(problem: SelectionProblem) -> int:
    """Size of the largest matrix that the bound decomposes."""
    return max(b.curvature.n_inputs if isinstance(b.curvature, Kronecker) else b.n for b in problem.blocks)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of a block that share H, in units where their scale is one.

    Attributes
    ----------
    hessian : float64 (d, d)
    weights, slope : float64 (R, d)
        √s w, and a = √s (Hw − g/s).
    constant : float
        c₀ of all of them.
    """

    hessian: Array
    weights: Array
    slope: Array
    constant: float

    @classmethod
    def of(cls, block: QuadraticBlock) -> _Rows:
        curvature = block.curvature
        gradient = np.zeros(block.n) if block.gradient is None else block.gradient.double().cpu().numpy()
        weights = block.weights.double().cpu().numpy()
        if isinstance(curvature, Kronecker):
            scale = np.sqrt(curvature.row_scale.double().cpu().numpy())[:, None]
            hessian = curvature.inputs.dense().double().cpu().numpy()
            weights, gradient = weights.reshape(scale.size, -1), gradient.reshape(scale.size, -1)
            if gradient[scale[:, 0] == 0.0].any():
                raise CapabilityError("a row without curvature has a gradient: its joint objective has no lower bound")
            own, pull = scale * weights, np.divide(gradient, scale, out=np.zeros_like(gradient), where=scale > 0.0)
        else:
            hessian = curvature.dense().double().cpu().numpy()
            own, pull = weights[None, :], gradient[None, :]
        image = own @ hessian
        return cls(hessian, own, image - pull, 0.5 * float(np.vdot(own, image)) - float(np.vdot(own, pull)))

    def least(self) -> float:
        """The smallest eigenvalue of H, less a rounding margin."""
        values = np.linalg.eigvalsh(self.hessian)
        return float(values[0]) - 8.0 * values.size * EPS * float(values[-1])

    def feasible(self, diagonal: Array) -> Array:
        """`diagonal` (d,), where need be moved towards the smallest eigenvalue until D ⪯ H, rounding included."""
        floor = np.full(diagonal.size, self.least() * (1.0 - 1e-6))
        low, high = 0.0, 1.0
        if floor[0] <= 0.0:
            return np.zeros_like(diagonal)
        if self._below(diagonal):
            return diagonal
        for _ in range(12):
            middle = 0.5 * (low + high)
            if self._below(floor + middle * (diagonal - floor)):
                low = middle
            else:
                high = middle
        return np.asarray(floor + low * (diagonal - floor))

    def _below(self, d: Array) -> bool:
        """Whether 0 < D ⪯ H, beyond doubt."""
        if not (d > 0.0).all():
            return False
        root = 1.0 / np.sqrt(d)
        scaled = root[:, None] * self.hessian * root
        # Of the products and the factorisation (Higham, Accuracy and Stability, theorem 10.7).
        scaled[np.diag_indices(d.size)] -= 1.0 + 8.0 * d.size * EPS * float(np.diag(scaled).max())
        try:
            np.linalg.cholesky(scaled)
        except np.linalg.LinAlgError:
            return False
        return True


@dataclass(frozen=True, eq=False)
class DiagonalCertificate(Certificate):
    """d and v of each block, in the units of `_Rows`.

    Attributes
    ----------
    diagonals : tuple of float64 (d,)
    points : tuple of float64 (R, d)
    """

    diagonals: tuple[Array, ...]
    points: tuple[Array, ...]

    def value(self, problem: SelectionProblem) -> float:
        """bound(d, v), less a rounding margin."""
        total, size, costs = 0.0, 0.0, []
        for block, diagonal, v in zip(problem.blocks, self.diagonals, self.points, strict=True):
            rows = _Rows.of(block)
            d = rows.feasible(diagonal)
            image = v @ rows.hessian - d * v
            beta = rows.slope - image
            # |Σ_j S_ij v_j| is off by d eps Σ_j √H_ii √H_jj |v_j|, like the products with w.
            norms = np.sqrt(np.diag(rows.hessian))
            sums = np.abs(v) @ norms + np.abs(rows.weights) @ norms
            off = 2.0 * (d.size + 4.0) * EPS * norms * sums[:, None] + 4.0 * EPS * np.abs(beta)
            with np.errstate(divide="ignore"):
                costs.append(((np.abs(beta) + off) ** 2 / d).reshape(-1))
            quadratic = 0.5 * float(np.vdot(v, image))
            total += rows.constant - quadratic
            size += abs(rows.constant) + 0.5 * float(np.abs(v).reshape(-1) @ np.abs(image).reshape(-1))
        largest = 0.5 * _largest_sum(np.concatenate(costs), problem.n - problem.n_prune)
        return total - largest - 16.0 * EPS * max(d.size for d in self.diagonals) * (size + largest)


def diagonal_bound(problem: SelectionProblem, *, tolerance: float = 1e-2, time_limit: float | None = None) -> Bound:
    """The best perspective bound of the joint objective; parameters as `solvers.bounds.bound`'s.

    Raises
    ------
    CapabilityError
        If H is singular to rounding, or larger than this method decomposes.
    """
    deadline = Deadline(time_limit)
    if largest_inputs(problem) > MAX_INPUTS:
        raise CapabilityError(
            f"method='diagonal' decomposes matrices of up to {MAX_INPUTS} inputs, and a block has "
            f"{largest_inputs(problem)}; use method='frank_wolfe'"
        )
    rows = [_Rows.of(block) for block in problem.blocks]
    if not all(row.feasible(np.diag(row.hessian)).all() for row in rows):
        raise CapabilityError("H is singular to rounding, so that no diagonal lies below it; pass a larger damping")
    search = _Search(rows, problem.n - problem.n_prune)
    best, kept, converged, barrier, before = -np.inf, search.state(), False, 1.0, -np.inf
    for step in range(_STEPS):
        if step and deadline.expired():
            break
        value = search.solve(_INNER * (1 if step else 4), deadline)
        if value > best:
            best, kept = value, search.state()
        if barrier <= _BARRIER and value <= before + 0.1 * tolerance * abs(value):
            converged = True
            break
        before, barrier = value, max(_BARRIER, 0.6 * barrier)
        search.move(barrier)
    certificate = DiagonalCertificate(*kept)
    return Bound(certificate.value(problem), "diagonal", deadline.elapsed(), step + 1, certificate, converged)


class _Search:
    """d, v and the state of ADMM."""

    def __init__(self, rows: Sequence[_Rows], n_kept: int) -> None:
        self.rows, self.n_kept = rows, n_kept
        self.diagonals = [np.full(r.hessian.shape[0], 0.5 * r.least()) for r in rows]
        self.points = [np.zeros_like(r.slope) for r in rows]
        self.gamma = [np.zeros_like(r.slope) for r in rows]
        self.dual = [np.zeros_like(r.slope) for r in rows]
        self.slopes = [np.zeros(r.hessian.shape[0]) for r in rows]

    def state(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """(d, v) of each block."""
        return tuple(d.copy() for d in self.diagonals), tuple(v.copy() for v in self.points)

    def move(self, barrier: float) -> None:
        """d to about the maximum of −Σ p_i d_i²/δ_i + μ log det(H − diag δ) over δ, μ a share of the model's value."""
        for number, (row, p, d) in enumerate(zip(self.rows, self.slopes, self.diagonals, strict=True)):
            total = float(p @ d)
            if total > 0.0:
                weight = np.maximum(p * d, 1e-6 * total / d.size) * d
                self.diagonals[number] = _centred(row, weight, d, barrier * total / d.size)

    def solve(self, iterations: int, deadline: Deadline) -> float:
        """ADMM for v at the present d; the bound reached, up to rounding."""
        rho, roots = _PENALTY, [1.0 / np.sqrt(np.maximum(d, 1e-300)) for d in self.diagonals]
        scaled = [h * r.slope for h, r in zip(roots, self.rows, strict=True)]
        spectra = []
        for h, row in zip(roots, self.rows, strict=True):
            values, basis = np.linalg.eigh(h[:, None] * row.hessian * h)
            spectra.append((rho / (1.0 + rho * np.maximum(values - 1.0, 0.0)), basis))
        gamma = [h * g for h, g in zip(roots, self.gamma, strict=True)]
        dual = [h * u for h, u in zip(roots, self.dual, strict=True)]
        for _ in range(iterations):
            start = [g - u for g, u in zip(gamma, dual, strict=True)]
            v = [((a - q) @ e * f) @ e.T for a, q, (f, e) in zip(scaled, start, spectra, strict=True)]
            beta = [q + x / rho for q, x in zip(start, v, strict=True)]
            z = _relaxed([b + u for b, u in zip(beta, dual, strict=True)], rho, self.n_kept)
            gamma = [rho * (b + u) / (rho + s) for b, u, s in zip(beta, dual, z, strict=True)]
            dual = [u + b - g for u, b, g in zip(dual, beta, gamma, strict=True)]
            if deadline.expired():
                break
        self.points = [h * x for h, x in zip(roots, v, strict=True)]
        self.gamma = [g / h for h, g in zip(roots, gamma, strict=True)]
        self.dual = [u / h for h, u in zip(roots, dual, strict=True)]
        value = -0.5 * _largest_sum(np.concatenate([np.square(b).reshape(-1) for b in beta]), self.n_kept)
        for row, a, x, b in zip(self.rows, scaled, v, beta, strict=True):
            value += row.constant - 0.5 * float(np.vdot(x, a - b))
        self._aim(z)
        return value

    def _aim(self, z: Sequence[Array]) -> None:
        for number, (v, share) in enumerate(zip(self.points, z, strict=True)):
            self.slopes[number] = 0.5 * (np.square(v) * (1.0 / np.maximum(share, 1e-3) - 1.0)).sum(0)


def _centred(row: _Rows, weight: Array, d: Array, mu: float) -> Array:
    """Newton steps on −Σ weight/δ + μ log det(H − diag δ) from a feasible d."""
    value = _model(row, weight, d, mu)
    for _ in range(_NEWTON):
        inverse = np.linalg.inv(row.hessian - np.diag(d))
        slope = weight / d**2 - mu * np.diag(inverse)
        curve = mu * inverse**2
        curve[np.diag_indices(d.size)] += 2.0 * weight / d**3
        step = np.linalg.solve(curve, slope)
        length = 1.0
        while length > 1e-3:
            new = d + length * step
            reached = _model(row, weight, new, mu)
            if reached > value:
                break
            length *= 0.5
        else:
            break
        d, value = new, reached
    return d


def _model(row: _Rows, weight: Array, d: Array, mu: float) -> float:
    if not (d > 0.0).all():
        return -np.inf
    try:
        lower = np.linalg.cholesky(row.hessian - np.diag(d))
    except np.linalg.LinAlgError:
        return -np.inf
    return -float((weight / d).sum()) + 2.0 * mu * float(np.log(np.diag(lower)).sum())


def _largest_sum(values: Array, count: int) -> float:
    if count == 0:
        return 0.0
    return float(np.partition(values, values.size - count)[values.size - count :].sum())


def _relaxed(points: Sequence[Array], rho: float, count: int) -> list[Array]:
    """z of the proximal map: clip(ρ(|y|/τ − 1), 0, 1) with Σz = count."""
    sizes = [np.abs(y) for y in points]
    low, high = 0.0, max(float(s.max()) for s in sizes)
    if high == 0.0:
        n = sum(s.size for s in sizes)
        return [np.full_like(s, count / n) for s in sizes]
    for _ in range(60):
        middle = 0.5 * (low + high)
        if sum(float(np.clip(rho * (s / middle - 1.0), 0.0, 1.0).sum()) for s in sizes) > count:
            low = middle
        else:
            high = middle
    return [np.clip(rho * (s / high - 1.0), 0.0, 1.0) for s in sizes]
