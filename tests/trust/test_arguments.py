"""Arguments of the wrong type or range end in an error of ours that names them, before any work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cbs_opt
import solvers
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.measure.fisher import FisherOptions
from solvers.curvature import Dense, Diagonal, Kronecker, LowRank
from solvers.errors import CBSError, ModelError, OptionError, ProblemError
from solvers.solver import Solver
from tests.conftest import random_problem

SEEDS = [-1, True, "0", 1.5, None, 1 << 64, np.float64(1), [0]]
LIMITS = ["60", 0, -1.0, float("nan"), float("inf"), True, [1], 10**400]


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_are_integers(seed: object) -> None:
    with pytest.raises(OptionError, match="seed"):
        solvers.solve(random_problem(0, (6,), 3), "rmp", seed=seed)
    with pytest.raises(OptionError, match="seed"):
        cbs_opt.Setup(seed=seed)


@pytest.mark.parametrize("limit", LIMITS)
def test_time_limits_are_seconds(limit: object) -> None:
    with pytest.raises(OptionError, match="time_limit"):
        solvers.solve(random_problem(0, (6,), 3), "tabu", time_limit=limit)
    with pytest.raises(OptionError, match="time_limit"):
        cbs_opt.Choice(0.5, time_limit=limit)


@pytest.mark.parametrize(
    "values",
    [
        {"include": None},
        {"exclude": 3},
        {"include": [1]},
        {"include": {"fc": 1}},
        {"fisher": {"n_rows": 10}},
        {"calibration": 64},
        {"loss_samples": "64"},
        {"curvature": None},
        {"curvature": ["fisher"]},
        {"device": 1.5},
    ],
)
def test_setups_take_what_they_say(values: dict[str, object]) -> None:
    with pytest.raises(CBSError, match=next(iter(values))):
        cbs_opt.Setup(**values)


@pytest.mark.parametrize("value", [True, "0.5", None, 1, -0.1, float("nan"), [0.5], 90])
def test_sparsities_are_fractions(value: object) -> None:
    with pytest.raises(OptionError, match="sparsity"):
        cbs_opt.Choice(sparsity=value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FisherOptions(damping="1e-3"),
        lambda: FisherOptions(damping=True),
        lambda: FisherOptions(first_order=1),
        lambda: FisherOptions(dtype=torch.float32),
        lambda: FisherOptions(relative_damping=-1.0),
        lambda: cbs_opt.CalibrationOptions(n_samples=64.0),
        lambda: cbs_opt.CalibrationOptions(check_passes="no"),
        lambda: StageOptions(momentum="0.5"),
        lambda: StageOptions(step_damping=True),
        lambda: StageOptions(n_stages=np.float64(3)),
        lambda: cbs_opt.Choice(0.5, start=[True]),
        lambda: cbs_opt.Choice(0.5, update_scale="1"),
        lambda: solvers.make_solver("tabu").__class__(iterations="10"),
        lambda: solvers.make_solver("tabu").__class__(iterations=True),
        lambda: solvers.make_solver("lns").__class__(size=3.5),
        lambda: solvers.make_solver("portfolio").__class__(chain=1),
        lambda: solvers.make_solver("restarts").__class__(solver=None),
        lambda: solvers.solve(random_problem(0, (6,), 3), calibration_loss=3),
    ],
)
def test_options_take_what_they_say(make) -> None:
    with pytest.raises(OptionError):
        make()


def _sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


ARRAYS = [
    lambda: np.ma.masked_array(np.ones((3, 3)), mask=np.eye(3)),
    lambda: np.ones((3, 3), dtype=bool),
    lambda: [["1", "2", "3"]] * 3,
    lambda: np.array([[None] * 3] * 3),
    lambda: np.ones((3, 3), dtype=complex),
    lambda: torch.ones(3, 3, dtype=torch.bool),
    lambda: torch.ones(3, 3, device="meta"),
    _sparse,
    lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8),
    lambda: None,
    lambda: {"a": 1},
    lambda: np.ones((3, 3), dtype="datetime64[s]"),
]


@pytest.mark.parametrize("make", ARRAYS)
@pytest.mark.parametrize("kind", ["factor", "dense", "moment", "low_rank"])
def test_only_dense_real_numbers_are_numbers(make, kind: str) -> None:
    value, weights = make(), np.ones(3)
    with pytest.raises(ProblemError):
        if kind == "factor":
            solvers.QuadraticBlock(weights, value)
        else:
            curvature = {
                "dense": Dense, "low_rank": LowRank, "moment": lambda a: Kronecker(torch.ones(1), a)
            }[kind](value)  # fmt: skip
            solvers.QuadraticBlock(weights, curvature=curvature)


@pytest.mark.parametrize("make", ARRAYS)
def test_weights_and_gradients_likewise(make) -> None:
    value = make()
    for values in ({"weights": value}, {"weights": np.ones(3), "gradient": value}):
        if values.get("gradient", 0) is not None:
            with pytest.raises(ProblemError):
                solvers.QuadraticBlock(factor=np.ones((2, 3)), **values)
    with pytest.raises(ProblemError):
        Diagonal(value)


@pytest.mark.parametrize("damping", ["1", True, -1e-9, float("nan"), float("inf"), None, np.ones(2)])
def test_dampings_are_numbers(damping: object) -> None:
    for make in (
        lambda: solvers.QuadraticBlock(np.ones(3), np.ones((2, 3)), damping),
        lambda: LowRank(torch.ones(2, 3), damping),
        lambda: Dense(torch.eye(3), damping),
        lambda: Diagonal(torch.ones(3), damping),
        lambda: Kronecker(torch.ones(2), torch.eye(3), damping),
    ):
        with pytest.raises(ProblemError, match="damping"):
            make()


def test_names_of_blocks_are_text() -> None:
    with pytest.raises(ProblemError, match="name"):
        solvers.QuadraticBlock(np.ones(3), np.ones((2, 3)), name=None)


@pytest.mark.parametrize("scale", [1e200, 1e-300])
@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_objectives_beyond_float64_are_refused(scale: float, objective: str) -> None:
    block = solvers.QuadraticBlock(np.ones(6) * scale, np.eye(6), 1e-4)
    with pytest.raises(ProblemError, match="float64"):
        solvers.solve(solvers.SelectionProblem([block], 3, objective), "obs" if objective == "joint" else "greedy_ls")


def test_zero_weights_are_an_answer_all_the_same() -> None:
    block = solvers.QuadraticBlock(np.zeros(6), np.eye(6), 1e-4)
    assert solvers.solve(solvers.SelectionProblem([block], 3)).objective == 0.0


def test_layers_are_those_of_a_module() -> None:
    with pytest.raises(ModelError, match="model"):
        cbs_opt.find_layers({"fc": torch.ones(3, 3)})


def test_solvers_check_what_their_annotations_say() -> None:
    assert issubclass(type(solvers.make_solver("tabu[iterations=10]")), Solver)
    assert solvers.make_solver("greedy_ls").__class__(min_gain=None, window=np.int64(3)).window == 3


@pytest.mark.parametrize("tiny", [1e-170, 1e-300, 5e-324])
@pytest.mark.parametrize(
    "make",
    [
        lambda a: LowRank(torch.from_numpy(a[:4]), 1e-4),
        lambda a: LowRank(torch.from_numpy(a[:4]), 0.0),
        lambda a: Dense(torch.from_numpy(a.T @ a)),
        lambda a: Diagonal(torch.from_numpy(np.diag(a.T @ a).copy())),
        lambda a: Kronecker(torch.ones(1), torch.from_numpy(a.T @ a)),
    ],
)
def test_removals_that_hardly_matter_are_refitted_and_bounded(make, tiny: float) -> None:
    random = np.random.default_rng(0)
    weights, root = random.normal(size=6), random.normal(size=(6, 6))
    weights[3] = tiny
    problem = solvers.SelectionProblem([solvers.QuadraticBlock(weights, curvature=make(root))], 1)
    solution = solvers.solve(problem, "obd")
    assert solution.pruned.tolist() == [i == 3 for i in range(6)]
    assert 0.0 <= solution.objective < 1e-300 and abs(solution.refit_objective) <= solution.objective
    bound = solvers.bound(problem, "frank_wolfe")
    assert math.isfinite(bound.value) and bound.value <= solution.objective + 1e-12
