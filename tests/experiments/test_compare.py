"""The comparison of solvers: rows, resumption, best-known values, refusals, failures, tables and plots."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cbs_opt.cli.shell import run_app
from experiments.commands.compare import app
from experiments.reports.gaps import best_values, gap_over_time, summary
from experiments.runs.cutting import CutOptions, cut_blocks
from experiments.runs.instances import matching
from experiments.runs.rows import ResultsFile
from experiments.runs.solves import (
    Comparison,
    SolveOptions,
    Task,
    find_blocks,
    gap_between,
    measure,
    plan,
    stored_optima,
)
from solvers import OptionError, ProblemError, available_instances, load_block, load_instance, save_block
from solvers.exact.isolation import Worker
from solvers.instances import FOLDER
from tests.conftest import random_block


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two blocks and the optimum of one instance, better than can be."""
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    for seed, n in ((1, 8), (2, 10)):
        save_block(blocks / f"b{n}.npz", random_block(seed, n, n, damping=0.01))
    entry = {"block": "b8", "n": 8, "n_prune": 4, "objective": "selection", "gradient": False, "best": 1e-9}
    (blocks / "optima.json").write_text(json.dumps([entry, {**entry, "block": "elsewhere"}]))
    return blocks


def run(*arguments: str) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    return int(ended.value.code or 0)


def rows_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_the_command_writes_rows_table_and_plots_and_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--blocks", str(folder), "--fraction", "0.5", "--objective", "selection", "joint", "--workers", "2"]
    assert run("--solver", "magnitude", "brute_force", *arguments, "--output-dir", str(output)) == 0
    rows = rows_of(output)
    assert len(rows) == 8
    for row in rows:
        assert {
            "block",
            "n_prune",
            "objective",
            "bound",
            "gap",
            "status",
            "refit_objective",
            "seconds",
            "best_known",
            "gap_to_best",
            "solver",
            "seed",
            "trace",
        } <= set(row)
    exact = [row for row in rows if row["solver"] == "brute_force"]
    # A bound is rounded down.
    assert all(row["status"] == "optimal" and 0.0 <= row["gap"] <= 1e-12 for row in exact)
    assert {row["objective_kind"] for row in rows} == {"selection", "joint"}
    names = {path.name for path in output.iterdir()}
    assert {"table.md", "gap-vs-time-selection.png", "profile-joint.png"} <= names
    assert (output / "profile-joint.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert run("--solver", "magnitude", "brute_force", "obd", *arguments, "--output-dir", str(output)) == 0
    assert "8 of them done before" in capsys.readouterr().out
    assert len(rows_of(output)) == 8 + sum(row["solver"] == "obd" for row in rows_of(output))


def test_bad_input_is_refused_with_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    for arguments, message in (
        (["--solver", "magnitude", "--blocks", str(folder), "--from", "digits-mlp"], "--blocks DIR and --from"),
        (["--solver", "magnitud", "--blocks", str(folder)], "Did you mean 'magnitude'"),
        (["--solver", "magnitude", "--blocks", str(tmp_path / "nowhere")], "no .npz blocks"),
        (["--solver", "magnitude", "--blocks", str(folder), "--fraction", "1.5"], "between 0 and 1"),
        (["--solver", "magnitude", "--blocks", str(folder), "--objective", "both"], "unknown objective"),
        (["--solver", "magnitude", "--blocks", str(folder), "--time-limit", "-1"], "positive seconds"),
        (["--solver", "magnitude", "--blocks", str(folder), "--backend", "cluster"], "--backend cluster"),
        (["--solver", "magnitude", "--from", "digits-mlp", "--block-size", "1"], "--block-size must be at least 2"),
        (["--solver", "magnitude", "--blocks", str(folder), "--workers", "0"], "--workers must be"),
    ):
        assert run(*arguments, "--output-dir", output) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1


def test_what_a_solver_cannot_do_is_left_out(folder: Path) -> None:
    found = find_blocks(folder)
    tasks, left_out = plan(
        found,
        SolveOptions(
            ("ortools_cpsat",),
            (0.5,),
            (
                3,
                9,
            ),
            (
                "selection",
                "joint",
            ),
            (
                0,
                1,
            ),
            5.0,
        ),
    )
    assert {(t.n, t.n_prune) for t in tasks} == {(8, 4), (8, 3), (10, 5), (10, 3), (10, 9)}
    assert {t.objective_kind for t in tasks} == {"selection"} and {t.seed for t in tasks} == {0}
    assert left_out and all("joint" in reason for reason in left_out)


def test_seeds_multiply_randomised_solvers_only(folder: Path) -> None:
    tasks, _ = plan(
        find_blocks(folder),
        SolveOptions(
            (
                "random",
                "magnitude",
            ),
            (0.5,),
            (),
            ("selection",),
            (
                0,
                1,
                2,
            ),
            None,
        ),
    )
    assert sorted(t.seed for t in tasks if t.solver == "random") == [0, 0, 1, 1, 2, 2]
    assert [t.seed for t in tasks if t.solver == "magnitude"] == [0, 0]
    assert len({t.key for t in tasks}) == len(tasks)


def test_stored_optima_count_as_best_known(folder: Path, tmp_path: Path) -> None:
    found = find_blocks(folder)
    stored = stored_optima(folder, found)
    assert list(stored.values()) == [1e-9]
    tasks, _ = plan(found, SolveOptions(("magnitude",), (0.5,), (), ("selection",), (0,), None))
    comparison = Comparison(tasks, {b.digest: b.path for b in found}, ResultsFile(tmp_path / "out"), stored, 1)
    rows = list(comparison.run())
    by_block = {row["block"]: row for row in rows}
    assert by_block["b8"]["best_known"] == 1e-9 and by_block["b8"]["gap_to_best"] > 1.0
    assert by_block["b10"]["gap_to_best"] == 0.0
    entries = summary(rows, best_values(rows, stored))
    assert [e["n"] for e in entries] == [8, 10] and entries[0]["found"] == 0.0 and entries[1]["found"] == 1.0
    (folder / "optima.json").write_text("{")
    with pytest.raises(ProblemError, match=r"optima\.json"):
        stored_optima(folder, found)


def test_failures_are_rows_and_are_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_blocks(folder)[:1]
    tasks, _ = plan(found, SolveOptions(("magnitude",), (0.5,), (), ("selection",), (0,), None))
    results = ResultsFile(tmp_path / "out")
    broken = Comparison(tasks, {found[0].digest: tmp_path / "gone.npz"}, results, {}, 1)
    (row,) = broken.run()
    assert row["error"].startswith("ProblemError: no block at") and row["gap_to_best"] is None
    again = Comparison(tasks, {found[0].digest: found[0].path}, results, {}, 1)
    assert again.missing == tasks
    (row,) = again.run()
    assert row["error"] is None
    assert not Comparison(tasks, {}, results, {}, 1).missing


def test_a_task_can_be_measured_in_a_child(folder: Path) -> None:
    block = find_blocks(folder)[0]
    task = Task(block.name, block.digest, block.n, 4, "joint", "brute_force", 0, None, False)
    with Worker() as worker:
        row = worker.call(measure, task, block.path)
    assert row["objective"] == pytest.approx(measure(task, block.path)["objective"], rel=1e-12)


def test_gaps() -> None:
    assert gap_between(2.0, 1.0) == 1.0 and gap_between(1.0, 1.0) == 0.0 and gap_between(-1.0, -2.0) == 0.5
    assert gap_between(1.0, 0.0) == np.inf
    row = {"trace": [[0.1, 4.0, None], [0.2, 3.0, None], [9.0, 0.5, None]], "seconds": 0.5, "objective": 2.0}
    gaps = gap_over_time(row, 1.0, np.array([0.05, 0.15, 0.3, 1.0]))
    assert np.isnan(gaps[0]) and gaps[1:].tolist() == [3.0, 2.0, 1.0]


def test_blocks_are_cut_from_a_network_once(tmp_path: Path) -> None:
    cut = cut_blocks("digits-mlp", tmp_path, CutOptions(12, 2, 40), seed=3)
    blocks = [load_block(path) for path in sorted(cut.glob("*.npz"))]
    assert [b.n for b in blocks] == [12, 12] and all(b.gradient is not None for b in blocks)
    before = [path.stat().st_mtime_ns for path in sorted(cut.glob("*.npz"))]
    assert cut_blocks("digits-mlp", tmp_path, CutOptions(12, 2, 40), seed=3) == cut
    assert [path.stat().st_mtime_ns for path in sorted(cut.glob("*.npz"))] == before
    with pytest.raises(OptionError, match="no layer"):
        cut_blocks("digits-mlp", tmp_path, CutOptions(10**6, 1, 4), seed=0)


def test_budgets_stand_beside_fractions_and_sizes_they_do_not_fit_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, solvers_ = tmp_path / "out", ("obd", "best_swap", "branch_bound", "brute_force")
    arguments = ["--blocks", str(folder), "--budget", "2:4", "1x2:0.5", "--objective", "selection", "joint"]
    assert run("--solver", *solvers_, *arguments, "--output-dir", str(output)) == 0
    rows, said = rows_of(output), capsys.readouterr().out
    assert "2:4, n=10" in said and "2 are left over" in said
    assert {(row["n"], row["budget"]) for row in rows} == {(8, "2:4"), (8, "1x2:0.5"), (10, "1x2:0.5")}
    best = {}
    for row in rows:
        kept = load_block(folder / f"{row['block']}.npz")
        assert row["n_prune"] in (kept.n // 2, 2 * (5 - int(2.5)))
        if row["solver"] in ("branch_bound", "brute_force"):
            assert row["status"] == "optimal"
            key = row["block"], row["budget"], row["objective_kind"]
            assert row["objective"] == pytest.approx(best.setdefault(key, row["objective"]), rel=1e-9)
    count = [r for r in rows if r["n"] == 8 and r["objective_kind"] == "joint" and r["status"] == "optimal"]
    assert count and run("--solver", *solvers_, *arguments, "--output-dir", str(output)) == 0
    assert len(rows_of(output)) == len(rows)


def test_a_budget_that_is_none_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--solver", "obd", "--blocks", str(folder), "--output-dir", str(tmp_path / "out")]
    assert run(*command, "--budget", "half") != 0
    assert "known forms" in " ".join(capsys.readouterr().err.split())


def test_blocks_of_what_layers_see_and_of_channels_are_cut(tmp_path: Path) -> None:
    from experiments.networks import get_experiment
    from experiments.networks.load import Source, open_network

    network = open_network(get_experiment("digits-mlp"), Source())
    rows = cut_blocks("digits-mlp", tmp_path, CutOptions(12, 3, 50, curvature="layer_inputs"), seed=1)
    weights = torch.cat([p.detach().double().flatten() for p in network.model.parameters() if p.ndim == 2])
    for path in sorted(rows.glob("*.npz")):
        block = load_block(path)
        at = int((weights.unfold(0, 12, 1) - block.weights).abs().sum(1).argmin())
        assert torch.equal(weights[at : at + 12], block.weights) and block.damping > 0.0
    cut = cut_blocks("digits-mlp", tmp_path, CutOptions(16, 2, 40, channels=True), seed=1)
    norms = [p.detach().double().norm(dim=1) for p in network.model.parameters() if p.ndim == 2]
    for path in sorted(cut.glob("*.npz")):
        block = load_block(path)
        assert any(len(n) == block.n and torch.allclose(n, block.weights) for n in norms)
    with pytest.raises(OptionError, match="2 layers have 3 to 16 channels, not 3"):
        cut_blocks("digits-mlp", tmp_path, CutOptions(16, 3, 40, channels=True), seed=1)
    with pytest.raises(OptionError, match="no layer of digits-mlp has so many inputs"):
        cut_blocks("digits-mlp", tmp_path, CutOptions(100, 1, 40, curvature="layer_inputs"), seed=1)
    with pytest.raises(OptionError, match="one of fisher, layer_inputs, not 'kfac'"):
        CutOptions(curvature="kfac")


def test_instances_of_the_package_need_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = ["--solver", "obd", "obs", "--output-dir", str(output)]
    assert run(*command, "--instances", "*-20-selection-*", "mlpnet-20-joint-k10") == 0
    rows, said = rows_of(output), capsys.readouterr().out
    names = {f"{row['block']}-{row['objective_kind']}-k{row['n_prune']}" for row in rows}
    assert names == {*available_instances("*-20-selection-*"), "mlpnet-20-joint-k10"}
    assert "are proven optima" in said
    for row in rows:
        known = load_instance(f"{row['block']}-{row['objective_kind']}-k{row['n_prune']}")
        assert row["best_known"] == pytest.approx(known.best, rel=1e-9)
        assert row["gap_to_best"] == pytest.approx(row["objective"] / known.best - 1.0, rel=1e-6, abs=1e-9)
    assert run(*command, "--instances", "nothing-*") == 2
    assert "no instance is called so" in capsys.readouterr().err
    assert run(*command, "--instances", "*", "--from", "digits-mlp") == 2
    assert "give one of --instances" in capsys.readouterr().err


def test_without_a_pattern_quickly_proven_instances_are_taken() -> None:
    chosen = {name: load_instance(name) for name in matching(())}
    assert chosen and all(one.n <= 100 and one.proven for one in chosen.values())
    assert {one.objective for one in chosen.values()} == {"selection", "joint"}
    tasks, _ = plan(find_blocks(FOLDER, {one.block for one in chosen.values()}), SolveOptions(("obd",)), chosen)
    assert {f"{t.block}-{t.objective_kind}-k{t.n_prune}" for t in tasks} <= set(chosen)
