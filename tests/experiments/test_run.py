"""``experiments.run`` from the command line to results.jsonl, on the embedded digits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.cli.shell import run_app
from experiments.commands.run import app
from experiments.datasets import load_dataset
from experiments.networks import EXPERIMENTS, DigitsMLP, get_experiment
from experiments.networks.checkpoints import save_checkpoint
from experiments.networks.evaluation import evaluate
from experiments.networks.load import load_network
from experiments.networks.training import train
from experiments.runs.bench import Bench, Listener
from experiments.runs.options import RunOptions, SweepOptions, Task
from experiments.runs.rows import ResultsFile
from experiments.runs.sweep import Sweep
from solvers import registry
from tests.experiments.test_results import REQUIRED

QUICK = ["--fisher-samples", "100", "--damping", "1e-3"]


def run(*arguments: str | Path) -> None:
    """Run to success."""
    assert leaves_with(*arguments) == 0


def leaves_with(*arguments: str | Path) -> object:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments=[str(a) for a in arguments])
    return caught.value.code


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The single line a bad command ends with."""
    assert leaves_with(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run over two of everything."""
    folder = tmp_path_factory.mktemp("run")
    run(
        "--solver",
        "magnitude",
        "obd",
        "--sparsity",
        "0.5",
        "0.9",
        "--seed",
        "0",
        "1",
        "--update",
        "none",
        "combinatorial",
        *QUICK,
        "--output-dir",
        folder,
    )
    return folder


def test_a_row_for_every_combination(finished: Path) -> None:
    rows = rows_of(finished)
    found = {(r["solver"], r["sparsity"], r["seed"], r["update"]) for r in rows}
    assert len(rows) == len(found) == 16
    for row in rows:
        assert row.keys() >= REQUIRED
        assert row["experiment"] == "digits-mlp" and row["status"] in ("feasible", "optimal")
        assert row["n_kept"] == int(2720 * (1 - row["sparsity"])) and row["n_weights"] == 2720
        assert row["refit_objective"] <= row["objective"] * (1 + 1e-9)
    png = (finished / "accuracy-digits-mlp.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5_000


@pytest.mark.parametrize("curvature", ["layer_inputs", "kfac"])
def test_layers_one_by_one(curvature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--solver", "sweep", "obd", "--sparsity", "0.7", "--curvature", curvature, "--fisher-samples", "300"]
    run(*asked, "--output-dir", tmp_path)
    rows = rows_of(tmp_path)
    assert [(r["solver"], r["n_kept"], r["extra"]["curvature"]) for r in rows] == [
        ("sweep", 816, curvature),
        ("obd", 816, curvature),
    ]
    assert all(0.0 < r["refit_objective"] <= r["objective"] * (1 + 1e-9) and r["accuracy"] > 50.0 for r in rows)
    # What is there is not measured again.
    run(*asked, "--output-dir", tmp_path)
    assert rows_of(tmp_path) == rows
    assert "--stages" in fails(capsys, *asked, "--stages", "2", "--output-dir", tmp_path)


@pytest.mark.parametrize("asked", [[], ["--curvature", "layer_inputs"], ["--stages", "2"]])
def test_distillation_makes_rows_of_its_own(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*asked, *QUICK[:2], "--solver", "obd", "--sparsity", "0.9", "--output-dir", str(tmp_path)]
    run(*asked)
    capsys.readouterr()
    for lr in ("1e-3", "2e-3"):
        run(*asked, "--distill", "20", "--distill-lr", lr, "--distill-loss", "given")
    assert "20 steps of distillation" in capsys.readouterr().out
    plain, *distilled = rows_of(tmp_path)
    assert "seconds_distill" not in plain and len({row["key"] for row in (plain, *distilled)}) == 3
    for row in distilled:
        assert row["distill_loss_after"] < row["distill_loss_before"] and row["n_kept"] == plain["n_kept"]
        assert row["train_loss_undistilled"] == pytest.approx(plain["train_loss"]) and row["seconds_distill"] > 0.0
        assert row["extra"]["distill"]["lr"] in (1e-3, 2e-3)


class NormedDigits(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


@pytest.mark.parametrize("asked", [["--refit"], ["--curvature", "layer_inputs"]])
def test_rows_show_accuracy_with_and_without_new_batch_norms(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    experiment = replace(EXPERIMENTS["digits-mlp"], name="digits-norm", model=NormedDigits, sha256="", reference=False)
    monkeypatch.setitem(EXPERIMENTS, "digits-norm", experiment)
    data, model = load_dataset("digits"), NormedDigits()
    train(model, data.train, replace(experiment.recipe, epochs=3))
    save_checkpoint(model.eval(), tmp_path / "norm.safetensors")
    command = ["--experiment", "digits-norm", "--checkpoint", tmp_path / "norm.safetensors", *asked, *QUICK[:2]]
    command += ["--solver", "magnitude", "--sparsity", "0.9", "--output-dir", tmp_path]
    run(*command)
    assert "old norms" not in capsys.readouterr().out
    run(*command, "--batch-norm", "reestimate")
    plain, row = rows_of(tmp_path)
    assert row["accuracy_old_norms"] == plain["accuracy"] != row["accuracy"] and row["key"] != plain["key"]
    assert row["train_loss_old_norms"] == pytest.approx(plain["train_loss"], rel=1e-5) != row["train_loss"]
    assert row["extra"]["batch_norm"] == "reestimate" and "old norms" in capsys.readouterr().out


def test_updates_share_the_mask_and_the_seed_decides(finished: Path) -> None:
    rows: dict[tuple, Mapping[str, Any]] = {
        (r["solver"], r["sparsity"], r["seed"], r["update"]): r for r in rows_of(finished)
    }
    for solver in ("magnitude", "obd"):
        for seed in (0, 1):
            none, full = (rows[solver, 0.9, seed, update] for update in ("none", "combinatorial"))
            assert none["objective"] == full["objective"] and none["refit_objective"] == full["refit_objective"]
            none, full = (rows[solver, 0.5, seed, update] for update in ("none", "combinatorial"))
            assert full["train_loss"] < none["train_loss"]
    # Magnitude knows nothing of the sample, so only what is measured on it differs.
    assert rows["magnitude", 0.9, 0, "none"]["accuracy"] == rows["magnitude", 0.9, 1, "none"]["accuracy"]
    assert rows["obd", 0.9, 0, "none"]["objective"] != rows["obd", 0.9, 1, "none"]["objective"]


def test_rows_agree_with_the_one_call_interface(finished: Path) -> None:
    experiment = get_experiment("digits-mlp")
    dataset = load_dataset("digits")
    model = load_network(experiment, dataset).model
    result = cbs_opt.prune(
        model,
        dataset.train.sample(5_000, 1).batch(slice(None)),
        F.cross_entropy,
        sparsity=0.9,
        solver="obd",
        fisher=cbs_opt.FisherOptions(n_rows=100, damping=1e-3),
        seed=1,
        device="cpu",
    )
    row = next(
        r
        for r in rows_of(finished)
        if (r["solver"], r["sparsity"], r["seed"], r["update"]) == ("obd", 0.9, 1, "combinatorial")
    )
    assert row["objective"] == pytest.approx(result.report.objective, rel=1e-9)
    assert row["refit_objective"] == pytest.approx(result.report.refit_objective, rel=1e-6)
    assert row["train_loss"] == pytest.approx(result.report.loss_pruned, rel=1e-6)
    assert row["accuracy"] == pytest.approx(evaluate(result.model, dataset.test).accuracy, abs=1e-9)


def test_magnitude_keeps_the_largest(finished: Path) -> None:
    dataset = load_dataset("digits")
    model = load_network(get_experiment("digits-mlp"), dataset).model
    weights = [getattr(model, name).weight for name in ("fc1", "fc2", "fc3")]
    bar = np.sort(np.concatenate([w.detach().abs().numpy().ravel() for w in weights]))[2720 - 271]
    with torch.no_grad():
        for w in weights:
            w[w.abs() < float(bar)] = 0
    row = next(r for r in rows_of(finished) if (r["solver"], r["sparsity"], r["update"]) == ("magnitude", 0.9, "none"))
    assert row["accuracy"] == pytest.approx(evaluate(model, dataset.test).accuracy, abs=1e-9)


def test_finished_rows_are_not_made_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").write_bytes((finished / "results.jsonl").read_bytes())
    made: list[Task] = []
    real = Bench.measure

    def spy(self: Bench, task: Task, key: str) -> Any:
        made.append(task)
        return real(self, task, key)

    monkeypatch.setattr(Bench, "measure", spy)
    run("--solver", "obd", "--sparsity", "0.5", "0.7", *QUICK, "--output-dir", tmp_path)
    assert made == [Task("obd", 0.7, 0, "combinatorial")]
    assert "there already" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 17
    made.clear()
    run("--solver", "obd", "--sparsity", "0.5", *QUICK, "--overwrite", "--output-dir", tmp_path)
    assert len(made) == 1 and len(rows_of(tmp_path)) == 18
    # Other settings are another measurement.
    run("--solver", "obd", "--sparsity", "0.5", *QUICK, "--update-scale", "0.5", "--output-dir", tmp_path)
    assert len(made) == 2


def test_interruption_keeps_finished_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Bench.measure

    def stop_at_the_third(self: Bench, task: Task, key: str) -> Any:
        if task.sparsity == 0.7:
            raise KeyboardInterrupt
        return real(self, task, key)

    monkeypatch.setattr(Bench, "measure", stop_at_the_third)
    command = ["--solver", "magnitude", "--sparsity", "0.5", "0.6", "0.7", *QUICK, "--output-dir", tmp_path]
    assert leaves_with(*command) == 130
    assert [r["sparsity"] for r in rows_of(tmp_path)] == [0.5, 0.6]
    assert str(tmp_path / "results.jsonl") in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setattr(Bench, "measure", real)
    run(*command)
    assert [r["sparsity"] for r in rows_of(tmp_path)] == [0.5, 0.6, 0.7]


def test_the_main_job_with_its_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--solver", "greedy_ls", "--sparsity", "0.8", "--output-dir", tmp_path)
    out = capsys.readouterr().out
    (row,) = rows_of(tmp_path)
    assert row["solver"] == "greedy_ls" and row["update"] == "combinatorial"
    assert row["accuracy"] > 90
    assert "magnitude, no update (for comparison)" in out and "dense network" in out
    assert str(tmp_path / "accuracy-digits-mlp.png") in out.replace("\n", "")


def test_published_rounding(tmp_path: Path) -> None:
    run(
        "--solver",
        "magnitude",
        "--update",
        "none",
        "--no-refit",
        "--sparsity",
        "0.9",
        "--sparsity-rounding",
        "published",
        *QUICK,
        "--output-dir",
        tmp_path,
    )
    (row,) = rows_of(tmp_path)
    # Chunks of ceil(2720 / 52) = 53 weights, 51 of them full, 6 kept of each.
    assert row["n_kept"] == 51 * 6 and row["refit_objective"] is None


def test_stages(tmp_path: Path) -> None:
    run("--solver", "obs", "--sparsity", "0.9", "--stages", "3", "--output-dir", tmp_path)
    (row,) = rows_of(tmp_path)
    assert row["stages"] == 3 and row["n_kept"] == 271 and row["objective_kind"] == "joint"
    assert row["fisher_batch"] == EXPERIMENTS["digits-mlp"].staged.fisher.batch_size
    assert row["accuracy"] > 93
    assert not any((tmp_path / "journals").iterdir())


def test_stages_go_on_from_their_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--solver", "obs", "--sparsity", "0.9", "--stages", "2"]
    run(*command, "--output-dir", tmp_path / "straight")
    real = Bench._progress

    def stop_after_two(self: Bench, what: str) -> Any:
        def told(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        return told

    monkeypatch.setattr(Bench, "_progress", stop_after_two)
    assert leaves_with(*command, "--output-dir", tmp_path / "cut") == 130
    monkeypatch.setattr(Bench, "_progress", real)
    run(*command, "--output-dir", tmp_path / "cut")
    one, two = rows_of(tmp_path / "straight")[0], rows_of(tmp_path / "cut")[0]
    assert one["accuracy"] == two["accuracy"] and one["train_loss"] == two["train_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "3", "--update", "none"], "update must be 'combinatorial', not 'none'"),
        (["--stages", "3", "--damping", "0"], "positive damping"),
        (["--stages", "3", "--update-scale", "0.5"], "leave update_scale=0.5 out"),
        (["--stages", "3", "--time-limit", "5"], "leave time_limit out"),
        (["--solver", "greedy_sl"], "greedy_ls"),
        (["--solver", "greedy_ls[windwo=3]"], "window"),
        (["--solver", "greedy_ls[window=-3]"], "-3"),
        (["--experiment", "digit-mlp"], "digits-mlp"),
        (["--sparsity", "1.0"], "[0, 1), the fraction of weights removed, not 1.0"),
        (["--sparsity", "90"], "write 0.9 for 90 %"),
        (["--sparsity", "-0.5"], "not -0.5"),
        (["--sparsity", "nan"], "not nan"),
        (["--damping", "-1e-3"], "not -0.001"),
        (["--damping", "nan"], "not nan"),
        (["--fisher-samples", "0"], "not 0"),
        (["--fisher-batch", "-2"], "not -2"),
        (["--stages", "0"], "at least 1, got 0"),
        (["--seed", "-1"], "not -1"),
        (["--seed", "1", "1"], "names 1 twice"),
        (["--update", "combinatoral"], "combinatorial"),
        (["--objective", "both"], "both"),
        (["--blocks", "per_layr"], "per_layer"),
        (["--blocks", "fixed:0"], "fixed:0"),
        (["--allocation", "evenly"], "evenly"),
        (["--update-scale", "inf"], "inf"),
        (["--time-limit", "0"], "0.0"),
        (["--device", "banana"], "banana"),
        (["--include", "conv*"], "conv*"),
        (["--exclude", "fc9"], "fc9"),
        (["--exclude", "*"], "no prunable layer"),
        (["--fisher-samples", "2000"], "2000 rows"),
        (["--distill", "0"], "steps must be a positive integer"),
        (["--distill", "5", "--distill-loss", "kll"], "kl"),
        (["--distill-lr", "1e-3"], "--distill STEPS"),
        (["--towards-dense", "1"], "layer_inputs"),
        (["--batch-norm", "renew"], "reestimate"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--measure-only"], "give --gradients DIR"),
        (["--stages", "3", "--gradients", "kept"], "leave --gradients out"),
        (["--masks", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--masks", "nowhere.safetensors", "--sparsity", "0.9"], "chosen already"),
        (["--backend", "cluster", "--sparsity", "0.9"], "--backend cluster"),
        (["--solver", "brute_force"], "brute_force"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--experiment", "mlpnet-mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *arguments, "--output-dir", tmp_path)
    assert not (tmp_path / "results.jsonl").exists()


def test_output_which_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--output-dir" in fails(capsys, "--output-dir", tmp_path / "file")


def test_checkpoint_truncated_or_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(DigitsMLP(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert "truncated" in fails(capsys, "--checkpoint", path, "--output-dir", tmp_path / "out")
    model = DigitsMLP()
    with torch.no_grad():
        model.fc1.weight[0, 0] = float("nan")
    save_checkpoint(model, path)
    assert "NaN" in fails(capsys, "--checkpoint", path, "--output-dir", tmp_path / "out")


def test_given_checkpoint_is_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DigitsMLP()
    save_checkpoint(model, tmp_path / "net.safetensors")
    run(
        "--solver",
        "magnitude",
        "--update",
        "none",
        "--sparsity",
        "0",
        "--checkpoint",
        tmp_path / "net.safetensors",
        *QUICK,
        "--no-refit",
        "--output-dir",
        tmp_path,
    )
    (row,) = rows_of(tmp_path)
    assert row["accuracy"] == row["dense_accuracy"] == evaluate(model, load_dataset("digits").test).accuracy


def test_module_entry_points() -> None:
    for module in ("experiments.run", "experiments.train"):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "--data-dir" in done.stdout


def test_literature_figures_of_magnitude_pruning(data_dir: Path, tmp_path: Path) -> None:
    run(
        "--experiment",
        "mlpnet-mnist",
        "--solver",
        "magnitude",
        "--update",
        "none",
        "--no-refit",
        "--fisher-samples",
        "10",
        "--data-dir",
        data_dir,
        "--output-dir",
        tmp_path,
    )
    assert [round(r["accuracy"], 2) for r in rows_of(tmp_path)] == [93.93, 93.78, 93.62, 92.89, 90.30, 83.64, 32.25]
    assert {r["dense_accuracy"] for r in rows_of(tmp_path)} == {93.97}
    assert tuple(r["sparsity"] for r in rows_of(tmp_path)) == EXPERIMENTS["mlpnet-mnist"].sparsities


@pytest.fixture
def crashing_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plug-in whose solver takes its process down, for this process and its children."""
    plugin = tmp_path / "plugin"
    about = plugin / "crashing-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: crashing\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[cbs_opt.solvers]\ncrash = crashing:CrashingSolver\n")
    (plugin / "crashing.py").write_text(_CRASHING)
    monkeypatch.syspath_prepend(plugin)
    registry._third_party.cache_clear()
    yield
    registry._third_party.cache_clear()


_CRASHING = '''
"""A solver that crashes."""
import os
from dataclasses import dataclass
from solvers.baselines.magnitude import MagnitudeSolver

@dataclass(frozen=True)
class CrashingSolver(MagnitudeSolver):
    """Crash."""
    name = "crash"
    def run(self, problem, context):
        os.abort()
'''


@pytest.mark.usefixtures("crashing_solver")
def test_masks_are_made_in_children_and_one_that_fails_costs_its_rows(finished: Path, tmp_path: Path) -> None:
    sweep = ["--sparsity", "0.5", "0.9", "--update", "none", "combinatorial", *QUICK, "--save-masks"]
    command = ["--solver", "obd", "crash", *sweep, "--output-dir", tmp_path]
    run(*command, "--workers", "2", "--no-reference")
    rows = rows_of(tmp_path)
    failed = [row for row in rows if row["error"] is not None]
    assert len(rows) == 8 and len(failed) == 4
    assert all(row["solver"] == "crash" and "the child process died" in row["error"] for row in failed)
    key = ("sparsity", "update", "objective", "accuracy")
    expected = {tuple(r[k] for k in key) for r in rows_of(finished) if r["solver"] == "obd" and r["seed"] == 0}
    assert {tuple(row[k] for k in key) for row in rows if row["error"] is None} == expected
    # What failed is made again, and nothing else.
    run("--solver", "obd", *sweep, "--output-dir", tmp_path, "--workers", "2", "--no-reference")
    assert len(rows_of(tmp_path)) == 8
    assert {path.stem for path in (tmp_path / "masks").iterdir()} == {r["key"] for r in rows if r["error"] is None}


def test_a_sweep_goes_where_joblib_is_told(tmp_path: Path) -> None:
    options = RunOptions(sweep=SweepOptions(solver=("magnitude", "obd"), sparsity=(0.5,)))
    with joblib.parallel_config(backend="loky", n_jobs=2):
        rows = list(Sweep(options, ResultsFile(tmp_path), Listener()).run())
    assert {row["solver"] for row in rows} == {"magnitude", "obd"} and all(row["error"] is None for row in rows)
    assert len(rows_of(tmp_path)) == 2


def test_measuring_choosing_and_updating_apart_gives_the_rows_of_one_run(tmp_path: Path) -> None:
    scales = ["--update", "none", "combinatorial", "single", "--update-scale", "0", "0.5", "1"]
    run("--solver", "obd", "--sparsity", "0.9", *scales, *QUICK, "--output-dir", tmp_path / "one")
    kept = ["--gradients", tmp_path / "kept", *QUICK]
    run(*kept, "--measure-only", "--output-dir", tmp_path / "measure")
    assert not (tmp_path / "measure" / "results.jsonl").exists()
    chosen = [
        "--solver",
        "obd",
        "--sparsity",
        "0.9",
        "--update",
        "none",
        "--save-masks",
        "--output-dir",
        tmp_path / "choose",
    ]
    run(*kept, *chosen)
    (mask,) = (tmp_path / "choose" / "masks").iterdir()
    run(*kept, "--masks", mask, *scales, "--output-dir", tmp_path / "update")
    figures = ("update", "update_scale", "n_kept", "accuracy", "train_loss", "objective", "refit_objective")
    one, apart = ([tuple(row[f] for f in figures) for row in rows_of(tmp_path / at)] for at in ("one", "update"))
    assert one == apart and len(one) == 7


def test_gradients_of_something_else_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--gradients", tmp_path / "kept", "--output-dir", tmp_path / "out"]
    run(*kept, *QUICK, "--measure-only")
    assert "100 of 1 samples there" in fails(capsys, *kept, "--fisher-samples", "50", "--measure-only")
    other = DigitsMLP()
    save_checkpoint(other, tmp_path / "other.safetensors")
    assert "network" in fails(capsys, *kept, *QUICK, "--checkpoint", tmp_path / "other.safetensors", "--measure-only")


def test_magnitude_without_update_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gradients were taken")

    monkeypatch.setattr("cbs_opt.engine.workspace.sample_gradients", refuse)
    run("--solver", "magnitude", "--update", "none", "--no-refit", "--sparsity", "0.9", "--output-dir", tmp_path)
    (row,) = rows_of(tmp_path)
    assert row["n_kept"] == 271 and row["objective"] is None and row["seconds_gradients"] == 0.0


def test_a_bound_certifies_every_mask(tmp_path: Path) -> None:
    arguments = ["--solver", "magnitude", "obd", "--sparsity", "0.9", "--update", "none", "--no-refit", *QUICK]
    run(*arguments, "--output-dir", tmp_path)
    run(*arguments, "--output-dir", tmp_path, "--bound", "frank_wolfe")
    certified = [row for row in rows_of(tmp_path) if row["bound"] is not None]
    assert {row["solver"] for row in certified} == {"magnitude", "obd"}
    assert all(row["bound"] <= row["objective"] and row["gap"] >= 0 for row in certified)
    assert len({row["bound"] for row in certified}) == 1


def test_an_unknown_bound_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "frank_wolfe" in fails(capsys, "--bound", "frank_wolf", "--output-dir", tmp_path)


def test_sensitivity_shows_every_layer_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        *QUICK[:2], "--curvature", "layer_inputs", "--sensitivity", "--sparsity", "0.9", "0.5", "--output-dir", tmp_path
    )
    shown = capsys.readouterr().out
    layers = cbs_opt.find_layers(DigitsMLP()).names
    assert all(name in shown for name in (*layers, "50.0%", "90.0%", "100.0%", "divergence"))
    assert (tmp_path / "sensitivity-digits-mlp.png").stat().st_size > 1000
    assert not (tmp_path / "results.jsonl").exists()
    assert "--curvature layer_inputs" in fails(capsys, "--sensitivity", "--output-dir", tmp_path)


def test_budgets_make_rows_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--solver", "obd", "--sparsity", "0.5", "--budget", "flops:0.5", "2:4", *QUICK, "--update", "none"]
    run(*command, "--output-dir", tmp_path)
    run(*command, "--output-dir", tmp_path)
    rows = rows_of(tmp_path)
    assert [row["extra"].get("budget") for row in rows] == [None, "flops:0.5", "2:4"]
    assert [row["n_kept"] * 2 == row["n_weights"] for row in rows] == [True] * 3
    assert rows[1]["flops_kept"] <= 0.5 and rows[1]["split_bound"] <= rows[1]["split"] <= 1.01 * rows[1]["split_bound"]
    said = capsys.readouterr().out
    assert "split gap" in said and "obd, 2:4" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "watts:0.5"], "known forms"),
        (["--budget", "2:4", "2:4"], "--budget names '2:4' twice"),
        (["--budget", "2:5"], "does not fit"),
        (["--budget", "2:4", "--sparsity-rounding", "published"], "leave --sensitivity and --sparsity-rounding out"),
        (["--budget", "2:4", "--masks", "some.safetensors"], "chosen already"),
    ],
)
def test_budgets_that_cannot_be_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *arguments, "--output-dir", tmp_path)


def test_measured_shares_of_costs_are_found_once(tmp_path: Path) -> None:
    command = ["--budget", "flops:0.4", "--curvature", "layer_inputs", "--allocation", "measured", *QUICK[:2]]
    run("--solver", "sweep", "obd", *command, "--update", "combinatorial", "--output-dir", tmp_path)
    rows = rows_of(tmp_path)
    assert len(rows) == 2 and len(list((tmp_path / "shares").iterdir())) <= 2
    for row in rows:
        assert 0.38 < row["flops_kept"] <= 0.4
        assert row["split_bound"] <= row["split"] <= 1.01 * row["split_bound"]
