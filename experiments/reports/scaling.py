"""How time grows: a plot for each size that was varied, and a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.runs import scaling


def write_scaling(folder: Path, rows: list[dict[str, Any]]) -> str:
    """``scaling.png``, and the table as markdown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    middle = asdict(scaling.MIDDLE)
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    figure, axes = plt.subplots(
        1, len(scaling.VARIED), figsize=(4 * len(scaling.VARIED), 3.6), sharey=True, constrained_layout=True
    )
    lines = [
        "| solver | " + " | ".join(f"seconds ~ {name}^" for name in scaling.VARIED) + " |",
        "|" + "---|" * (len(scaling.VARIED) + 1),
    ]
    for solver in solvers:
        powers = scaling.exponents(rows, solver)
        lines.append(f"| `{solver}` | " + " | ".join(f"{powers[name]:.2f}" for name in scaling.VARIED) + " |")
        for axis, name in zip(axes, scaling.VARIED, strict=True):
            others = {other: value for other, value in middle.items() if other != name}
            line = scaling.line_of(rows, solver, name)
            sizes = [row[name] for row in line]
            axis.loglog(sizes, [row["seconds"] for row in line], "o-", label=f"{solver} (power {powers[name]:.2f})")
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel(name)
            axis.set_title(", ".join(f"{other} {value:,}" for other, value in others.items()), fontsize=9)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("seconds")
    figure.savefig(folder / "scaling.png", dpi=120)
    plt.close(figure)
    return "\n".join(lines) + "\n"
