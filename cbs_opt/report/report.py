"""What was pruned, how well, and at what cost: a row per layer and the figures of the whole."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cbs_opt.network.layers import Skipped
from cbs_opt.report.page import fragment
from cbs_opt.report.records import DistillRecord, FineTuneRecord
from cbs_opt.report.sensitivity import Candidate, Sensitivity
from solvers.errors import DataError, OutputError
from solvers.files import write_atomically

_VERSION = 3
_FIRST_ORDER = {True: "yes", False: "no", None: "by stage"}


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes
    ----------
    name, kind, shape : as in `cbs_opt.network.layers.Layer`
    n, n_kept : int
        Weights in all, weights that stay.
    sparsity : float
        Fraction removed.
    norm_before, norm_after : float
        Euclidean norm of the weights.
    norm_removed : float
        Norm of the removed weights, as they were.
    share : float
        Part of the objective that the layer accounts for: ½ x_i (Hx)_i − g_i x_i summed over it, relative to the whole.
        Shares sum to 1; one may be negative where removals compensate those of other layers. nan for an objective of 0,
        in several stages, which have an objective each, and without a curvature.
    gap : float
        Of the layer's mask, given what the layer loses; nan without a bound of its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    n: int
    n_kept: int
    sparsity: float
    norm_before: float
    norm_after: float
    norm_removed: float
    share: float
    gap: float = math.nan


@dataclass(frozen=True)
class PruneReport:
    """The whole. What does not exist is nan, or None; what differs from stage to stage is in `PruneResult.stages`.

    Attributes
    ----------
    layers : tuple of LayerReport
    n, n_kept : int
    sparsity : float
        As achieved, 1 − n_kept / n, of what was prunable.
    sparsity_asked : float
    n_model : int
        All parameters of the network, with biases and what was skipped; shared ones once.
    sparsity_of_model : float
        Removed weights among them, (n − n_kept) / n_model.
    solver, update, objective_kind : str
    status, reason : str
        Of the last choice of weights, as in `solvers.Solution`; empty where nothing was chosen.
    update_scale : float
        As asked for; nan in several stages, which search the length of each update.
    objective, refit_objective, bound, gap : float
        Likewise of the last choice, under the quadratic model it was made with; the gap is inf without a bound, the
        refit objective nan in several stages, and all are nan without a curvature.
    loss_dense, loss_pruned : float
        Mean calibration loss of the network before and after; nan where none was given.
    loss_samples : int
        Samples it was taken over.
    curvature : str
        What was measured: ``fisher``, ``layer_inputs``, ``kfac``, ``gradient`` (the mean gradient alone) or ``none``.
    n_rows, batch_size : int
        Rows of gradients in a factor, samples per row; 0 where no gradients were taken.
    damping : float
        λ of the quadratic model that weights are chosen by; nan without one, and relative where it is layer-wise.
    blocks : str
    n_blocks : int
    first_order : bool or None
        Whether the choice of weights sees the gradient; None in several stages, which may differ.
    gradient_method : str
        Empty where no gradients were taken.
    stages : int
        Steps of the plan, each at gradients of its own.
    seed : int
    device : str
    seconds_gradients, seconds_solve, seconds_update : float
        Wall time of all steps.
    repairs : tuple of str
        Everything that was repaired or done otherwise than asked for.
    warnings : tuple of str
        What is right as it was done, but likely not what was meant.
    skipped : tuple of Skipped
        Every matrix-shaped parameter that was left alone, with the reason.
    statistics : mapping of str to float
        Counts of the solver in the last choice of one shot.
    budget : str
        Where it is no number of weights: ``"flops:0.5"``, ``"2:4"``. Else empty.
    costs : mapping of str to float
        Under a budget of costs, ``flops_dense`` per sample (or ``bytes_dense``) of all prunable weights, the share
        ``flops_kept`` of those that stay, and ``flops_limit``, what was asked for. ``split`` is the sum of the scores
        that the limit was shared out by (one shot: diagonal saliencies), over what goes, and ``split_bound`` its
        Lagrangian bound, which no choice within the limit falls below.
    shares : str
        Layer by layer, the allocation by which layers lose weights; of several, the one taken. Else empty.
    sensitivity : Sensitivity, optional
        Where shares were measured.
    candidates : tuple of Candidate
        Allocations that were tried, where there were several.
    distill : DistillRecord or None
        What steps towards the dense network's outputs gained; objectives and seconds above are without them.
    finetune : FineTuneRecord or None
        What training afterwards, or between stages, did; objectives and seconds above are without it.
    loss_untuned : float
        Mean calibration loss before it, `loss_pruned` being that after; nan where there was none, and in stages.
    loss_undistilled : float
        Mean calibration loss before them, `loss_pruned` being that after; nan where there were none.
    norms_reestimated : int
        Batch norms whose running statistics were estimated anew before that; in stages see `PruneResult.stages`.
    loss_old_norms : float
        Mean calibration loss with the statistics as they were; nan where none were re-estimated.
    """

    layers: tuple[LayerReport, ...]
    n: int
    n_kept: int
    sparsity: float
    sparsity_asked: float
    n_model: int
    sparsity_of_model: float
    solver: str
    update: str
    update_scale: float
    objective_kind: str
    objective: float
    refit_objective: float
    bound: float
    gap: float
    status: str
    reason: str
    loss_dense: float
    loss_pruned: float
    loss_samples: int
    curvature: str
    n_rows: int
    batch_size: int
    damping: float
    blocks: str
    n_blocks: int
    first_order: bool | None
    gradient_method: str
    stages: int
    seed: int
    device: str
    seconds_gradients: float
    seconds_solve: float
    seconds_update: float
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    statistics: Mapping[str, float] = field(default_factory=dict)
    budget: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)
    shares: str = ""
    sensitivity: Sensitivity | None = None
    candidates: tuple[Candidate, ...] = ()
    distill: DistillRecord | None = None
    loss_undistilled: float = math.nan
    finetune: FineTuneRecord | None = None
    loss_untuned: float = math.nan
    norms_reestimated: int = 0
    loss_old_norms: float = math.nan

    def __rich__(self) -> Group:
        table = Table(title=f"{self.solver}, update {self.update}: {self.n_kept:,} of {self.n:,} weights kept")
        gaps = any(math.isfinite(row.gap) for row in self.layers)
        headings = ("layer", "weights", "kept", "sparsity", "norm", "norm after", "share of objective")
        for heading in (*headings, *(("gap",) if gaps else ())):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for row in self.layers:
            table.add_row(
                Text(row.name),
                f"{row.n:,}",
                f"{row.n_kept:,}",
                f"{row.sparsity:.2%}",
                f"{row.norm_before:.4g}",
                f"{row.norm_after:.4g}",
                _percent(row.share),
                *((_percent(row.gap),) if gaps else ()),
            )
        table.add_section()
        norms = [
            math.hypot(*values) for values in zip(*((r.norm_before, r.norm_after) for r in self.layers), strict=True)
        ]
        table.add_row(
            "all", f"{self.n:,}", f"{self.n_kept:,}", f"{self.sparsity:.2%}", f"{norms[0]:.4g}", f"{norms[1]:.4g}", ""
        )
        return Group(table, *(Text(line) for line in self.lines()))

    def _repr_html_(self) -> str:
        return fragment(self)

    def lines(self) -> list[str]:
        """What is to be said beside the layers."""
        return [
            f"whole network: {self.sparsity_of_model:.2%} of {self.n_model:,} weights removed",
            f"{self.objective_kind} objective {_number(self.objective)}, bound {_number(self.bound)}, "
            f"gap {_percent(self.gap)}, {self.status} ({self.reason}); refit objective {_number(self.refit_objective)}",
            f"calibration loss {self.loss_dense:.6g} -> {self.loss_pruned:.6g} over {self.loss_samples:,} samples"
            if self.loss_samples
            else "no calibration loss was given",
            f"curvature {self.curvature}"
            + (f": {self.n_rows:,} gradients of {self.batch_size} ({self.gradient_method})" if self.n_rows else "")
            + f", damping {_number(self.damping)}, blocks {self.blocks} ({self.n_blocks}), first order "
            f"{_FIRST_ORDER[self.first_order]}, stages {self.stages}, seed {self.seed}, {self.device}",
            f"seconds: gradients {self.seconds_gradients:.2f}, solve {self.seconds_solve:.2f}, "
            f"update {self.seconds_update:.2f}",
            *self._spent(),
            *self._search(),
            *self._norms(),
            *self._distilled(),
            *self._tuned(),
            f"zeros alone make nothing faster or smaller; with a bit for each, 32-bit layers take "
            f"{self.n_kept / self.n + 1 / 32:.0%} of their bytes (cbs_opt.export)",
            *(f"repair: {repair}" for repair in self.repairs),
            *(f"skipped: {skip.name} {skip.shape}: {skip.reason}" for skip in self.skipped),
            *(f"warning: {warning}" for warning in self.warnings),
        ]

    def _spent(self) -> Iterator[str]:
        """What a budget has left."""
        if self.budget and not self.costs:
            yield f"budget {self.budget} kept exactly; zeros alone make nothing smaller or faster"
        for name in (key.removesuffix("_dense") for key in self.costs if key.endswith("_dense")):
            dense, kept, limit = (self.costs[f"{name}_{part}"] for part in ("dense", "kept", "limit"))
            whole = f"{dense:,.0f}" if dense >= 100 else _number(dense)
            yield (
                f"budget {self.budget}: {kept:.4%} of {whole} {name} kept, where {limit:.4%} may be; zeros alone make "
                "nothing faster"
            )
        if "split" in self.costs:
            value, bound = self.costs["split"], self.costs["split_bound"]
            gap = (value - bound) / abs(bound) if bound else math.inf if value > bound else 0.0
            yield f"shared out: {value:.6g} goes by its scores, Lagrangian bound {bound:.6g}, gap {gap:.2g}"

    def _search(self) -> Iterator[str]:
        """What the shares of the layers were found by."""
        if self.sensitivity is not None:
            found = self.sensitivity
            yield (
                f"shares measured: {found.measure} at {len(found.levels)} levels of {len(found.layers)} layers, "
                f"{found.samples} samples held out, {found.solver}, {found.seconds:.1f} s"
            )
        for tried in self.candidates:
            chosen = ", taken" if tried.name == self.shares else ""
            yield f"shares {tried.name}: {tried.value:.6g} on samples held out, {tried.seconds:.1f} s{chosen}"

    def _norms(self) -> Iterator[str]:
        if self.norms_reestimated:
            after = self.loss_pruned if self.distill is None else self.loss_undistilled
            after = after if math.isnan(self.loss_untuned) else self.loss_untuned
            yield (
                f"statistics of {self.norms_reestimated} batch norms re-estimated: calibration loss "
                f"{_number(self.loss_old_norms)} -> {_number(after)}"
            )

    def _distilled(self) -> list[str]:
        done = self.distill
        if done is None:
            return []
        what = "loss" if done.loss == "given" else done.loss
        moved = "the weights kept" if done.parameters == "layers" else "all parameters"
        lines = [
            f"distillation of {moved}: held-out {what} {done.loss_before:.6g} -> {done.loss_after:.6g} over "
            f"{done.n_held_out:,} samples, {done.steps_kept} of {done.steps} steps of {_number(done.lr)} on "
            f"{done.n_samples:,} others, {done.seconds:.2f} s",
        ]
        if math.isfinite(self.loss_undistilled):
            lines.append(f"calibration loss before it {self.loss_undistilled:.6g}")
        return lines

    def _tuned(self) -> Iterator[str]:
        done = self.finetune
        if done is None:
            return
        parts = f" in {done.parts} parts" if done.parts > 1 else ""
        length = f" of at most {done.lr:g}" if math.isfinite(done.lr) else ""
        yield (
            f"fine-tuning: held-out loss {done.loss_before:.6g} -> {done.loss_after:.6g} over {done.n_held_out:,} "
            f"samples; {done.steps_kept} steps kept, {done.steps_taken} taken of {done.steps}{parts} "
            f"({done.optimizer}{length}, {done.epochs:.3g} passes over {done.n_samples:,} others), {done.seconds:.2f} s"
        )
        if math.isfinite(self.loss_untuned):
            yield f"calibration loss before it {self.loss_untuned:.6g}"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().rstrip()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values; what is not finite becomes None."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return {"version": _VERSION, **plain}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; raises OutputError."""
        text = json.dumps(self.as_dict(), indent=2, allow_nan=False)
        try:
            write_atomically(path, (text + "\n").encode())
        except OSError as error:
            raise OutputError(f"cannot write the report to {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> PruneReport:
        """Read a report that `save` wrote; raises DataError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("version", None) != _VERSION:
                raise DataError(f"{path} is not a report of version {_VERSION}")
            for name, kind in (("layers", LayerReport), ("skipped", Skipped)):
                values[name] = [kind(**{**_floats(kind, row), "shape": tuple(row["shape"])}) for row in values[name]]
            values.update({name: tuple(values[name]) for name in ("layers", "skipped", "repairs", "warnings")})
            values["candidates"] = tuple(Candidate(**row) for row in values["candidates"])
            if values["sensitivity"] is not None:
                values["sensitivity"] = Sensitivity.from_dict(values["sensitivity"])
            for name, record in (("distill", DistillRecord), ("finetune", FineTuneRecord)):
                if values.get(name) is not None:
                    done = _floats(record, values[name])
                    values[name] = record(**{**done, "notes": tuple(done["notes"])})
            return cls(**_floats(cls, values))
        except OSError as error:
            raise DataError(f"cannot read the report {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a report of a pruning: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value


#: What None stands for in JSON, by field; nan elsewhere.
_MISSING: dict[type, dict[str, float]] = {PruneReport: {"bound": -math.inf, "gap": math.inf}}


def _floats(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of float fields with None turned back into what it was."""
    numeric = {f.name for f in fields(cls) if f.type == "float"}
    missing = _MISSING.get(cls, {})
    return {k: missing.get(k, math.nan) if v is None and k in numeric else v for k, v in values.items()}


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "none"


def _percent(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "none"
