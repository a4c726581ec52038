"""Problems as files: read back by parsers of our own, and by SCIP and HiGHS, they are what they were."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import solvers
from solvers import CapabilityError, OptionError, ProblemError, SelectionProblem, SingularHessianError, UnknownNameError
from solvers.errors import OutputError
from tests.conftest import random_block

FORMATS = ("lp", "mps", "qplib")


@dataclass
class Read:
    """A file as numbers: min ½ zᵀQz + cᵀz, left ≤ Az ≤ right, low ≤ z ≤ high, over variables by name."""

    names: list[str]
    quadratic: np.ndarray
    linear: np.ndarray
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    binary: set[str] = field(default_factory=set)

    def value(self, z: np.ndarray) -> float:
        return float(0.5 * z @ self.quadratic @ z + self.linear @ z)

    def feasible(self, z: np.ndarray) -> bool:
        sums = [sum(value * z[at] for at, value in terms.items()) for terms, _, _ in self.rows]
        rows = all(
            left - 1e-9 * max(1.0, abs(left)) <= total <= right + 1e-9 * max(1.0, abs(right))
            for total, (_, left, right) in zip(sums, self.rows, strict=True)
        )
        return rows and bool(np.all(self.low - 1e-12 <= z) and np.all(z <= self.high + 1e-12))


def read_qplib(text: str) -> Read:
    lines = iter(line.split("#")[0].split() for line in text.splitlines())

    def one() -> str:
        return next(lines)[0]

    def vector(n: int) -> np.ndarray:
        out = np.full(n, float(one()))
        for _ in range(int(one())):
            at, value = next(lines)
            out[int(at) - 1] = float(value)
        return out

    one()
    kind, sense, n, m = one(), one(), int(one()), int(one())
    assert sense == "minimize" and kind in ("CBL", "CML")
    quadratic = np.zeros((n, n))
    for _ in range(int(one())):
        i, j, value = next(lines)
        assert int(i) >= int(j)
        # Of ½ zᵀLz with a triangular L, half of which goes to either side of the symmetric matrix.
        quadratic[int(i) - 1, int(j) - 1] += 0.5 * float(value)
        quadratic[int(j) - 1, int(i) - 1] += 0.5 * float(value)
    linear = vector(n)
    assert float(one()) == 0.0
    terms: list[dict[int, float]] = [{} for _ in range(m)]
    for _ in range(int(one())):
        row, at, value = next(lines)
        terms[int(row) - 1][int(at) - 1] = float(value)
    assert float(one()) == 1e20
    left, right = vector(m), vector(m)
    low, high, types = (vector(n), vector(n), vector(n)) if kind == "CML" else (np.zeros(n), np.ones(n), np.ones(n))
    for size in (n, m, n):
        assert not vector(size).any()
    assert [one(), one()] == ["0", "0"] and next(lines, None) is None
    half = int(types.sum())
    names = [f"x{at + 1}" for at in range(half)] + [f"u{at + 1}" for at in range(n - half)]
    rows = list(zip(terms, left.tolist(), right.tolist(), strict=True))
    return Read(names, quadratic, linear, rows, low, high, {names[at] for at in np.flatnonzero(types == 1.0)})


def read_mps(text: str) -> Read:
    section, names, binary = "", list[str](), set[str]()
    senses, columns = {}, list[tuple[str, str, float]]()
    right, bounds, squares = dict[str, float](), dict[str, str](), list[tuple[str, str, float]]()
    integer = False
    for line in text.splitlines():
        words = line.split()
        if line.startswith("*"):
            continue
        if not line.startswith(" "):
            section = words[0]
        elif section == "ROWS":
            senses[words[1]] = words[0]
        elif section == "COLUMNS" and words[1] == "'MARKER'":
            integer = words[2] == "'INTORG'"
        elif section == "COLUMNS":
            if words[0] not in names:
                names.append(words[0])
                binary |= {words[0]} if integer else set()
            columns.append((words[0], words[1], float(words[2])))
        elif section == "RHS":
            right[words[1]] = float(words[2])
        elif section == "BOUNDS":
            bounds[words[2]] = words[0]
        elif section == "QUADOBJ":
            squares.append((words[0], words[1], float(words[2])))
    place = {name: at for at, name in enumerate(names)}
    n = len(names)
    quadratic, linear = np.zeros((n, n)), np.zeros(n)
    for i, j, value in squares:
        quadratic[place[i], place[j]] = quadratic[place[j], place[i]] = value
    terms: dict[str, dict[int, float]] = {name: {} for name, sense in senses.items() if sense != "N"}
    for name, row, value in columns:
        if senses[row] == "N":
            linear[place[name]] = value
        else:
            terms[row][place[name]] = value
    rows = [
        (
            entries,
            right.get(row, 0.0) if senses[row] in "EG" else -np.inf,
            right.get(row, 0.0) if senses[row] in "EL" else np.inf,
        )
        for row, entries in terms.items()
    ]
    free = np.array([bounds[name] == "FR" for name in names])
    return Read(names, quadratic, linear, rows, np.where(free, -np.inf, 0.0), np.where(free, np.inf, 1.0), binary)


def read_lp(text: str) -> Read:
    assert max(map(len, text.splitlines())) <= 255
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("\\"))
    parts = re.split(r"^(Minimize|Subject To|Bounds|Binaries|End)$", plain, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    binary = sections["Binaries"].split()
    free = [line.split()[0] for line in sections.get("Bounds", "").strip().splitlines()]
    names = binary + free
    place = {name: at for at, name in enumerate(names)}
    n = len(names)

    def linear_terms(words: list[str]) -> Iterator[tuple[int, float]]:
        for sign, value, name in zip(words[::3], words[1::3], words[2::3], strict=True):
            yield place[name], float(sign + value)

    objective = sections["Minimize"].split("cost:")[1]
    before, _, rest = objective.partition("[")
    linear, quadratic = np.zeros(n), np.zeros((n, n))
    words = before.split()
    for at, value in linear_terms(words[:-1] if words[-1:] == ["+"] else words):
        linear[at] = value
    inside, _, after = rest.partition("]")
    assert after.split() == ["/", "2"]
    words = inside.replace("^2", "^ 2").split()
    while words:
        sign, value, name, operator, other, *words = words
        if operator == "^":
            quadratic[place[name], place[name]] = float(sign + value)
        else:
            quadratic[place[name], place[other]] = quadratic[place[other], place[name]] = 0.5 * float(sign + value)
    rows = []
    for row in re.split(r"^ (?=\w+:)", sections["Subject To"].strip("\n"), flags=re.MULTILINE)[1:]:
        *words, sense, right = row.split(":")[1].split()
        left = float(right) if sense in ("=", ">=") else -np.inf
        rows.append((dict(linear_terms(words)), left, float(right) if sense in ("=", "<=") else np.inf))
    unbound = np.array([name in free for name in names])
    low, high = np.where(unbound, -np.inf, 0.0), np.where(unbound, np.inf, 1.0)
    return Read(names, quadratic, linear, rows, low, high, set(binary))


READERS: dict[str, Callable[[str], Read]] = {"lp": read_lp, "mps": read_mps, "qplib": read_qplib}


def point(read: Read, problem: SelectionProblem, mask: np.ndarray) -> np.ndarray:
    """The point of a file that a mask and its best weights are."""
    values = {f"x{at + 1}": float(removed) for at, removed in enumerate(mask)}
    if problem.objective == "joint":
        w, v = problem.weights, problem.refit(mask).weights
        taken = np.where(w == 0.0, -v, (w - v) / np.where(w == 0.0, 1.0, w))
        values |= {f"u{at + 1}": float(u) for at, u in enumerate(taken)}
    return np.array([values[name] for name in read.names])


def small(objective: str, *, gradient: bool = False, n: int = 9, zeros: int = 0) -> SelectionProblem:
    block = random_block(5, n, n + 3, damping=0.05, gradient=gradient)
    if zeros:
        weights = block.weights.clone()
        weights[:zeros] = 0.0
        block = solvers.QuadraticBlock(weights, block.factor, block.damping, block.gradient)
    return SelectionProblem([block], n_prune=n // 2, objective=objective)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("objective", ["selection", "joint"])
@pytest.mark.parametrize(("gradient", "zeros"), [(False, 0), (True, 2)])
def test_every_mask_of_a_file_has_the_value_it_has_here(
    tmp_path: Path, suffix: str, objective: str, gradient: bool, zeros: int
) -> None:
    problem = small(objective, gradient=gradient, zeros=zeros)
    solvers.export_problem(problem, tmp_path / f"p.{suffix}")
    read = READERS[suffix]((tmp_path / f"p.{suffix}").read_text())
    assert read.binary == {f"x{at + 1}" for at in range(problem.n)}
    values = {}
    for removed in itertools.combinations(range(problem.n), problem.n_prune):
        mask = np.zeros(problem.n, dtype=bool)
        mask[list(removed)] = True
        z = point(read, problem, mask)
        assert read.feasible(z)
        values[removed] = problem.value(mask)
        assert read.value(z) == pytest.approx(values[removed], rel=1e-9, abs=1e-12)
    best = solvers.solve(problem, "brute_force")
    assert min(values, key=values.__getitem__) == tuple(np.flatnonzero(best.pruned))
    # One weight too many is not allowed, nor is a removed weight that is still there.
    mask = np.zeros(problem.n, dtype=bool)
    mask[: problem.n_prune] = True
    wrong = point(read, problem, mask)
    wrong[read.names.index(f"x{problem.n}")] = 1.0
    assert not read.feasible(wrong)
    if objective == "joint":
        wrong = point(read, problem, mask)
        wrong[read.names.index("u3")] += 0.5
        assert not read.feasible(wrong)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["mlpnet-60-selection-k48", "resnet20-40-joint-k20"])
def test_instances_of_the_package_keep_their_values(tmp_path: Path, suffix: str, name: str) -> None:
    one = solvers.load_instance(name)
    problem = one.problem()
    solvers.export_problem(problem, tmp_path / f"{name}.{suffix}", scale=1024.0)
    read = READERS[suffix]((tmp_path / f"{name}.{suffix}").read_text())
    rng = np.random.default_rng(0)
    for mask in (one.mask, *(rng.permutation(one.mask) for _ in range(5))):
        z = point(read, problem, mask)
        assert read.feasible(z)
        assert read.value(z) == pytest.approx(1024.0 * problem.value(mask), rel=1e-9)


@pytest.mark.parametrize("suffix", ["lp", "mps"])
@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_scip_finds_the_optimum_in_a_file(tmp_path: Path, suffix: str, objective: str) -> None:
    scip = pytest.importorskip("pyscipopt")
    problem = small(objective, gradient=True)
    solvers.export_problem(problem, tmp_path / f"p.{suffix}", scale=64.0)
    model = scip.Model()
    model.hideOutput()
    model.readProblem(str(tmp_path / f"p.{suffix}"))
    model.optimize()
    best = solvers.solve(problem, "brute_force")
    assert model.getStatus() == "optimal"
    assert model.getObjVal() / 64.0 == pytest.approx(best.objective, rel=1e-4)
    chosen = {v.name for v in model.getVars() if v.name.startswith("x") and model.getVal(v) > 0.5}
    assert chosen == {f"x{at + 1}" for at in np.flatnonzero(best.pruned)}


@pytest.mark.parametrize("suffix", ["lp", "mps"])
@pytest.mark.parametrize("objective", ["selection", "joint"])
def test_highs_reads_the_same_numbers(tmp_path: Path, suffix: str, objective: str) -> None:
    highspy = pytest.importorskip("highspy")
    problem = small(objective)
    solvers.export_problem(problem, tmp_path / f"p.{suffix}")
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    assert highs.readModel(str(tmp_path / f"p.{suffix}")) == highspy.HighsStatus.kOk
    model = highs.getModel()
    n, start = model.hessian_.dim_, model.hessian_.start_
    lower = np.zeros((n, n))
    for column in range(n):
        for at in range(start[column], start[column + 1]):
            lower[model.hessian_.index_[at], column] = model.hessian_.value_[at]
    whole = lower + np.tril(lower, -1).T
    mine = READERS[suffix]((tmp_path / f"p.{suffix}").read_text())
    order = [mine.names.index(name) for name in model.lp_.col_names_]
    np.testing.assert_allclose(whole, mine.quadratic[np.ix_(order, order)], rtol=1e-14)
    np.testing.assert_allclose(model.lp_.col_cost_, mine.linear[order], rtol=1e-14)
    assert len(model.lp_.row_names_) == len(mine.rows)


def test_a_scale_is_said_and_multiplies_the_objective_alone(tmp_path: Path) -> None:
    problem = small("joint")
    solvers.export_problem(problem, tmp_path / "a.lp")
    solvers.export_problem(problem, tmp_path / "b.lp", scale=8.0)
    plain, scaled = (read_lp((tmp_path / name).read_text()) for name in ("a.lp", "b.lp"))
    np.testing.assert_allclose(scaled.quadratic, 8.0 * plain.quadratic, rtol=1e-15)
    assert scaled.rows == plain.rows and "times 8.0" in (tmp_path / "b.lp").read_text()


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    problem = small("joint")
    with pytest.raises(UnknownNameError, match=r"'nl'.*lp, mps, qplib"):
        solvers.export_problem(problem, tmp_path / "p.nl")
    with pytest.raises(OptionError, match="scale must be positive"):
        solvers.export_problem(problem, tmp_path / "p.lp", scale=0.0)
    with pytest.raises(ProblemError, match="problem"):
        solvers.export_problem(problem.blocks[0], tmp_path / "p.lp")  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="not of a Groups"):
        solvers.export_problem(problem.with_budget(solvers.Groups(np.arange(9) // 3, 1)), tmp_path / "p.lp")
    with pytest.raises(OutputError, match="cannot write"):
        solvers.export_problem(problem, tmp_path / "nowhere" / "p.lp")
    flat = solvers.QuadraticBlock(np.ones(6), np.ones((1, 6)))
    singular = SelectionProblem([flat], n_prune=3, objective="joint")
    with pytest.raises(SingularHessianError, match="damping"):
        solvers.export_problem(singular, tmp_path / "p.lp")
    solvers.export_problem(singular.with_objective("selection"), tmp_path / "p.lp")
    assert read_lp((tmp_path / "p.lp").read_text()).quadratic.sum() == 36.0
