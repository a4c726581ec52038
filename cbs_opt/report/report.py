"""What was pruned, how well, and at what cost: a row per layer and the figures of the whole."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cbs_opt.network.layers import PrunableLayers
from solvers import Objective, SelectionProblem
from solvers.errors import DataError, OutputError

_VERSION = 1


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
        Shares sum to 1; one may be negative where removals compensate those of other layers. nan for an objective of 0.
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


@dataclass(frozen=True)
class PruneReport:
    """The whole.

    Attributes
    ----------
    layers : tuple of LayerReport
    n, n_kept : int
    sparsity : float
        As achieved, 1 − n_kept / n.
    sparsity_asked : float
    solver, update, objective_kind, status, reason : str
    update_scale : float
    objective, refit_objective, bound, gap : float
        As in `solvers.Solution`; the gap is relative, inf without a bound.
    loss_dense, loss_pruned : float
        Mean calibration loss of the network before and after.
    loss_samples : int
        Samples it was taken over.
    n_rows, batch_size : int
        Rows of the factor, samples per row.
    damping : float
    blocks : str
    n_blocks : int
    first_order : bool
    gradient_method : str
    stages : int
    seed : int
    device : str
    seconds_gradients, seconds_solve, seconds_update : float
        Wall time.
    repairs : tuple of str
        Everything that was repaired or done otherwise than asked for.
    statistics : mapping of str to float
        Counts of the solver.
    """

    layers: tuple[LayerReport, ...]
    n: int
    n_kept: int
    sparsity: float
    sparsity_asked: float
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
    n_rows: int
    batch_size: int
    damping: float
    blocks: str
    n_blocks: int
    first_order: bool
    gradient_method: str
    stages: int
    seed: int
    device: str
    seconds_gradients: float
    seconds_solve: float
    seconds_update: float
    repairs: tuple[str, ...] = ()
    statistics: Mapping[str, float] = field(default_factory=dict)

    def __rich__(self) -> Group:
        table = Table(title=f"{self.solver}, update {self.update}: {self.n_kept:,} of {self.n:,} weights kept")
        for heading in ("layer", "weights", "kept", "sparsity", "norm", "norm after", "share of objective"):
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
            )
        table.add_section()
        norms = [
            math.hypot(*values) for values in zip(*((r.norm_before, r.norm_after) for r in self.layers), strict=True)
        ]
        table.add_row(
            "all", f"{self.n:,}", f"{self.n_kept:,}", f"{self.sparsity:.2%}", f"{norms[0]:.4g}", f"{norms[1]:.4g}", ""
        )
        lines = [
            f"{self.objective_kind} objective {self.objective:.6g}, bound {_number(self.bound)}, "
            f"gap {_percent(self.gap)}, {self.status} ({self.reason}); refit objective {_number(self.refit_objective)}",
            f"calibration loss {self.loss_dense:.6g} -> {self.loss_pruned:.6g} over {self.loss_samples:,} samples",
            f"{self.n_rows:,} gradients of {self.batch_size} ({self.gradient_method}), damping {self.damping:g}, "
            f"blocks {self.blocks} ({self.n_blocks}), first order {'yes' if self.first_order else 'no'}, "
            f"stages {self.stages}, seed {self.seed}, {self.device}",
            f"seconds: gradients {self.seconds_gradients:.2f}, solve {self.seconds_solve:.2f}, "
            f"update {self.seconds_update:.2f}",
            *(f"repair: {repair}" for repair in self.repairs),
        ]
        return Group(table, *(Text(line) for line in lines))

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
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the report to {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> PruneReport:
        """Read a report that `save` wrote; raises DataError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("version", None) != _VERSION:
                raise DataError(f"{path} is not a report of version {_VERSION}")
            layers = tuple(
                LayerReport(**{**_floats(LayerReport, row), "shape": tuple(row["shape"])})
                for row in values.pop("layers")
            )
            repairs = tuple(values.pop("repairs"))
            return cls(layers=layers, repairs=repairs, **_floats(cls, values))
        except OSError as error:
            raise DataError(f"cannot read the report {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a report of a pruning: {error}") from error


def layer_reports(
    layers: PrunableLayers,
    before: npt.NDArray[np.float64],
    after: npt.NDArray[np.float64],
    pruned: npt.NDArray[np.bool_],
    contributions: npt.NDArray[np.float64],
) -> tuple[LayerReport, ...]:
    """Rows from vectors (n,) in the network's order; `contributions` sum to the objective."""
    total = float(contributions.sum())
    rows = []
    for layer in layers:
        w, v, p = before[layer.slice], after[layer.slice], pruned[layer.slice]
        kept = int(layer.n - p.sum())
        rows.append(
            LayerReport(
                name=layer.name,
                kind=layer.kind,
                shape=layer.shape,
                n=layer.n,
                n_kept=kept,
                sparsity=1.0 - kept / layer.n,
                norm_before=float(np.linalg.norm(w)),
                norm_after=float(np.linalg.norm(v)),
                norm_removed=float(np.linalg.norm(w[p])),
                share=float(contributions[layer.slice].sum()) / total if total else math.nan,
            )
        )
    return tuple(rows)


def contributions(
    problem: SelectionProblem, pruned: npt.NDArray[np.bool_], refitted: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """What each weight adds to the problem's objective, float64 (n,): g_i d_i + ½ d_i (Hd)_i for the step d.

    The step is −w_P for the selection objective and that to the refitted weights for the joint one.
    """
    weights = problem.weights
    if problem.objective is Objective.SELECTION or refitted is None:
        step = np.where(pruned, -weights, 0.0)
    else:
        step = refitted - weights
    terms: npt.NDArray[np.float64] = 0.5 * step * problem.multiply(step)
    if problem.gradient is not None:
        terms = terms + problem.gradient * step
    return terms


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


#: What None stands for in JSON, by field.
_MISSING = {"bound": -math.inf, "gap": math.inf}


def _floats(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of float fields with None turned back into what it was."""
    numeric = {f.name for f in fields(cls) if f.type == "float"}
    return {k: _MISSING.get(k, math.nan) if v is None and k in numeric else v for k, v in values.items()}


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "none"


def _percent(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "none"
