"""The instances of the package: what is stored is there, is whole, and is true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import solvers
from solvers import BackendError, Instance, OptionError, ProblemError, UnknownNameError
from solvers.instances import BLOCKS, FOLDER, OPTIMA, Claim, read_instances
from solvers.storage import block_digest

NAMES = solvers.available_instances()
BLOCK_NAMES = sorted(json.loads((FOLDER / BLOCKS).read_text()))
#: Solvers that end at once on 60 weights; an exact one among them.
QUICK_SOLVERS = ("greedy_ls", "best_swap", "branch_bound[threads=1]", "obs", "joint_ls")
#: All that need no other library and no gradient, but for the one that looks at every mask.
ALL_SOLVERS = [
    name
    for name in solvers.available_solvers()
    if name not in ("brute_force", "gradient_magnitude") and not solvers.make_solver(name).requires
]
CLAIM = Claim("nobody", "0", 1.0, 1.0, None, "a machine", "2026-01-01")


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_blocks_are_those_that_were_cut(name: str) -> None:
    about = json.loads((FOLDER / BLOCKS).read_text())[name]
    block = solvers.load_block(FOLDER / f"{name}.npz")
    assert (block.n, block.damping, block_digest(block)) == (about["n"], about["damping"], about["digest"])
    # The file is the instance: nothing of it was rounded away when it was stored.
    assert str(block.factor.dtype) == "torch.float32" and block.gradient is None
    assert bool((block.weights == block.weights.float()).all())
    assert sum(one.startswith(f"{name}-") for one in NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_the_best_value_is_that_of_the_best_mask_and_above_its_bound(name: str) -> None:
    one = solvers.load_instance(name)
    problem = one.problem()
    assert one.name == name and problem.n_prune == one.n_prune == int(one.mask.sum())
    assert problem.value(one.mask) == pytest.approx(one.best, rel=1e-9, abs=0.0)
    assert one.bound <= one.best and (one.gap <= 1e-6) == one.proven
    assert one.found is not None and (one.bounded is not None) == np.isfinite(one.bound)
    if one.objective == "joint":
        # Less than what the same mask costs without an update of the others.
        assert one.best <= problem.selection_value(one.mask)


@pytest.mark.parametrize("name", [name for name in NAMES if solvers.load_instance(name).n <= 60])
def test_no_solver_beats_what_is_proven(name: str) -> None:
    one = solvers.load_instance(name)
    problem = one.problem()
    for spec in ALL_SOLVERS if one.n == 20 else QUICK_SOLVERS:
        capabilities = solvers.make_solver(spec).capabilities
        if solvers.Capability(one.objective) not in capabilities:
            continue
        limit = 2.0 if solvers.Capability.TIME_LIMIT in capabilities else None
        found = solvers.solve(problem, spec, time_limit=limit)
        assert found.objective >= one.bound
        assert found.bound <= one.best * (1.0 + 1e-9)


def test_values_agree_with_plain_linear_algebra() -> None:
    for name in solvers.available_instances("*-40-*"):
        one = solvers.load_instance(name)
        arrays = one.problem().arrays()
        hessian = arrays.factor.T @ arrays.factor + np.diag(np.broadcast_to(arrays.damping, one.n))
        step = np.where(one.mask, -arrays.weights, 0.0)
        kept = ~one.mask
        if one.objective == "joint":
            step[kept] = -np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, one.mask)] @ step[one.mask])
        assert 0.5 * step @ hessian @ step == pytest.approx(one.best, rel=1e-6)


def test_names_are_matched_and_unknown_ones_refused() -> None:
    assert solvers.available_instances("nothing-*") == ()
    assert set(solvers.available_instances("*-joint-*")) < set(NAMES)
    assert [solvers.load_instance(name).n for name in NAMES] == sorted(solvers.load_instance(name).n for name in NAMES)
    with pytest.raises(UnknownNameError, match="Did you mean"):
        solvers.load_instance(NAMES[0] + "0")
    with pytest.raises(OptionError, match="pattern"):
        solvers.available_instances(3)  # type: ignore[arg-type]


def test_records_can_be_written_and_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    records = [solvers.load_instance(name) for name in NAMES[:3]]
    records[0] = dataclasses.replace(records[0], bound=-np.inf, bounded=None)
    (tmp_path / OPTIMA).write_text(json.dumps([one.as_record() for one in records], allow_nan=False))
    read = read_instances(tmp_path)
    assert [dataclasses.replace(one, folder=FOLDER) for one in read.values()] == records
    assert not read[records[0].name].proven
    (tmp_path / OPTIMA).write_text('[{"block": "x"}]')
    with pytest.raises(ProblemError, match=r"optima\.json"):
        read_instances(tmp_path)


def test_a_record_takes_what_is_better_and_refuses_what_cannot_be() -> None:
    one = solvers.load_instance(NAMES[0])
    blank = Instance(one.block, one.n, one.n_prune, one.objective)
    assert blank.gap == np.inf and not blank.proven
    quick = solvers.solve(one.problem(), "magnitude")
    known = blank.improved(quick, CLAIM)
    assert (known.best, known.found, known.bounded) == (quick.objective, CLAIM, None)
    exact = solvers.solve(one.problem(), "branch_bound[threads=1]")
    better = dataclasses.replace(CLAIM, solver="branch_bound")
    known = known.improved(exact, better)
    assert known.proven and known.found == known.bounded == better and known.best == pytest.approx(one.best, rel=1e-9)
    # Nothing more is gained, so nobody's name changes.
    assert known.improved(exact, CLAIM) == known and known.improved(quick, CLAIM) == known
    with pytest.raises(BackendError, match="one of the bounds is wrong"):
        known.improved(dataclasses.replace(exact, objective=0.5 * exact.objective), CLAIM)
