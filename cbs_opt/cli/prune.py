"""``cbs-opt prune``: one's own network from the command line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import nn

from cbs_opt.cli import language, sources
from cbs_opt.cli.config import arguments, merged, read_config, write_config
from cbs_opt.cli.dry_run import show
from cbs_opt.cli.options import OWN, Own, signature
from cbs_opt.cli.shell import print_json, wide_console
from cbs_opt.engine.outline import outline
from cbs_opt.engine.settings import effective
from cbs_opt.prune import arranged, prune
from cbs_opt.report import folders
from cbs_opt.report.result import PruneResult
from solvers.errors import OptionError, OutputError

CONFIG, JOURNAL = "prune.toml", "journal"
#: What language models are pruned by where nothing else is said: their gradients would not fit into memory.
_LANGUAGE = {"curvature": "layer_inputs", "solver": "sweep"}


def command(**given: Any) -> None:
    """Prune a network, and write it with its masks, report and settings to a folder."""
    as_json, dry, resume, overwrite = (given.pop(key) for key in ("json", "dry_run", "resume", "overwrite"))
    path = given.pop("config")
    config = {} if path is None else read_config(path, OWN)
    own = Own.of({**config, **{key: given[key] for key in OWN if given[key] is not None}})
    asked = merged({key: value for key, value in config.items() if key not in OWN}, given)
    if own.hf is not None and "curvature" not in asked and "fisher" not in asked:
        asked = {**_LANGUAGE, **asked}
    heads = own.hf is not None and not {"include", "exclude"} & set(asked)
    made = arguments(asked)
    setup, choice, stages = arranged(made)
    if not dry:
        folder = _folder(own)
        here = {**own.plain(), **effective(setup, choice, stages)}
        if heads:
            # Which layer that is the network will say.
            del here["exclude"]
        if _done(folder, here, resume, overwrite):
            _finish(folder, as_json, 0.0, f"{folder} was pruned already; nothing was done")
            return
    model, data, loss, tokenizer = _opened(own)
    if heads and (head := language.head_of(model)):
        asked["exclude"] = made["exclude"] = (head,)
        setup, choice, stages = arranged(made)
    if dry:
        found = outline(model, data, loss, setup, choice, stages)
        print_json({"dry_run": True, **found.as_dict()}) if as_json else show(found, setup, wide_console())
        return
    if loss is None and not setup.layerwise:
        raise OptionError(
            f"curvature {setup.curvature!r} takes a loss; give --loss, e.g. --loss cross_entropy, or "
            "--curvature layer_inputs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / CONFIG, own.plain(), asked)
    started = time.perf_counter()
    with _progress(as_json) as tick:
        journal = folder / JOURNAL if stages is not None or choice.finetune is not None else None
        result = prune(model, data, loss, journal=journal, progress=tick, **made)
    _save(folder, result, own, tokenizer)
    _finish(folder, as_json, time.perf_counter() - started)


def _folder(own: Own) -> Path:
    if own.output_dir is None:
        raise OptionError("where to? give --output-dir DIR, or --dry-run to see what would be done")
    if own.output_dir.exists() and not own.output_dir.is_dir():
        raise OutputError(f"--output-dir {own.output_dir} is a file; give a folder")
    return own.output_dir


def _done(folder: Path, here: Mapping[str, Any], resume: bool, overwrite: bool) -> bool:
    """Whether the folder has the result of these settings already; raises OutputError for that of others."""
    if overwrite:
        (folder / folders.HEADER).unlink(missing_ok=True)
        if (folder / JOURNAL).exists():
            shutil.rmtree(folder / JOURNAL)
        return False
    finished, begun = (folder / folders.HEADER).exists(), any((folder / JOURNAL).glob("*"))
    if not finished and not begun:
        return False
    if not resume:
        what = "a pruned network" if finished else "the journal of an interrupted run"
        raise OutputError(f"{folder} holds {what}; give another folder, --resume to go on, or --overwrite")
    if not finished:
        # The journal refuses to go on with another run.
        return False
    written = read_config(folder / CONFIG, OWN) if (folder / CONFIG).exists() else {}
    before = {**{name: value for name, value in written.items() if name in OWN}, **folders.read(folder).settings}
    for name in sorted({*here, *OWN} - {"output_dir"}):
        if before.get(name) != here.get(name):
            raise OutputError(
                f"{folder} was pruned with {name} = {before.get(name)!r}, not {here.get(name)!r}; give another folder, "
                "or --overwrite"
            )
    return True


def _opened(own: Own) -> tuple[nn.Module, Any, Callable[..., Any] | None, Any]:
    """Network, data, loss and tokenizer."""
    tokenizer = None
    if own.hf is not None:
        model = language.load_network(own.hf)
    else:
        assert own.model is not None
        model = sources.network(own.model)
    if own.text is not None:
        assert own.hf is not None
        tokenizer = language.load_tokenizer(own.hf)
        data = language.windows(own.text, tokenizer, model, own.sequences, own.sequence_length)
        labelled = "labels" in data[0]
    else:
        assert own.data is not None
        data, labelled = sources.data(own.data), False
    name = own.loss or (sources.OWN_LOSS if labelled else None)
    return model, data, None if name is None else sources.loss(name), tokenizer


def _save(folder: Path, result: PruneResult, own: Own, tokenizer: Any) -> None:
    result.save(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    # Once more, with defaults filled in: what `--config` repeats the run with.
    write_config(folder / CONFIG, own.plain(), result.settings)


def _finish(folder: Path, as_json: bool, seconds: float, note: str = "") -> None:
    saved = folders.read(folder)
    if as_json:
        about = {"output_dir": str(folder), "seconds": seconds, "settings": saved.settings}
        print_json({**about, "report": saved.report.as_dict()})
        return
    console = wide_console()
    console.print(saved.report)
    console.print(Text(note or f"network, masks, report and settings are in {folder}"), soft_wrap=True)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on the error output, where somebody is looking."""
    console = Console(stderr=True)
    columns = (TextColumn("measuring and pruning"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tick(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield tick


command.__signature__ = signature()  # type: ignore[attr-defined]
command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}  # type: ignore[attr-defined]
