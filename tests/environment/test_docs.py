"""What the documents say about the repository is there: files, and options of commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from cbs_opt.cli import main
from experiments.commands import compare, instances, rules, run, scaling, tables, train

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Written by docs/hooks.py when the site is built.
BUILT = [(ROOT / "docs" / "reference" / name).resolve() for name in ("solvers.md", "settings.md")]
FILES = [
    path.relative_to(ROOT).as_posix()
    for top in ("solvers", "cbs_opt", "experiments", "tests")
    for path in (ROOT / top).rglob("*")
]
COMMANDS = {
    "run": run,
    "compare": compare,
    "instances": instances,
    "tables": tables,
    "rules": rules,
    "scaling": scaling,
    "train": train,
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_folders_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"`((?:solvers|cbs_opt|experiments)/[\w/]*|[\w/]+\.py)`", text)
    missing = [name for name in named if not any(f"/{file}".endswith(f"/{name.rstrip('/')}") for file in FILES)]
    targets = {link: (document.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", text)}
    links = [link for link, target in targets.items() if not target.exists() and target not in BUILT]
    assert not missing and not links


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_in_commands_exist(document: Path) -> None:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL)).replace("\\\n", " ")
    for name, arguments in re.findall(r"python -m experiments\.(\w+)(.*)", blocks):
        command = typer.main.get_command(COMMANDS[name].app)
        command = getattr(command, "commands", {}).get(arguments.split()[0], command)
        known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<= )--[\w-]+", arguments)) <= known
    for name, arguments in re.findall(r"cbs-opt (\w+)(.*)", blocks):
        command = typer.main.get_command(main.app).commands[name]
        known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<= )--[\w-]+", arguments)) <= known
