"""What a comparison says: a table by size and fraction, gap against time, and a performance profile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.reports.plots import COLOURS, drawn
from experiments.runs.solves import Instance, gap_between
from solvers.errors import OutputError

Row = Mapping[str, Any]

#: A mask this close to the best known value counts as having found it.
FOUND = 1e-6
_LINES = ("-", "--", "-.", ":")


def instance_of(row: Row) -> Instance:
    """What a row solved."""
    return (
        str(row["digest"]),
        int(row["n_prune"]),
        str(row["objective_kind"]),
        bool(row["gradient"]),
        str(row.get("budget", "")),
    )


def best_values(rows: Sequence[Row], stored: Mapping[Instance, float]) -> dict[Instance, float]:
    """The best value of every instance, over all rows and the stored optima."""
    best = dict(stored)
    for row in rows:
        if row.get("error") is None and row["objective"] is not None:
            best[instance_of(row)] = min(row["objective"], best.get(instance_of(row), math.inf))
    return best


def proven_values(rows: Sequence[Row]) -> set[Instance]:
    """Instances of which some row proved its optimum."""
    return {instance_of(row) for row in rows if row.get("error") is None and row["status"] == "optimal"}


def summary(rows: Sequence[Row], best: Mapping[Instance, float], order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One entry per (objective, n, fraction, solver): means over blocks and seeds; solvers in the given order.

    ``gap`` is the mean gap to the best known value, ``certified`` the mean of the solver's own gap where it has one.
    """
    place = {solver: at for at, solver in enumerate(order)}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("error") is None:
            fraction, budget = round(row["n_prune"] / row["n"], 2), row.get("budget", "")
            groups.setdefault((row["objective_kind"], row["n"], fraction, budget, row["solver"]), []).append(row)
    entries = []
    for group in sorted(groups, key=lambda g: (*g[:4], place.get(g[4], 0))):
        (kind, n, fraction, budget, solver), members = group, groups[group]
        gaps = [gap_between(row["objective"], best[instance_of(row)]) for row in members]
        refits = [row["refit_objective"] for row in members if row["refit_objective"] is not None]
        certified = [row["gap"] for row in members if row["gap"] is not None]
        entries.append(
            {
                "objective": kind,
                "n": n,
                "fraction": fraction,
                "budget": budget or f"{fraction:g}",
                "solver": solver,
                "rows": len(members),
                "gap": float(np.mean(gaps)),
                "found": float(np.mean([gap <= FOUND for gap in gaps])),
                "proven": float(np.mean([row["status"] == "optimal" for row in members])),
                "certified": float(np.mean(certified)) if len(certified) == len(members) else None,
                "refit": float(np.mean(refits)) if refits else None,
                "seconds": float(np.mean([row["seconds"] for row in members])),
            }
        )
    return entries


_COLUMNS = {
    "objective": lambda e: e["objective"],
    "n": lambda e: str(e["n"]),
    "budget": lambda e: e["budget"],
    "solver": lambda e: e["solver"],
    "rows": lambda e: str(e["rows"]),
    "gap to best": lambda e: percent(e["gap"]),
    "best found": lambda e: f"{100 * e['found']:.0f} %",
    "proven": lambda e: f"{100 * e['proven']:.0f} %",
    "certified gap": lambda e: "" if e["certified"] is None else percent(e["certified"]),
    "refit": lambda e: "" if e["refit"] is None else f"{e['refit']:.3g}",
    "seconds": lambda e: f"{e['seconds']:.2f}",
}


def summary_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The summary for the terminal."""
    table = Table(title="mean over blocks and seeds", title_justify="left", box=SIMPLE_HEAD)
    for heading in _COLUMNS:
        table.add_column(heading, justify="left" if heading in ("objective", "solver") else "right", no_wrap=True)
    previous = None
    for entry in entries:
        group = entry["objective"], entry["n"], entry["budget"]
        if previous not in (None, group):
            table.add_section()
        previous = group
        table.add_row(*(escape(cell(entry)) for cell in _COLUMNS.values()))
    return table


def write_markdown(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """The summary as a Markdown table; raises OutputError."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
    lines += ["| " + " | ".join(cell(entry) for cell in _COLUMNS.values()) + " |" for entry in entries]
    try:
        path.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror or error})") from error


def percent(gap: float) -> str:
    """A gap in words."""
    if not math.isfinite(gap):
        return "∞"
    if gap < FOUND:
        return "0 %"
    return f"{100 * gap:.{2 if gap < 0.1 else 3}g} %" if gap < 9.995 else f"{gap:.3g} ×"


def write_plots(folder: Path, rows: Sequence[Row], best: Mapping[Instance, float]) -> list[Path]:
    """Gap against time and performance profile of each objective, as PNG; raises OutputError."""
    written = []
    good = [row for row in rows if row.get("error") is None]
    for kind in sorted({row["objective_kind"] for row in good}):
        chosen = [row for row in good if row["objective_kind"] == kind]
        for name, draw in (("gap-vs-time", _draw_gap), ("profile", _draw_profile)):
            path = folder / f"{name}-{kind}.png"
            _plot(path, f"{kind} objective, {len({instance_of(r) for r in chosen})} instances", chosen, best, draw)
            written.append(path)
    return written


def _plot(path: Path, title: str, rows: Sequence[Row], best: Mapping[Instance, float], draw: Any) -> None:
    total = len({instance_of(row) for row in rows})
    with drawn(path, title) as axes:
        for at, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
            style = {"color": COLOURS[at % len(COLOURS)], "linestyle": _LINES[at // len(COLOURS) % len(_LINES)]}
            own = [row for row in rows if row["solver"] == solver]
            taken = len({instance_of(row) for row in own})
            style["label"] = solver if taken == total else f"{solver} ({taken} of {total})"
            draw(axes, own, best, taken / total, style)


def gap_over_time(row: Row, best: float, grid: np.ndarray) -> np.ndarray:
    """Gap of the incumbent to `best` at the times of `grid`; nan before the first one."""
    points = [(s, value) for s, value, _ in row["trace"] if value is not None and s <= row["seconds"]]
    points.append((row["seconds"], row["objective"]))
    gaps = np.full(grid.shape, np.nan)
    incumbent = math.inf
    for seconds, value in sorted(points):
        incumbent = min(incumbent, value)
        gaps[grid >= seconds] = gap_between(incumbent, best)
    return gaps


def _draw_gap(axes: Any, rows: Sequence[Row], best: Mapping[Instance, float], _: float, style: Any) -> None:
    """Mean gap once every instance has an incumbent. Floored at 1e-7, as a logarithm has no zero."""
    longest = max(max(row["seconds"] for row in rows), 1e-3)
    grid = np.geomspace(1e-3, max(longest, 2e-3), 200)
    mean = np.mean([gap_over_time(row, best[instance_of(row)], grid) for row in rows], axis=0)
    shown = np.isfinite(mean)
    if not shown.any():
        # Every instance takes at least as long as the longest: one point is all there is.
        grid, mean, shown = np.array([longest]), np.array([0.0]), np.array([True])
        mean[0] = float(np.mean([gap_between(row["objective"], best[instance_of(row)]) for row in rows]))
    axes.plot(grid[shown], np.maximum(mean[shown], 1e-7), linewidth=1.4, **style)
    axes.plot(grid[shown][-1:], np.maximum(mean[shown][-1:], 1e-7), marker="o", markersize=4, color=style["color"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("mean gap to the best known value")


def _draw_profile(axes: Any, rows: Sequence[Row], best: Mapping[Instance, float], taken: float, style: Any) -> None:
    """Share of the instances within a gap (Dolan & Moré, 2002, on quality instead of time).

    Instances that a solver does not take count as not solved.
    """
    gaps = np.sort([gap_between(row["objective"], best[instance_of(row)]) for row in rows])
    grid = np.geomspace(1e-7, max(10.0, float(gaps[np.isfinite(gaps)].max(initial=0.0))), 400)
    share = taken * np.searchsorted(gaps, grid, side="right") / gaps.size
    axes.step(grid, share, where="post", linewidth=1.4, **style)
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("gap to the best known value")
    axes.set_ylabel("share of the instances within it")
