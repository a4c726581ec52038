"""The live display of a run: finished rows scroll by, a bar shows what is under way."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.reports.plots import metric_of, row_label


class RunDisplay:
    """Progress of a run on a console; plain lines where the console is not a terminal.

    Parameters
    ----------
    console
    n_rows
        Rows the run will make or find.
    """

    def __init__(self, console: Console, n_rows: int) -> None:
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._rows = self._progress.add_task("rows", total=n_rows)
        self._work = self._progress.add_task("starting", total=None)

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """A line which stays."""
        self._progress.console.print(escape(message), soft_wrap=True, highlight=False)

    def working(self, what: str, done: int, total: int) -> None:
        """What is under way; ``total`` 0 means nobody knows how long it takes."""
        if not total:
            self._progress.reset(self._work, description=escape(what), total=None)
        else:
            self._progress.update(self._work, description=escape(what), total=total, completed=done)

    def finished(self, row: Mapping[str, Any], new: bool) -> None:
        """A row is there."""
        self._progress.advance(self._rows)
        if row.get("error") is not None:
            self.say(f"failed: {row_label(row)}, sparsity {row['sparsity']:g}, seed {row['seed']}: {row['error']}")
            return
        metric = metric_of(row)
        text = (
            f"{row_label(row)}, sparsity {row['sparsity']:g}, seed {row['seed']}: "
            f"{metric.shown(row[metric.name])}, "
            f"{row['n_kept']:,} of {row['n_weights']:,} weights kept"
        )
        if new:
            text += f", solve {row['seconds_solve']:.2f} s, update {row['seconds_update']:.2f} s"
        else:
            text += " (there already)"
        self.say(text)
