"""The table of published rules: a line a rule, a part for each of the layer and the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.networks.criterion import Metric
from experiments.runs.rules import Rule

_SECONDS = ("seconds_gradients", "seconds_solve", "seconds_update")


def rule_table(
    title: str, metric: Metric, dense: float, rows: Sequence[tuple[str, Rule, Mapping[str, Any]]], command: str
) -> str:
    """Markdown; `rows` are (layer or "", rule, row)."""
    lines = [f"# {title}", ""]
    for scope in dict.fromkeys(scope for scope, _, _ in rows):
        lines += [f"## {f'Layer {scope} alone' if scope else 'The network'}", "", *_part(metric, scope, rows), ""]
    lines += [
        f"Dense {metric.name}: {dense:.2f}. Objectives are of the model that the rule itself looks at: the low-rank "
        "Fisher, or the sum over layers of their output errors (kfac: in units of the loss), so they compare within a "
        "curvature only. The objective is that of the weights as the rule leaves them, or of the selection; the refit "
        "objective that of its mask with the kept weights re-optimised. The loss is that of the calibration data. "
        "Seconds are wall, of this machine as it was: measuring, choosing, updating.",
        "",
        "```",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def _part(metric: Metric, scope: str, rows: Sequence[tuple[str, Rule, Mapping[str, Any]]]) -> Iterator[str]:
    heads = ("rule", "curvature", "budget", "solver", "update", "objective", "refit", "loss", metric.heading, "seconds")
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for where, rule, row in rows:
        if where != scope:
            continue
        words = [f"{rule.name} ({rule.source})", rule.curvature, rule.budget, f"`{rule.solver}`", rule.update]
        if row["error"] is not None:
            yield "| " + " | ".join([*words, str(row["error"]), "", "", "", ""]) + " |"
            continue
        figures = [_number(row[name]) for name in ("objective", "refit_objective", "train_loss")]
        seconds = sum(row[name] for name in _SECONDS)
        yield "| " + " | ".join([*words, *figures, f"{row[metric.name]:.2f}", f"{seconds:.1f}"]) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
