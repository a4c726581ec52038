"""A report as a page to send: one HTML file that needs no other and no network, light and dark, narrow and wide."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cbs_opt.report.records import StageRecord
from cbs_opt.report.sensitivity import Sensitivity

if TYPE_CHECKING:
    from cbs_opt.report.report import LayerReport, PruneReport

#: Most pixels of a side of a picture of a mask, and most layers that get one.
_PIXELS, _PICTURES = 96, 60
#: Most lines of a plot that are named below it.
_NAMED = 16
_STYLE = """
.cbs{--ink:#1b1f24;--soft:#59636e;--line:#d5dbe1;--back:#fff;--fill:#2f6fb2;--pale:#dce8f4;--warn:#9a5b00;
font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:76rem;margin:0 auto;padding:1rem}
@media (prefers-color-scheme:dark){.cbs{--ink:#e3e7eb;--soft:#9aa4ae;--line:#39424b;--back:#15191d;--fill:#6aa9e9;
--pale:#26384a;--warn:#e8b264}}
.cbs h1{font-size:1.5rem;margin:.2rem 0}.cbs h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.cbs p{margin:.3rem 0}.cbs .soft{color:var(--soft)}.cbs .warn{color:var(--warn)}
.cbs .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.cbs .tile{border:1px solid var(--line);border-radius:.4rem;padding:.5rem .7rem}
.cbs .tile b{display:block;font-size:1.2rem}
.cbs .wide{overflow-x:auto}.cbs table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.cbs th,.cbs td{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
.cbs th:first-child,.cbs td:first-child,.cbs td.text,.cbs th.text{text-align:left}
.cbs .bar{display:inline-block;width:6rem;height:.6rem;background:var(--pale);border-radius:.2rem;margin-left:.5rem}
.cbs .bar i{display:block;height:100%;background:var(--fill);border-radius:.2rem}
.cbs svg{width:100%;max-width:44rem;height:auto;color:var(--ink)}.cbs svg text{fill:var(--soft);font-size:11px}
.cbs .masks{display:flex;flex-wrap:wrap;gap:.8rem}.cbs figure{margin:0;max-width:9rem}
.cbs figcaption{font-size:.8rem;overflow-wrap:anywhere;color:var(--soft)}
.cbs img{image-rendering:pixelated;border:1px solid var(--line)}
.cbs .key span{display:inline-block;margin-right:1.2rem;font-size:.85rem;color:var(--soft)}
.cbs .key i{display:inline-block;width:1.2rem;height:.2rem;margin-right:.4rem;vertical-align:middle}
.cbs summary{cursor:pointer}
.cbs pre{overflow-x:auto;background:var(--pale);padding:.6rem;border-radius:.4rem;font-size:.85rem}
@media (max-width:40rem){.cbs .kind{display:none}.cbs .bar{width:2.5rem}.cbs svg text{font-size:19px}
.cbs th,.cbs td{padding:.2rem .35rem}.cbs th{white-space:normal}}
"""


def page(
    report: PruneReport,
    masks: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    stages: Sequence[StageRecord] = (),
) -> str:
    """The whole file.

    Parameters
    ----------
    report : PruneReport
    masks : mapping of str to bool tensor, optional
        Drawn as pictures.
    settings : mapping, optional
        As of `PruneResult.settings`.
    stages : sequence of StageRecord
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(sentence(report))}</title><style>body{{margin:0}}@media (prefers-color-scheme:dark)"
        "{body{background:#15191d}}</style></head>"
        f"<body>{fragment(report, masks, settings, stages)}</body></html>\n"
    )


def fragment(
    report: PruneReport,
    masks: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    stages: Sequence[StageRecord] = (),
) -> str:
    """What goes into a page, and into a notebook; see `page`."""
    parts = [
        f"<style>{_STYLE}</style>",
        "<h1>Pruned network</h1>",
        f"<p>{escape(sentence(report))}</p>",
        _tiles(report),
    ]
    parts += [f'<p class="warn">Warning: {escape(text)}</p>' for text in report.warnings]
    parts += ["<h2>Layers</h2>", _layers(report)]
    if report.sensitivity is not None:
        parts += ["<h2>What pruning each layer alone does</h2>", _curves(report.sensitivity)]
    if len(stages) > 1:
        parts += ["<h2>Loss along the plan</h2>", _path(stages)]
    if masks:
        parts += ["<h2>Masks</h2>", _pictures(masks)]
    parts += ["<h2>In full</h2>", *(f'<p class="soft">{escape(line)}</p>' for line in report.lines())]
    if settings:
        text = json.dumps({key: value for key, value in settings.items() if value is not None}, indent=1)
        parts += ["<h2>Settings</h2>", f"<details><summary>As JSON</summary><pre>{escape(text)}</pre></details>"]
        parts.append("<p class='soft'>By the names of cbs_opt.prune's arguments; where cbs-opt wrote this folder, "
                     "<code>cbs-opt prune --config prune.toml --output-dir DIR</code> repeats it.</p>")  # fmt: skip
    return f'<div class="cbs">{"".join(parts)}</div>'


def sentence(report: PruneReport) -> str:
    """What was done, in one."""
    how = report.solver + ("" if report.update == "none" else f" with update {report.update}")
    loss = ""
    if report.loss_samples and math.isfinite(report.loss_pruned):
        loss = f"; the calibration loss went from {report.loss_dense:.4g} to {report.loss_pruned:.4g}"
    stages = f" in {report.stages} stages" if report.stages > 1 else ""
    after = [
        word for word, done in (("distilled", report.distill), ("fine-tuned", report.finetune)) if done is not None
    ]
    later = f", then {' and '.join(after)}" if after else ""
    return (
        f"{report.n - report.n_kept:,} of {report.n:,} weights in {len(report.layers)} layers "
        f"({report.sparsity:.1%}) were removed by {how}{stages}, by the curvature {report.curvature}{later}{loss}."
    )


def _tiles(report: PruneReport) -> str:
    seconds = report.seconds_gradients + report.seconds_solve + report.seconds_update
    tiles = [
        ("weights kept", f"{report.n_kept:,}", f"of {report.n:,} prunable"),
        ("removed", f"{report.sparsity:.2%}", f"{report.sparsity_of_model:.2%} of the whole network"),
        ("calibration loss", _number(report.loss_pruned), f"dense {_number(report.loss_dense)}"),
        (f"{report.objective_kind} objective", _number(report.objective), f"bound {_number(report.bound)}"),
        ("gap", f"{report.gap:.2%}" if math.isfinite(report.gap) else "not known", report.status or "nothing chosen"),
        ("seconds", f"{seconds:.3g}", f"{report.seconds_gradients:.3g} measuring, {report.seconds_solve:.3g} solving"),
    ]
    cells = (
        f'<div class="tile"><span class="soft">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(note)}</span></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _layers(report: PruneReport) -> str:
    alone = _measured(report)
    headings = ["layer", "kind", "shape", "weights", "kept", "norm kept"]
    headings += ["predicted loss change"] if any(math.isfinite(row.share) for row in report.layers) else []
    headings += [f"{report.sensitivity.measure} of it alone"] if report.sensitivity is not None else []
    kinds = [' class="text kind"' if name in ("kind", "shape") else "" for name in headings]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, headings, strict=True))
    largest = max((abs(row.share) for row in report.layers if math.isfinite(row.share)), default=0.0)
    most = max(alone.values(), default=0.0)
    rows = []
    for row in report.layers:
        cells = [
            f'<td>{escape(row.name)}</td><td class="text kind">{escape(row.kind)}</td>',
            f'<td class="text kind">{" × ".join(map(str, row.shape))}</td><td>{row.n:,}</td>',
            f"<td>{row.n_kept / row.n:.1%}{_bar(row.n_kept / row.n)}</td>",
            _norm_cell(row),
        ]
        if "predicted loss change" in headings:
            known = math.isfinite(row.share)
            part = (
                f"{row.share * report.objective:.3g}{_bar(abs(row.share) / largest)}" if known and largest else "none"
            )
            cells.append(f"<td>{part}</td>")
        if report.sensitivity is not None:
            value = alone.get(row.name, math.nan)
            cells.append(f"<td>{_number(value)}{_bar(value / most) if most and math.isfinite(value) else ''}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _norm_cell(row: LayerReport) -> str:
    ratio = row.norm_after / row.norm_before if row.norm_before else 0.0
    return f"<td>{ratio:.1%}{_bar(ratio)}</td>"


def _measured(report: PruneReport) -> dict[str, float]:
    """What pruning each layer alone to the share that went was measured to do, between the levels by a line."""
    found = report.sensitivity
    if found is None:
        return {}
    shares = {row.name: row.sparsity for row in report.layers}
    levels, dense = [0.0, *found.levels], found.dense
    return {
        curve.name: float(np.interp(shares[curve.name], levels, [dense, *curve.values]))
        for curve in found.layers
        if curve.name in shares
    }


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def _curves(found: Sensitivity) -> str:
    lines = [(curve.name, [0.0, *found.levels], [found.dense, *curve.values]) for curve in found.layers]
    return _plot(lines, "share of the layer's weights removed", found.measure)


def _path(stages: Sequence[StageRecord]) -> str:
    numbers = [float(stage.stage) for stage in stages]
    return _plot(
        [
            ("loss after the stage", numbers, [stage.loss_after for stage in stages]),
            ("before", numbers, [stage.loss_before for stage in stages]),
        ],
        "stage",
        "loss on held-out training data",
    )


def _plot(lines: Iterable[tuple[str, Sequence[float], Sequence[float]]], across: str, up: str) -> str:
    """Lines over one another, the first of them named below; each names itself when pointed at."""
    drawn = [(n, [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]) for n, xs, ys in lines]
    points = [point for _, line in drawn for point in line]
    if not points:
        return "<p>No finite value.</p>"
    (x0, x1), (y0, y1) = ((min(side), max(side)) for side in zip(*points, strict=True))
    dx, dy = (x1 - x0) or 1.0, (y1 - y0) or 1.0
    paths, names = [], []
    for number, (name, line) in enumerate(drawn):
        where = " ".join(f"{60 + 560 * (x - x0) / dx:.1f},{230 - 210 * (y - y0) / dy:.1f}" for x, y in line)
        colour = f"hsl({(205 + 137 * number) % 360} 55% 52%)"
        paths.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="1.6">'
            f"<title>{escape(name)}</title></polyline>"
        )
        names.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
    more = f"<span>and {len(names) - _NAMED} more</span>" if len(names) > _NAMED else ""
    return (
        f'<svg viewBox="0 0 640 270" role="img" aria-label="{escape(up)} by {escape(across)}">'
        '<path d="M60 15V230H625" fill="none" stroke="currentColor" stroke-width="1"/>'
        f'<text x="54" y="24" text-anchor="end">{y1:.3g}</text><text x="54" y="232" text-anchor="end">{y0:.3g}</text>'
        f'<text x="60" y="246">{x0:.3g}</text><text x="620" y="246" text-anchor="end">{x1:.3g}</text>'
        f'<text x="340" y="262" text-anchor="middle">{escape(across)}</text><text x="66" y="12">{escape(up)}</text>'
        f'{"".join(paths)}</svg><p class="key">{"".join(names[:_NAMED])}{more}</p>'
    )


def _pictures(masks: Mapping[str, Tensor]) -> str:
    """Each mask as outputs × inputs, a pixel being the share kept of what falls into it."""
    from PIL import Image

    shown = list(masks.items())[:_PICTURES]
    figures = []
    for name, mask in shown:
        flat = mask.detach().cpu().reshape(len(mask), -1).numpy() if mask.ndim > 1 else mask.cpu().numpy()[None]
        buffer = io.BytesIO()
        Image.fromarray((255 * _thinned(_thinned(flat.astype(np.float64)).T).T).astype(np.uint8)).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        size, (down, across) = " × ".join(map(str, flat.shape)), flat.shape
        width = max(1.0, 9.0 * min(1.0, across / down))
        figures.append(
            f'<figure><img alt="mask of {escape(name)}" style="width:{width:.1f}rem" '
            f'src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(name)}, {size}</figcaption></figure>"
        )
    more = f"<p class=soft>The first {_PICTURES} of {len(masks)}.</p>" if len(masks) > len(shown) else ""
    note = "<p class=soft>Outputs down, inputs across; white is kept, black removed, grey a share of several.</p>"
    return f'{note}<div class="masks">{"".join(figures)}</div>{more}'


def _thinned(rows: Any) -> Any:
    """Means of consecutive rows, so that at most `_PIXELS` are left."""
    if len(rows) <= _PIXELS:
        return rows
    edges = np.linspace(0, len(rows), _PIXELS + 1).astype(int)
    return np.add.reduceat(rows, edges[:-1]) / np.diff(edges)[:, None]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"
