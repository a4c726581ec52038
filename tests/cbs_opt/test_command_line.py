"""``cbs-opt``: one's own network from flags and files, what it refuses, and what it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import cbs_opt
from cbs_opt.cli import doctor, prune
from cbs_opt.cli.config import arguments, merged, read_config, write_config
from cbs_opt.cli.main import main
from cbs_opt.cli.schema import settings
from solvers import available_solvers

MODULE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def loader():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 4, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return [(x[i:i + 16], y[i:i + 16]) for i in range(0, 64, 16)]

def smoothed(output, target):
    return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

def broken():
    raise RuntimeError("not today")

ready, number = network(), 3
"""
BASE = ("--model", "mine:network", "--data", "mine:loader", "--loss", "cross_entropy", "--fisher-n-rows", "32")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ")
    return said.err


def test_pruned_as_in_python(folder, capsys) -> None:
    assert run("prune", *BASE, "--sparsity", ".8", "--solver", "obs[chunks=5]", "--output-dir", "out") == 0
    assert "weights kept" in capsys.readouterr().out
    import mine

    fisher = cbs_opt.FisherOptions(n_rows=32)
    model = mine.network().eval()
    options = {"sparsity": 0.8, "solver": "obs[chunks=5]", "fisher": fisher}
    expected = cbs_opt.prune(model, mine.loader(), F.cross_entropy, **options)
    loaded = cbs_opt.load("out", mine.network())
    assert (loaded.pruned == expected.pruned).all() and cbs_opt.check(loaded.model)
    x = mine.loader()[0][0]
    assert torch.equal(loaded.model.eval()(x), expected.model(x))
    assert loaded.settings == expected.settings


def test_a_file_says_the_same_as_flags_and_flags_go_first(folder, capsys) -> None:
    Path("prune.toml").write_text(
        'model = "mine:network"\ndata = "mine:loader"\nloss = "mine:smoothed"\noutput-dir = "out"\n'
        'sparsity = 0.5\nsolver = "obs"\n[fisher]\nn_rows = 16\nbatch_size = 2\n'
    )
    assert run("prune", "--config", "prune.toml", "--sparsity", "0.7", "--fisher-n-rows", "8") == 0
    found = json.loads(Path("out/settings.json").read_text())
    assert (found["sparsity"], found["fisher"]["n_rows"], found["fisher"]["batch_size"]) == (0.7, 8, 2)
    assert run("prune", "--config", "out/prune.toml", "--output-dir", "again") == 0
    assert json.loads(Path("again/settings.json").read_text()) == found
    masks, others = (cbs_opt.load_masks(f"{name}/masks.safetensors") for name in ("out", "again"))
    assert all(torch.equal(masks[name], others[name]) for name in masks)


def test_fine_tuning_by_a_number_a_table_and_flags_of_either_spelling(folder, capsys) -> None:
    flags = ("prune", *BASE, "--sparsity", "0.5", "--solver", "obs", "--output-dir")
    assert run(*flags, "out", "--fine-tune", "2", "--fine-tune-batch-size", "16", "--finetune-lr", "0.01") == 0
    assert "fine-tuning: held-out loss" in capsys.readouterr().out
    found = json.loads(Path("out/settings.json").read_text())["finetune"]
    assert (found["epochs"], found["batch_size"], found["lr"], found["train_mode"]) == (2.0, 16, 0.01, True)
    Path("a.toml").write_text("[finetune]\nepochs = 2\nbatch_size = 16\nlr = 0.01\n")
    assert run(*flags, "again", "--config", "a.toml") == 0
    assert run(*flags, "same", "--config", "out/prune.toml") == 0
    weights = [cbs_opt.load(name, __import__("mine").network()).weights for name in ("out", "again", "same")]
    assert (weights[0] == weights[1]).all() and (weights[0] == weights[2]).all()
    capsys.readouterr()
    assert "one of epochs and steps" in refused(capsys, *flags, "no", "--fine-tune", "1", "--fine-tune-steps", "3")
    assert run(*flags, "no", "--fine-tune", "2", "--dry-run") == 0
    assert "fine-tuning: 2 epochs of sgd" in capsys.readouterr().out and not Path("no").exists()
    assert "takes float" in refused(capsys, *flags, "no", "--fine-tune", "long")
    assert "Did you mean 'finetune'" in _of_file(capsys, "fine_tune = 3\n")
    # Both are gone with the folder's journal, and the run starts anew.
    assert run(*flags, "out", "--overwrite", "--fine-tune", "1", "--no-fine-tune-train-mode") == 0
    assert json.loads(Path("out/settings.json").read_text())["finetune"]["train_mode"] is False


def _of_file(capsys, text: str) -> str:
    Path("b.toml").write_text(text)
    capsys.readouterr()
    return refused(capsys, "prune", *BASE, "--sparsity", "0.5", "--output-dir", "no", "--config", "b.toml")


def test_every_setting_has_a_flag_and_its_words() -> None:
    named = {setting.key: setting for setting in settings()}
    assert {"sparsity", "budget", "fisher_n_rows", "layer_inputs_damping", "stages", "stages_schedule"} <= set(named)
    assert {"distill", "distill_steps", "calibration_n_samples", "min_kept", "batch_norm"} <= set(named)
    assert not {"model", "progress", "journal", "fisher"} & set(named)
    assert [setting.key for setting in named.values() if not setting.help] == []
    assert named["min_kept"].parse("20") == 20 and named["min_kept"].parse("0.1") == 0.1
    assert named["time_limit"].parse("none") is None and named["include"].several


def test_groups_merge_and_are_written_down_again(tmp_path) -> None:
    (tmp_path / "a.toml").write_text('stages = 4\ninclude = ["a*", "b"]\n[distill]\nsteps = 3\n')
    config = read_config(tmp_path / "a.toml", ())
    found = merged(config, {"stages_schedule": "linear", "distill_lr": "1e-3", "distill": True, "exclude": ["c", "d"]})
    assert found["stages"] == {"n_stages": 4, "schedule": "linear"}
    assert found["distill"] == {"steps": 3, "lr": 1e-3}
    assert found["include"] == ("a*", "b") and found["exclude"] == ("c", "d")
    made = arguments(found)
    assert made["stages"] == cbs_opt.StageOptions(n_stages=4, schedule="linear")
    assert made["distill"] == cbs_opt.Distill(steps=3, lr=1e-3)
    assert merged({}, {"allocation": ["uniform"]})["allocation"] == "uniform"
    assert merged({}, {"stages_levels": ["0.5"]})["stages"] == {"levels": (0.5,)}
    assert arguments(merged({}, {"distill": True}))["distill"] == cbs_opt.Distill()
    assert arguments(merged({"stages": {"levels": [0.1, 0.2]}}, {"stages": "5"}))["stages"].n_stages == 5
    write_config(tmp_path / "b.toml", {"model": 'a "quoted" é\\ name', "sequences": 3}, found)
    again = read_config(tmp_path / "b.toml", ("model", "sequences"))
    assert again.pop("model") == 'a "quoted" é\\ name' and again.pop("sequences") == 3
    assert arguments(again) == made


def test_staged_runs_are_resumed_and_finished_ones_left(folder, capsys, monkeypatch) -> None:
    flags = ("prune", *BASE, "--solver", "obs", "--stages", "3", "--stages-n-polish", "0", "--output-dir", "out")
    real, done = prune.prune, []

    def interrupted(*args: object, progress=None, **kwargs: object):
        def tick(number: int, total: int) -> None:
            done.append(number)
            if number == 2 and len(done) == 2:
                raise KeyboardInterrupt

        return real(*args, progress=tick, **kwargs)

    monkeypatch.setattr(prune, "prune", interrupted)
    assert run(*flags) == 130 and done == [1, 2]
    capsys.readouterr()
    assert "interrupted run" in refused(capsys, *flags)
    assert run(*flags, "--resume") == 0
    assert "were read from the journal" in capsys.readouterr().out and done == [1, 2, 3]
    assert run(*flags, "--resume") == 0
    assert "nothing was done" in capsys.readouterr().out
    assert "a pruned network" in refused(capsys, *flags)
    assert "sparsity = 0.9, not 0.5" in refused(capsys, *flags, "--resume", "--sparsity", "0.5")
    assert run(*flags, "--overwrite", "--sparsity", "0.5") == 0
    assert done[3:] == [1, 2, 3] and json.loads(Path("out/settings.json").read_text())["sparsity"] == 0.5


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--stages", "2"),
        ("--solver", "magnitude", "--update", "none"),
        ("--curvature", "kfac", "--solver", "sweep"),
    ],
)
def test_a_dry_run_says_what_it_takes_and_changes_nothing(folder, capsys, more) -> None:
    assert run("prune", *(BASE[:-2] if "kfac" in more else BASE), *more, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "nothing was changed" in said and "22 weights stay" in said
    assert run("prune", *(BASE[:-2] if "kfac" in more else BASE), *more, "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 228 and found["n_kept"] == 22 and [row["n"] for row in found["layers"]] == [36, 192]
    assert sum(found["memory"].values()) < found["memory_available"]
    assert {path.name for path in folder.iterdir()} <= {"mine.py", "__pycache__"}


def test_json_on_success_and_failure(capsys) -> None:
    assert run("prune", *BASE, "--solver", "obs", "--output-dir", "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["n_kept"] == 22 and found["settings"]["solver"] == "obs" and found["output_dir"] == "out"
    assert run("prune", *BASE, "--solver", "obss", "--json", "--output-dir", "new") == 2
    assert json.loads(capsys.readouterr().out)["type"] == "UnknownNameError" and not Path("new").exists()
    assert run("inspect", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["report"] == found["report"]
    assert run("inspect", "out") == 0
    assert "all as they were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "mine:netwrk"), "Did you mean 'network'"),
        (("--model", "nowhere:x:y"), "No module named 'nowhere'"),
        (("--model", "mine"), "takes package.module:attribute, not 'mine'"),
        (("--model", "mine:broken"), "RuntimeError: not today"),
        (("--model", "mine:number"), "gives a int"),
        (("--data", "mine:broken"), "RuntimeError: not today"),
        (("--loss", "cros_entropy"), "Did you mean 'cross_entropy'"),
        (("--loss", "mine:number"), "no function"),
        (("--solver", "greedy_lss"), "Did you mean 'greedy_ls'"),
        (("--sparsity", "x"), "--sparsity takes float, not 'x'"),
        (("--sparsity", "1.5"), "sparsity must lie in"),
        (("--sparsty", "1.5"), "--sparsity"),
        (("--fisher-n-rows", "0"), "n_rows"),
        (("--config", "missing.toml"), "cannot read missing.toml"),
        (("--output-dir", "mine.py"), "is a file"),
        (("--hf", "there"), "give one of --model and --hf"),
        (("--text", "there"), "give one of --data and --text"),
        (("--sequences", "0"), "--sequences must be at least 1"),
    ],
)
def test_bad_flags_are_told_in_one_line(capsys, arguments, message) -> None:
    assert message in refused(capsys, "prune", *BASE, "--output-dir", "out", *arguments)
    assert not Path("out").exists()


def test_what_is_missing_is_asked_for(capsys) -> None:
    assert "which network?" in refused(capsys, "prune")
    assert "which data?" in refused(capsys, "prune", "--model", "mine:network")
    assert "where to?" in refused(capsys, "prune", *BASE)
    assert "give --loss" in refused(capsys, "prune", *BASE[:4], "--output-dir", "out")
    assert "tokenizer of --hf" in refused(capsys, "prune", *BASE[:2], "--text", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('modle = "x"', "Did you mean 'model'"),
        ("[fisher]\nn_row = 3", "Did you mean 'n_rows'"),
        ("fisher = 3", "write them under [fisher]"),
        ("[sparsity]\nx = 1", "no table"),
        ("x = = 3", "not TOML"),
        ("sparsity = 'a'", "sparsity must be"),
        ("model = 3", "model must be text"),
        ("sequences = 'a'", "sequences must be an integer"),
        ("[stages]\nn_stages = 'a'", "stages: n_stages"),
    ],
)
def test_bad_files_are_told_in_one_line(capsys, text, message) -> None:
    Path("bad.toml").write_text(text + "\n")
    flags = () if text.startswith("model") else BASE
    assert message in refused(capsys, "prune", *flags, "--output-dir", "out", "--config", "bad.toml")


def test_solvers_and_their_descriptions(capsys) -> None:
    assert run("solvers", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == available_solvers()
    assert run("solvers") == 0 and run("describe", "greedy_ls") == 0
    assert "window" in capsys.readouterr().out
    assert run("describe", "obs", "--json") == 0
    assert json.loads(capsys.readouterr().out)["available"] is True
    assert "Did you mean 'obs'" in refused(capsys, "describe", "obss")


def test_the_doctor_says_which_solvers_work_and_why_not(capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "available_solvers", lambda: ["magnitude", "obs"])
    assert run("doctor") == 0
    assert "highspy" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "solve", lambda *_, **__: 1 / 0)
    assert run("doctor", "--json") == 1
    found = json.loads(capsys.readouterr().out)["solvers"]
    assert [row["works"] for row in found] == [False, False] and "ZeroDivisionError" in found[0]["says"]


def test_help_and_completion_without_running_anything() -> None:
    done = subprocess.run([sys.executable, "-m", "cbs_opt"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "doctor" in done.stdout and "Traceback" not in done.stderr
    import os

    environment = {**os.environ, "_CBS_OPT_COMPLETE": "complete_bash", "COMP_WORDS": "cbs-opt des", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cbs_opt"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.split() == ["describe"]


def test_the_version_is_the_one_that_is_installed(capsys) -> None:
    from importlib.metadata import version

    assert run("--version") == 0
    assert capsys.readouterr().out.split() == ["cbs-opt", version("cbs-opt")] == ["cbs-opt", cbs_opt.__version__]


def test_a_language_model_from_a_folder_and_a_text(folder, capsys) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = [f"w{i}" for i in range(28)]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate([*words, "?"])}, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained("net")
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained("net")
    Path("text.txt").write_text(" ".join(words[int(i)] for i in torch.randint(0, 28, (200,))))
    flags = ("prune", "--hf", "net", "--text", "text.txt", "--sequences", "8", "--sequence-length", "16")
    capsys.readouterr()
    assert run(*flags, "--sparsity", "0.5", "--output-dir", "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["curvature"] == "layer_inputs" and found["settings"]["solver"] == "sweep"
    assert found["settings"]["exclude"] == ["lm_head"] and found["report"]["loss_pruned"] > 0
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert cbs_opt.check(model, "out") and len(transformers.AutoTokenizer.from_pretrained("out")) == 29
    assert run(*flags, "--sparsity", "0.5", "--output-dir", "out", "--resume") == 0
    capsys.readouterr()
    much = refused(capsys, *flags, "--output-dir", "x", "--sequence-length", "300")
    assert "the network's 32 positions" in much
    Path("short.txt").write_text("w1 w2 w3")
    assert "3 tokens" in refused(capsys, *flags, "--text", "short.txt", "--output-dir", "x")
    assert "no config.json" in refused(capsys, "prune", "--hf", ".", "--text", "text.txt", "--output-dir", "x")


def test_exporting_what_was_pruned(folder, capsys) -> None:
    assert run("prune", *BASE, "--solver", "obs", "--output-dir", "out") == 0
    assert run("export", "out") == 0
    assert "tensors packed" in capsys.readouterr().out
    state = cbs_opt.load_packed("out/exported.packed.safetensors")
    import mine

    plain = mine.network()
    plain.load_state_dict(state)
    assert cbs_opt.check(plain, "out")
    flags = ("export", "out", "--format", "torch", "--output", "net.pt2")
    assert "which network?" in refused(capsys, *flags)
    assert "give --data" in refused(capsys, *flags, "--model", "mine:network")
    assert run(*flags, "--model", "mine:network", "--data", "mine:loader", "--json") == 0
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-5
    x = mine.loader()[0][0][:5]
    loaded = cbs_opt.load("out", mine.network().eval())
    torch.testing.assert_close(torch.export.load("net.pt2").module()(x), loaded.model(x))
    assert "Did you mean 'onnx'" in refused(capsys, "export", "out", "--format", "onx")
