"""Kill runs at random instants, start them again until they end, and compare with a run that was left alone.

    python -m tests.trust.kills --kills 100

Three kinds of runs: a staged pruning with a journal, a comparison of solvers that appends rows to a file, and a table
of stages with its training before it. A kill is SIGKILL, so that nothing can be tidied up. The end must be the same to
the last bit: weights and masks, or rows but for their times; and no partial file may be left under a final name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import solvers

_STAGED = """
import hashlib, sys
import torch
from torch.nn import functional as F
import cbs_opt
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5)).eval()
data = torch.randn(2000, 20), torch.randint(0, 5, (2000,))
options = cbs_opt.StageOptions(n_stages=8, n_polish=2)
fisher = cbs_opt.FisherOptions(n_rows=200, batch_size=4)
result = cbs_opt.prune(
    model, data, F.cross_entropy, sparsity=0.9, solver="obs", stages=options, fisher=fisher, journal=sys.argv[1]
)
print(hashlib.sha256(result.weights.tobytes() + result.pruned.tobytes()).hexdigest())
"""


@dataclass(frozen=True)
class Task:
    """A command that writes to a folder, and what must be the same in the end."""

    name: str
    command: Callable[[Path], list[str]]
    digest: Callable[[Path, str], str]


def _rows_digest(folder: Path, output: str) -> str:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    keys = [row["key"] for row in rows]
    assert len(keys) == len(set(keys)), "a row was written twice"
    same = ("key", "solver", "n_prune", "objective_kind", "objective", "refit_objective", "bound", "status")
    told = sorted(json.dumps([row.get(name) for name in same]) for row in rows)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _table_digest(folder: Path, output: str) -> str:
    rows = [json.loads(line) for line in next(folder.rglob("table.jsonl")).read_text().splitlines()]
    told = [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in rows]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def tasks(blocks: Path) -> list[Task]:
    """A staged run, a comparison on small random blocks that are written to a folder, and a table."""
    random_numbers = np.random.default_rng(0)
    for number in range(4):
        block = solvers.QuadraticBlock(random_numbers.normal(size=24), random_numbers.normal(size=(12, 24)), 1e-2)
        solvers.save_block(blocks / f"block-{number}.npz", block)
    table = ["-m", "experiments.tables", "digits-mlp", "--seed", "0", "--until", "0.8"]
    compare = ["-m", "experiments.compare", "--solver", "obd", "greedy_ls", "tabu", "branch_bound"]
    return [
        Task("staged", lambda out: ["-c", _STAGED, str(out)], lambda out, output: output.split()[-1]),
        Task(
            "compare",
            lambda out: [*compare, "--blocks", str(blocks), "--time-limit", "20", "--output-dir", str(out)],
            _rows_digest,
        ),
        Task("tables", lambda out: [*table, "--output-dir", str(out)], _table_digest),
    ]


def run_killed(task: Task, folder: Path, kills: int, seed: int = 0) -> tuple[int, bool]:
    """(kills that hit a run, whether the end is that of a run left alone)."""
    chance = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    began = time.monotonic()
    expected = task.digest(alone, _run(task, alone, None)[1])
    usual, hits, ends = time.monotonic() - began, 0, 0
    while hits < kills:
        ended, output = _run(task, killed, chance.uniform(0.3, 1.0) * usual)
        hits += not ended
        if ended:
            # Done before it was killed: once more from the start.
            if task.digest(killed, output) != expected:
                return hits, False
            ends += 1
            killed = folder / f"killed-{ends}"
    while not (done := _run(task, killed, None))[0]:
        pass
    left = [path.name for path in killed.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    return hits, task.digest(killed, done[1]) == expected and len(left) <= hits


def _run(task: Task, out: Path, seconds: float | None) -> tuple[bool, str]:
    """(whether it ended, what it printed); killed after a time."""
    process = subprocess.Popen(
        [sys.executable, *task.command(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What is trained or decoded on the way is killed and resumed as well.
        env={**os.environ, "CBS_OPT_CACHE": f"{out}-cache"},
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, ""
    if process.returncode:
        raise RuntimeError(f"{task.name} failed:\n{output}\n{errors}")
    return True, output


def main() -> None:
    """Run all tasks and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for task in tasks(Path(name)):
            folder = Path(name) / task.name
            folder.mkdir()
            hits, same = run_killed(task, folder, given.kills, given.seed)
            print(f"{task.name}: {hits} kills, the end is {'the same' if same else 'ANOTHER'}", flush=True)
            if not same:
                sys.exit(1)


if __name__ == "__main__":
    main()
