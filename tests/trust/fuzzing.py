"""Malformed and odd arguments for every public function, as hypothesis strategies.

A call ends well if it returns something valid or raises a `CBSError`. Anything else is a fault of ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import cbs_opt
import solvers
from solvers.curvature import Dense, Diagonal, Kronecker, LowRank
from solvers.errors import CBSError

N = 6

#: What nobody should pass.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**30, -(10**30), 1 << 63, 1 << 64, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.sampled_from(["60", "0", "nan", "obd", "greedy_ls[", "greedy_ls[window=x]", "obs[", "@", "*", "\x00"]),
    st.binary(max_size=4),
    st.sampled_from([(), [], {}, set(), [[]], [None], {"a": 1}, object(), len, int, Fraction(1, 3), 1j, b""]),
    st.builds(lambda shape: np.zeros(shape), st.sampled_from([(), (0,), (N,), (2, N), (N, N), (1, 1, 1)])),
    st.builds(lambda shape: torch.zeros(shape), st.sampled_from([(), (0,), (N,), (2, N), (N, N)])),
)

_ENTRIES = st.one_of(
    st.floats(-10, 10),
    st.sampled_from([0.0, 1e-300, 1e300, 1e-30, 1e30, math.nan, math.inf, -math.inf, 5e-324]),
)


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], clean: bool = False) -> Any:
    """An array of numbers, of any kind; of a wrong shape now and then."""
    if not clean and draw(st.integers(0, 15)) == 7:
        shape = draw(st.sampled_from([(), (0,), (N - 1,), (N, 1), (3, N), (N, N, 1)]))
    size = math.prod(shape)
    random = np.random.default_rng(draw(st.integers(0, 99)))
    values = random.normal(size=shape)
    if not clean and size and draw(st.integers(0, 7)) == 5:
        values.reshape(-1)[draw(st.integers(0, size - 1))] = draw(_ENTRIES)
    kinds: list[Callable[[Any], Any]] = [
        lambda a: a,
        torch.from_numpy,
        lambda a: torch.from_numpy(a).float(),
        np.float32,
    ]
    if not clean:
        kinds = (
            kinds
            if draw(st.integers(0, 7)) != 5
            else [
                lambda a: a.tolist(),
                lambda a: a > 0,
                lambda a: a.astype(int),
                lambda a: a.astype(str),
                lambda a: a.astype(object),
                lambda a: a.astype(complex),
                lambda a: np.ma.masked_array(a, mask=a > 0),
                lambda a: torch.from_numpy(a).to_sparse() if a.ndim else torch.zeros(()),
                lambda a: torch.from_numpy(a).to("meta"),
                lambda a: torch.from_numpy(a).half(),
                lambda a: torch.from_numpy(a) > 0,
                lambda a: a[..., ::-1] if a.ndim else a,
                lambda a: np.broadcast_to(a, (2, *a.shape)),
            ]
        )
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return draw(st.sampled_from(kinds))(values)


@st.composite
def mostly(draw: st.DrawFn, good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any] = ODD) -> Any:
    """What is meant, or now and then anything: about one argument of a call."""
    return draw(odd if draw(st.integers(0, 15)) == 7 else good)


def maybe(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """None in half of the calls."""
    return mostly(st.booleans().flatmap(lambda given: good if given else st.none()))


DAMPING = mostly(st.sampled_from([0.0, 1e-4, 1.0, 1e-12, 1e12]))
SOLVERS = mostly(st.sampled_from([s for s in solvers.available_solvers() if "miqp" not in s and "cpsat" not in s]))
OBJECTIVES = mostly(st.sampled_from(["selection", "joint"]))
SEEDS = mostly(st.integers(0, 5))
LIMITS = maybe(st.just(0.5))


@st.composite
def blocks(draw: st.DrawFn) -> solvers.QuadraticBlock:
    """A block of any kind of curvature, or the error it ends in."""
    kind = draw(mostly(st.sampled_from(["factor", "low_rank", "dense", "diagonal", "kronecker"]), st.just("odd")))
    weights, damping = draw(mostly(arrays((N,)))), draw(DAMPING)
    gradient, name = draw(maybe(arrays((N,)))), draw(mostly(st.just("block")))
    if kind == "factor":
        return solvers.QuadraticBlock(weights, draw(mostly(arrays((4, N)))), damping, gradient, name)
    if kind == "low_rank":
        curvature: Any = LowRank(draw(mostly(arrays((3, N)))), damping)
    elif kind == "dense":
        root = draw(arrays((N, N), clean=True))
        root = torch.as_tensor(root)
        curvature = Dense(draw(mostly(st.just(root.T @ root))), damping)
    elif kind == "diagonal":
        positive = torch.as_tensor(draw(arrays((N,), clean=True))).abs()
        curvature = Diagonal(draw(mostly(st.just(positive), arrays((N,)))), damping)
    elif kind == "kronecker":
        root = torch.as_tensor(draw(arrays((4, 3), clean=True))).double()
        curvature = Kronecker(draw(mostly(st.just(torch.ones(2)))), draw(mostly(st.just(root.T @ root))), damping)
    else:
        curvature = draw(ODD)
    return solvers.QuadraticBlock(weights, curvature=curvature, gradient=gradient, name=name)


def check_solution(problem: solvers.SelectionProblem, solution: solvers.Solution) -> None:
    """Raise AssertionError for a solution that is not valid."""
    assert solution.pruned.dtype == bool and solution.pruned.shape == (problem.n,)
    assert int(solution.pruned.sum()) == problem.n_prune
    if problem.measured:
        assert math.isfinite(solution.objective) or (solution.objective == -math.inf and problem.has_gradient)
        assert solution.bound <= solution.objective or math.isclose(solution.bound, solution.objective)


def solve_anything(draw: Any) -> None:
    """`solvers.solve` on a problem of one or two blocks."""
    members = draw(mostly(st.lists(blocks(), min_size=1, max_size=2)))
    problem = solvers.SelectionProblem(members, draw(mostly(st.integers(0, N))), draw(OBJECTIVES))
    start = draw(mostly(st.none(), arrays((N,))))
    allocation = draw(mostly(st.none(), st.one_of(st.sampled_from(["uniform", "magnitude", "marginal"]), ODD)))
    solution = solvers.solve(
        draw(mostly(st.just(problem))), draw(SOLVERS), time_limit=draw(LIMITS), seed=draw(SEEDS), start=start,
        calibration_loss=draw(mostly(st.none())), allocation=allocation,
        with_refit=draw(st.booleans()),
    )  # fmt: skip
    check_solution(problem, solution)


def bound_anything(draw: Any) -> None:
    """`solvers.bound`."""
    problem = solvers.SelectionProblem([draw(blocks())], draw(mostly(st.integers(0, N))), draw(OBJECTIVES))
    method = draw(mostly(st.sampled_from(["auto", "frank_wolfe", "lagrangian", "qcr"])))
    found = solvers.bound(problem, method, tolerance=draw(maybe(st.just(0.1))), time_limit=draw(LIMITS))
    assert not math.isnan(found.value)


def curvature_anything(draw: Any) -> None:
    """A kind of curvature alone, and its products."""
    kind = draw(st.sampled_from([LowRank, Dense, Diagonal]))
    shape = {LowRank: (3, N), Dense: (N, N), Diagonal: (N,)}[kind]
    curvature = kind(draw(mostly(arrays(shape))), draw(DAMPING))
    x = torch.ones(curvature.n, dtype=torch.float64)
    assert curvature.multiply(x).shape == (curvature.n,)
    assert curvature.diagonal.shape == (curvature.n,)


def spec_anything(draw: Any) -> None:
    """`solvers.make_solver` and `describe`."""
    name = draw(SOLVERS)
    text = draw(st.one_of(st.just(name), st.text("abcgreedy_ls[]=,.1x ", max_size=30)))
    key = draw(st.sampled_from(["window", "iterations", "start", "min_gain", "runs", "solver", "x"]))
    value = draw(ODD)
    made = solvers.make_solver(draw(st.sampled_from([text, f"{name}[{key}={value}]"])))
    assert solvers.make_solver(made.spec).spec == made.spec
    assert solvers.describe(made.name).name == made.name


def file_anything(draw: Any, folder: Path) -> None:
    """`solvers.load_block` and `cbs_opt.load_masks` of files that are not ours, or damaged."""
    path = folder / "file"
    content = draw(st.one_of(st.binary(max_size=60), st.just(None)))
    if content is None:
        names = ["weights", "factor", "damping", "gradient", "matrix", "diagonal", "row_scale", "input_moment"]
        parts = draw(st.dictionaries(st.sampled_from(names), arrays((N,)), max_size=4))
        with open(path, "wb") as stream:
            np.savez(stream, **{k: np.asarray(v) for k, v in parts.items() if not getattr(v, "is_meta", False)
                                and not getattr(v, "is_sparse", False)})  # fmt: skip
    else:
        path.write_bytes(content)
    if draw(st.booleans()):
        assert solvers.load_block(draw(mostly(st.just(path)))).n
    else:
        assert isinstance(cbs_opt.load_masks(path), dict)


class Small(nn.Module):
    """5 → 4 → 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def _batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


MODELS = mostly(st.builds(lambda: Small().eval()))
DATA = mostly(
    st.sampled_from(
        [
            _batch(),
            [_batch()],
            [_batch(), _batch(3)],
            [_batch(), (torch.zeros(2, 4), torch.zeros(2))],
            [_batch(0)],
            [(torch.full((3, 5), math.nan), torch.zeros(3).long())],
            [{"x": _batch()[0], "y": _batch()[1]}],
            [None],
            (_batch()[0], _batch()[1].float()),
            (_batch()[0].int(), _batch()[1]),
            (_batch()[0], _batch()[1] + 5),
        ]
    )
)
LOSSES = mostly(
    st.sampled_from(
        [
            F.cross_entropy,
            lambda z, y: z.sum(),
            lambda z, y: z,
            lambda z, y: F.cross_entropy(z, y) * math.inf,
            lambda z, y: 1 / 0,
            lambda z: z,
            lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        ]
    )
)
PATTERNS = mostly(st.sampled_from(["*", "fc1", ("fc*",), ["fc1", "fc2"], "nothing"]))


def prune_anything(draw: Any) -> None:
    """`cbs_opt.prune`, in one shot."""
    fisher: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "n_rows": mostly(st.integers(1, 12)),
                "batch_size": mostly(st.integers(1, 3)),
                "damping": DAMPING,
                "relative_damping": DAMPING,
                "blocks": mostly(
                    st.sampled_from(["one", "per_layer", "per_row", "fixed:4", "components", "clusters:4"])
                ),
                "first_order": mostly(st.booleans()),
                "dtype": mostly(st.sampled_from(["float32", "float64"])),
                "method": mostly(st.sampled_from(["auto", "loop", "vmap", "outer"])),
            },
        )
    )
    options: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {"sparsity": mostly(st.floats(0, 0.99))},
            optional={
                "solver": SOLVERS,
                "update": mostly(st.sampled_from(["none", "single", "combinatorial", "searched"])),
                "update_scale": mostly(st.floats(0, 2)),
                "objective": OBJECTIVES,
                "include": PATTERNS,
                "exclude": mostly(st.sampled_from(["fc2", ()])),
                "seed": SEEDS,
                "loss_samples": mostly(st.integers(1, 20)),
                "time_limit": LIMITS,
                "curvature": mostly(st.sampled_from(["fisher", "none"])),
                "device": mostly(st.sampled_from(["auto", "cpu"])),
                "allocation": mostly(st.none()),
            },
        )
    )
    given = draw(mostly(st.builds(cbs_opt.FisherOptions, **{k: st.just(v) for k, v in fisher.items()})))
    result = cbs_opt.prune(draw(MODELS), draw(DATA), draw(LOSSES), fisher=given, **options)
    report = result.report
    assert result.pruned.sum() == report.n - report.n_kept
    assert math.isfinite(report.loss_dense) and math.isfinite(report.loss_pruned)
    assert np.isfinite(result.weights).all() and not result.weights[result.pruned].any()


def layers_anything(draw: Any) -> None:
    """`find_layers`, and masks put on and taken off."""
    model = draw(MODELS)
    layers = cbs_opt.find_layers(model, include=draw(PATTERNS), exclude=draw(mostly(st.just(()))))
    assert layers.n > 0
    name = draw(mostly(st.sampled_from(["fc1", "fc1.weight", "fc2"])))
    mask = draw(mostly(st.sampled_from([torch.ones(4, 5) > 0, torch.eye(4, 5) > 0, torch.eye(4, 5), np.ones((4, 5))])))
    masked = cbs_opt.apply_masks(model, draw(mostly(st.just({name: mask} if name.__hash__ else {}))))
    assert all(found.dtype == torch.bool for found in cbs_opt.read_masks(masked).values())
    cbs_opt.remove_masks(masked)


TARGETS: dict[str, Callable[[Any], None]] = {
    "solve": solve_anything,
    "bound": bound_anything,
    "curvature": curvature_anything,
    "spec": spec_anything,
    "prune": prune_anything,
    "layers": layers_anything,
}


def survives(call: Callable[[], None]) -> str:
    """Run a call; ``returned`` or the name of our error. Whatever else it raises goes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except CBSError as error:
            assert len(str(error)) > 10, f"{error!r} says nothing"
            # What a backend throws is translated, but none should throw anything.
            assert not isinstance(error, solvers.BackendError) or error.__cause__ is None, error
            return type(error).__name__
    return "returned"
