"""Making, proving and exporting instances, with the network that is always there."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cbs_opt.cli.shell import run_app
from experiments.commands.instances import app
from experiments.runs import instances as runs
from experiments.runs.instances import scale_of
from solvers import Instance, available_instances, load_block, load_instance
from solvers.instances import BLOCKS, read_instances
from solvers.storage import block_digest


def run(*arguments: str) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        run_app(app, arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small blocks of the digits network, cut by the command."""
    monkeypatch.setattr(runs, "FAMILIES", {"digits": ("digits-mlp", 60)})
    monkeypatch.setattr(runs, "SIZES", (8, 12))
    assert run("cut", "--family", "digits", "--folder", str(tmp_path / "made")) == 0
    return tmp_path / "made"


def test_blocks_are_cut_rounded_and_proven(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads((folder / BLOCKS).read_text())
    assert list(about) == ["digits-8", "digits-12"] and about["digits-8"]["network"] == "digits-mlp"
    for name, entry in about.items():
        block = load_block(folder / f"{name}.npz")
        assert block_digest(block) == entry["digest"] and str(block.factor.dtype) == "torch.float32"
        assert entry["place"].startswith("weights ")
    command = ["prove", "--folder", str(folder), "--machine", "a test", "--solver"]
    assert run(*command, "magnitude") == 0
    rough = read_instances(folder)
    assert len(rough) == 12 and not any(one.proven for one in rough.values())
    assert run(*command, "brute_force", "--instances", "digits-8-*") == 0
    proven = read_instances(folder)
    for name, one in proven.items():
        assert one.proven == (one.n == 8) and one.best <= rough[name].best
        assert one.bounded is None or (one.bounded.solver, one.bounded.machine) == ("brute_force", "a test")
    capsys.readouterr()
    # What is proven is left alone.
    assert run(*command, "brute_force", "--instances", "digits-8-*") == 0
    assert "0 instances" in capsys.readouterr().out
    assert run("list", "--folder", str(folder), "digits-8-*") == 0
    assert "6 instances, 6 of them proven" in capsys.readouterr().out


def test_a_proof_that_cannot_be_true_stops_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prove", "--folder", str(folder), "--instances", "digits-8-selection-k4", "--solver"]
    assert run(*command, "brute_force") == 0
    path = folder / "optima.json"
    (record,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**record, "best": 2.0 * record["best"], "bound": 2.0 * record["best"]}]))
    assert run(*command, "brute_force", "--again") == 2
    assert "one of the bounds is wrong" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("suffix", ["lp", "mps", "qplib"])
def test_instances_are_exported_with_what_is_known(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "files"
    assert run("export", str(out), "--instances", "*-20-joint-k10", "--format", suffix, "--scaled") == 0
    with open(out / "index.csv") as stream:
        index = list(csv.DictReader(stream))
    assert {path.name for path in out.iterdir()} == {"index.csv", *(row["file"] for row in index)} and index
    for row in index:
        one: Instance = load_instance(row["file"].removesuffix(f".{suffix}"))
        assert float(row["best"]) == one.best and 500.0 <= float(row["best_in_file"]) <= 1024.0
        assert float(row["scale"]) * one.best == float(row["best_in_file"]) and row["proven"] == str(one.proven)
        assert f"times {float(row['scale'])!r}" in (out / row["file"]).read_text()


def test_the_table_of_the_documents_is_that_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "measured" / "instances.md").read_text()
    assert run("list", "--markdown") == 0
    assert text[text.index("| block") :] == capsys.readouterr().out
    assert text.count("\n| ") == 2 + len(available_instances()) // 3


def test_scales_are_powers_of_two() -> None:
    assert scale_of(0.0) == 1.0 and scale_of(1.0) == 512.0 and scale_of(-3e-7) * 3e-7 < 1024.0


def test_bad_input_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["cut", "--family", "lenet", "--folder", str(tmp_path)], "--family is one of"),
        (["prove", "--folder", str(tmp_path)], "no instance of"),
        (["export", str(tmp_path), "--instances", "lenet-*"], "no instance is called so"),
        (["export", str(tmp_path), "--format", "nl"], "unknown format"),
        (["export", str(tmp_path / "file" / "in")], "cannot write"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
