"""Options with several values, one-line errors."""

from __future__ import annotations

import pytest
import typer

from cbs_opt.cli.shell import expand_values, run_app
from solvers.errors import DataError

SEVERAL = ("--solver", "--sparsity", "--seed")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--solver a b --seed 0", "--solver a --solver b --seed 0"),
        ("--solver=a b", "--solver=a --solver b"),
        ("--sparsity 0.9 -1 --first-order", "--sparsity 0.9 --sparsity -1 --first-order"),
        ("--damping 1e-3 x --seed 1 2 3", "--damping 1e-3 x --seed 1 --seed 2 --seed 3"),
        ("--seed 0 --seed 1 2", "--seed 0 --seed 1 --seed 2"),
        ("--seed", "--seed"),
        ("", ""),
    ],
)
def test_expand(given: str, expected: str) -> None:
    assert expand_values(given.split(), SEVERAL) == expected.split()


def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def command(seed: list[int]) -> None:
        raise DataError(f"seeds {seed}\n  are [bold]bad")

    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments=["0", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: seeds [0, 1] are [bold]bad\n"


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_app(app, arguments=[])
    assert caught.value.code == 130
