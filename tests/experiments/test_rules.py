"""Published rules, one combination each, through the command that tables them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cbs_opt.cli.shell import run_app
from experiments.commands.rules import app
from experiments.runs.rules import RULES, Rule, chosen_rules
from solvers import available_solvers, make_solver
from solvers.errors import UnknownNameError

FEW = ["--rule", "Wanda", "--rule", "ALPS", "--rule", "CBS", "--samples", "60", "--sparsity", "0.6"]


def invoke(*arguments: object) -> object:
    """The exit code."""
    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments=[str(argument) for argument in arguments])
    return caught.value.code


def test_every_rule_is_a_combination_that_exists() -> None:
    assert {make_solver(rule.solver).name for rule in RULES} <= set(available_solvers())
    assert len({rule.name for rule in RULES}) == len(RULES)
    named = {"obd", "sweep", "admm", "best_swap", "obs", "woodfisher", "iht", "greedy_ls", "magnitude"}
    assert named <= {make_solver(rule.solver).name for rule in RULES}


def test_rules_run_on_a_layer_and_on_the_network_and_are_not_run_again(tmp_path: Path) -> None:
    assert invoke(*FEW, "--output-dir", tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["error"] is None for row in rows)
    for row in rows:
        assert row["refit_objective"] <= row["objective"] * (1 + 1e-9)
        assert row["train_loss"] > 0.0
    table = (tmp_path / "table.md").read_text()
    assert "Layer fc1 alone" in table and "The network" in table and "each row" in table
    assert table.count("| ALPS") == 2
    assert invoke(*FEW, "--output-dir", tmp_path) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "table.md").read_text().count("| CBS") == 2


def test_names_that_do_not_exist_are_refused_with_those_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(*FEW, "--layer", "fc9", "--output-dir", tmp_path) == 2
    assert "fc1" in capsys.readouterr().err
    with pytest.raises(UnknownNameError, match="Wanda"):
        chosen_rules(["Wandas"])
    assert chosen_rules([]) == RULES
    budget = Rule("x", "", "kfac", "admm", "none").budget
    assert budget == "layers by loss" != Rule("x", "", "layer_inputs", "obd", "none", "rows").budget
