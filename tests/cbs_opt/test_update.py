"""Updates of the kept weights against dense float64 algebra."""

from __future__ import annotations

import numpy as np
import pytest

from cbs_opt import OptionError, SingularHessianError, UnknownNameError, Update, update_weights
from cbs_opt.engine.update import own_update
from solvers import BackendError, QuadraticBlock, SelectionProblem, solve


def random_case(seed: int, sizes: tuple[int, ...], rows: int, gradient: bool, damping: float = 0.05):
    rng = np.random.default_rng(seed)
    blocks = [
        QuadraticBlock(
            rng.normal(size=n),
            rng.normal(size=(rows, n)) / np.sqrt(rows),
            damping,
            rng.normal(size=n) * 0.1 if gradient else None,
            name=f"b{i}",
        )
        for i, n in enumerate(sizes)
    ]
    n = sum(sizes)
    pruned = np.zeros(n, dtype=bool)
    pruned[rng.permutation(n)[: n // 2]] = True
    pruned.flags.writeable = False
    return SelectionProblem(blocks, int(pruned.sum())), pruned


CASES = [(0, (12,), 30), (1, (30,), 8), (2, (9, 14), 10), (3, (20, 1, 6), 4)]


@pytest.mark.parametrize(("seed", "sizes", "rows"), CASES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_single_update_is_woodfishers(seed: int, sizes: tuple[int, ...], rows: int, gradient: bool) -> None:
    problem, pruned = random_case(seed, sizes, rows, gradient)
    inverse = np.linalg.inv(problem.arrays().hessian)
    w = problem.weights
    g = np.zeros_like(w) if problem.gradient is None else problem.gradient
    # Each removal alone, in closed form, and the sum of their steps.
    newton = -inverse @ g
    step = newton.copy()
    for p in np.flatnonzero(pruned):
        step -= (w + newton)[p] / inverse[p, p] * inverse[:, p]
    expected = np.where(pruned, 0.0, w + step)
    found = update_weights(problem, pruned, "single")
    np.testing.assert_allclose(found.weights, expected, rtol=1e-8, atol=1e-10)
    assert np.isnan(found.refit_objective) and found.seconds >= 0.0


def test_removing_one_weight_singly_is_the_joint_optimum() -> None:
    for gradient in (False, True):
        problem, _ = random_case(5, (15,), 40, gradient)
        pruned = np.zeros(15, dtype=bool)
        pruned[6] = True
        single = update_weights(problem, pruned, Update.SINGLE)
        both = update_weights(problem, pruned, Update.COMBINATORIAL)
        np.testing.assert_allclose(single.weights, both.weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("seed", "sizes", "rows"), CASES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_combinatorial_update_solves_the_dense_system(
    seed: int, sizes: tuple[int, ...], rows: int, gradient: bool
) -> None:
    problem, pruned = random_case(seed, sizes, rows, gradient)
    hessian, w = problem.arrays().hessian, problem.weights
    g = np.zeros_like(w) if problem.gradient is None else problem.gradient
    kept = ~pruned
    step = -w * pruned
    step[kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, pruned)] @ w[pruned] - g[kept])
    found = update_weights(problem, pruned)
    np.testing.assert_allclose(found.weights, np.where(pruned, 0, w + step), rtol=1e-8, atol=1e-11)
    assert found.refit_objective == pytest.approx(g @ step + 0.5 * step @ hessian @ step, rel=1e-8)


@pytest.mark.parametrize("how", ["none", "single", "combinatorial"])
def test_the_scale_shortens_the_step_of_the_kept_weights_only(how: str) -> None:
    problem, pruned = random_case(2, (9, 14), 10, True)
    w = problem.weights
    full = update_weights(problem, pruned, how).weights
    half = update_weights(problem, pruned, how, scale=0.5).weights
    none = update_weights(problem, pruned, how, scale=0.0).weights
    assert (full[pruned] == 0).all() and (half[pruned] == 0).all()
    np.testing.assert_allclose(half[~pruned], 0.5 * (w + full)[~pruned])
    assert np.array_equal(none, np.where(pruned, 0, w))
    assert np.array_equal(full, none) == (how == "none")


def test_pruning_nothing_changes_nothing_without_a_gradient() -> None:
    problem, pruned = random_case(0, (12,), 30, False)
    nothing = np.zeros_like(pruned)
    for how in (Update.NONE, Update.SINGLE, Update.COMBINATORIAL):
        assert np.array_equal(update_weights(problem, nothing, how).weights, problem.weights)


def test_the_searched_update_is_the_best_step_by_the_loss_it_is_given() -> None:
    problem, pruned = random_case(0, (12,), 30, False, damping=0.1)
    hessian, w = problem.arrays().hessian, problem.weights
    target = update_weights(problem, pruned, scale=0.5).weights

    def loss(v: np.ndarray) -> float:
        return float((v - target) @ hessian @ (v - target))

    found = update_weights(problem, pruned, "searched", loss=loss).weights
    assert (found[pruned] == 0).all()
    assert loss(found) <= 1e-12 * loss(np.where(pruned, 0, w))
    with pytest.raises(OptionError, match="needs a loss"):
        update_weights(problem, pruned, "searched")
    with pytest.raises(OptionError, match="own length"):
        update_weights(problem, pruned, "searched", loss=loss, scale=0.5)
    undamped, mask = random_case(0, (12,), 30, False, damping=0.0)
    with pytest.raises(OptionError, match="positive"):
        update_weights(undamped, mask, "searched", loss=loss)


def test_bad_arguments_are_refused() -> None:
    problem, pruned = random_case(0, (12,), 30, False)
    with pytest.raises(UnknownNameError, match="Did you mean 'combinatorial'"):
        update_weights(problem, pruned, "combinatoral")
    for scale in (-1.0, float("nan"), float("inf"), "x"):
        with pytest.raises(OptionError, match="update_scale"):
            update_weights(problem, pruned, scale=scale)
    with pytest.raises(OptionError, match="a mask has not"):
        update_weights(problem, pruned, Update.OWN)
    silent = solve(problem.with_objective("joint"), "obs")
    with pytest.raises(BackendError, match="has proposed none"):
        own_update(problem, silent)
    nothing = problem.with_n_prune(0)
    np.testing.assert_array_equal(own_update(nothing, solve(nothing, "magnitude")).weights, problem.weights)
    singular, mask = random_case(1, (30,), 8, False, damping=0.0)
    with pytest.raises(SingularHessianError, match="damping"):
        update_weights(singular, mask, "single")
