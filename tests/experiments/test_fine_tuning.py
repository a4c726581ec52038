"""``experiments.run --fine-tune``: rows of their own, what they say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.test_run import QUICK, fails, rows_of, run


@pytest.mark.parametrize("asked", [[], ["--curvature", "layer_inputs"], ["--stages", "2"]])
def test_fine_tuning_makes_rows_of_its_own(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*asked, *QUICK[:2], "--solver", "obd", "--sparsity", "0.9", "--output-dir", str(tmp_path)]
    run(*asked)
    capsys.readouterr()
    for optimizer in ("sgd", "adamw"):
        run(*asked, "--fine-tune", "3", "--fine-tune-optimizer", optimizer, "--fine-tune-batch", "32")
    assert "3 epochs" in capsys.readouterr().out
    plain, *tuned = rows_of(tmp_path)
    assert "seconds_fine_tune" not in plain and len({row["key"] for row in (plain, *tuned)}) == 3
    for row in tuned:
        assert row["fine_tune_loss_after"] <= row["fine_tune_loss_before"] or "--stages" in asked
        assert row["fine_tune_steps_taken"] > 0 and row["seconds_fine_tune"] > 0.0
        assert row["n_kept"] == plain["n_kept"] and row["extra"]["finetune"]["epochs"] == 3
        if "--stages" not in asked:
            assert row["train_loss_untuned"] == pytest.approx(plain["train_loss"], rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fine-tune", "0"], "epochs must be positive"),
        (["--fine-tune-lr", "1e-3"], "--fine-tune EPOCHS"),
        (["--fine-tune", "1", "--fine-tune-schedule", "cosin"], "cosine"),
        (["--fine-tune", "1", "--fine-tune-precision", "fp16", "--device", "cpu"], "CPU"),
        (["--fine-tune", "1", "--distill", "3"], "two ways to train"),
    ],
)
def test_bad_fine_tuning_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, *arguments, "--output-dir", tmp_path)
