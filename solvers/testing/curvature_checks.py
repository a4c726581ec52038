"""`check_curvature`: hold a kind of curvature to its dense float64 twin, operation by operation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from solvers.curvature import Curvature
from solvers.errors import SingularHessianError


def check_curvature(
    curvature: Curvature, twin: npt.NDArray[np.float64] | None = None, *, seed: int = 0, tolerance: float = 1e-9
) -> None:
    """Compare every operation with dense float64 linear algebra.

    Parameters
    ----------
    curvature : Curvature
        Of at most some hundred weights.
    twin : float64 (n, n), optional
        The matrix it stands for, computed independently; None takes its products with unit vectors.
    seed : int
        Of the vectors and kept sets that are tried.
    tolerance : float
        Relative to the size of what is compared; 1e-9 suits a well-conditioned matrix.

    Raises
    ------
    AssertionError
        Naming the operation that disagrees.
    """
    identity = torch.eye(curvature.n, dtype=torch.float64, device=curvature.device)
    dense = curvature.multiply(identity) if twin is None else torch.as_tensor(twin, device=curvature.device)
    check = _Check(curvature, dense, torch.Generator(device="cpu").manual_seed(seed), tolerance)
    before = [array.clone() for array in curvature.digest_arrays()]
    for operation in (check.products, check.parts, check.factored_view, check.damping, check.inverse, check.restricted):
        operation()
    for array, copy in zip(curvature.digest_arrays(), before, strict=True):
        assert torch.equal(array, copy), "an operation changed the arrays of the curvature; work on copies"


class _Check:
    def __init__(self, curvature: Curvature, dense: torch.Tensor, draw: torch.Generator, tolerance: float) -> None:
        self.curvature, self.dense, self.draw, self.tolerance = curvature, dense, draw, tolerance
        self.n = curvature.n

    def vector(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float64).to(self.curvature.device)

    def same(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        kind = type(self.curvature).__name__
        assert found.dtype == torch.float64, f"{kind}.{what} is {found.dtype}, it must be float64"
        assert found.shape == expected.shape, f"{kind}.{what} has shape {tuple(found.shape)}, not {expected.shape}"
        error, size = float((found - expected).abs().max()), float(expected.abs().max())
        assert error <= self.tolerance * max(size, 1e-300), f"{kind}.{what} is off by {error:.3g} of {size:.3g}"

    def products(self) -> None:
        x, many = self.vector(self.n), self.vector(self.n, 3)
        self.same(self.curvature.multiply(x), self.dense @ x, "multiply of a vector")
        self.same(self.curvature.multiply(many), self.dense @ many, "multiply of several vectors")
        self.same(self.curvature.quadratic(x).reshape(1), (0.5 * x @ self.dense @ x).reshape(1), "quadratic")
        self.same(self.curvature.dense(), self.dense, "dense")

    def parts(self) -> None:
        order = torch.randperm(self.n, generator=self.draw)
        rows, columns = order[: max(1, self.n // 2)], order[self.n // 3 :]
        self.same(self.curvature.diagonal, self.dense.diagonal(), "diagonal")
        self.same(self.curvature.columns(columns), self.dense[:, columns], "columns")
        mask = torch.zeros(self.n, dtype=torch.bool)
        mask[rows] = True
        self.same(self.curvature.columns(mask), self.dense[:, mask.nonzero().squeeze(1)], "columns of a mask")
        self.same(self.curvature.submatrix(rows, columns), self.dense[rows][:, columns], "submatrix")
        self.same(self.curvature.select(rows).dense(), self.dense[rows][:, rows], "select")

    def factored_view(self) -> None:
        curvature, everything = self.curvature, torch.arange(self.n, device=self.curvature.device)
        columns, owner = curvature.factor_columns(everything).double(), curvature.component_of(everything)
        product = torch.where(owner.unsqueeze(0) == owner.unsqueeze(1), columns.T @ columns, 0.0)
        self.same(product + torch.diag(curvature.ridge), self.dense, "factor_columns and ridge")
        x = self.vector(self.n)
        image = curvature.project(x)
        assert image.shape == (curvature.n_components * curvature.rank,), "project must give n_components·rank numbers"
        self.same(curvature.back_project(image) + curvature.ridge * x, self.dense @ x, "back_project of project")

    def damping(self) -> None:
        one, other = self.curvature.with_damping(0.0).dense(), self.curvature.with_damping(0.5).dense()
        change = (other - one) / 0.5
        self.same(change - torch.diag(change.diagonal()), torch.zeros_like(change), "with_damping off the diagonal")
        again = one + self.curvature.damping * change
        self.same(again, self.dense, "with_damping, which must be linear in λ")

    def inverse(self) -> None:
        curvature, x = self.curvature, self.vector(self.n, 2)
        ridge = curvature.diagonal
        if bool((ridge > 0.0).all()):
            shifted = torch.linalg.solve(self.dense + torch.diag(ridge), x[:, 0])
            self.same(curvature.shifted_inverse(ridge)(x[:, 0]), shifted, "shifted_inverse by the diagonal")
            metric = ridge.sqrt()
            unit = self.dense / torch.outer(metric, metric) + 2.0 * torch.eye(self.n, dtype=torch.float64).to(x)
            self.same(curvature.penalised(metric)(2.0)(x[:, 0]), torch.linalg.solve(unit, x[:, 0]), "penalised")
        try:
            solved = curvature.solve(x)
        except SingularHessianError:
            assert np.linalg.cond(self.dense.cpu().numpy()) > 1e10, "solve refuses a matrix that is not singular"
            return
        self.same(self.dense @ solved, x, "solve")
        self.same(curvature.inverse_diagonal, torch.linalg.inv(self.dense).diagonal(), "inverse_diagonal")

    def restricted(self) -> None:
        for share in (0.2, 0.7, 1.0):
            kept = torch.rand(self.n, generator=self.draw) < share
            kept[0] = True
            kept = kept.to(self.curvature.device)
            index = kept.nonzero().squeeze(1)
            part, block = self.curvature.restrict(kept), self.dense[index][:, index]
            x = self.vector(index.numel())
            self.same(part.multiply(x), block @ x, "restrict(kept).multiply")
            # A right-hand side in the range, so that there is a solution whatever the rank.
            solved = part.solve(block @ x)
            assert solved.x is not None, "restrict(kept).solve found no solution where there is one"
            self.same(block @ solved.x, block @ x, "restrict(kept).solve")
            if float(np.linalg.cond(block.cpu().numpy())) < 1e8:
                assert not solved.repair, f"a well-conditioned H_SS was repaired: {solved.repair}"
                self.same(
                    part.inverse_diagonal(), torch.linalg.inv(block).diagonal(), "the inverse diagonal of a kept set"
                )
