"""Layer by layer: each segment of a network is measured with those before it already pruned, chosen and updated.

    for each segment:  C of its layers (one pass over the data) → blocks diag(s) ⊗ (C + λI) → mask → update → network

How many weights each layer loses is settled before, by the allocation (`cbs_opt.engine.shares`): ``uniform`` (the
default for ``layer_inputs``, where the errors of different layers are in different units) or ``rows`` give all layers
the same sparsity; others put one threshold over the scores of all layers, for which, but for ``magnitude``, the dense
network is measured once more, segment by segment. ``surgeon`` (w² / [H⁻¹]_ii) is the default for ``kfac``, where all
layers are in units of the loss. ``measured`` and ``best`` ask the network itself. The total is exact. Where a layer has
several blocks, solvers that share a budget do so inside the layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cbs_opt.data.forward import LossFunction
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.layer_network import ONE_PASS, Judging, LayerPruner, LayerwiseNetwork, PrunedLayer
from cbs_opt.engine.outcome import ModelFigures, Outcome, conclude
from cbs_opt.engine.sensitivity import MEASURES, Parts, check_levels, levels_around, measured_curves
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.shares import Shares, Sharing, prune_segments
from cbs_opt.engine.tuned import fine_tuned
from cbs_opt.engine.tuning import check_fine_tune
from cbs_opt.engine.update import Update
from cbs_opt.engine.workspace import own_copy
from cbs_opt.measure.costs import Both, Costs
from cbs_opt.measure.gradients import Progress
from cbs_opt.measure.layer_inputs import InputMoment
from cbs_opt.measure.segments import Chain, PathError
from cbs_opt.network.layers import Layer, PrunableLayers
from cbs_opt.network.modes import in_plain_state
from cbs_opt.report.records import StageRecord
from cbs_opt.report.result import PruneResult
from cbs_opt.report.sensitivity import Sensitivity
from solvers import QuadraticBlock, Reason, SelectionProblem, Solver, Status
from solvers.arguments import one_of
from solvers.curvature import Kronecker
from solvers.errors import DataError, OptionError
from solvers.running import check_capabilities


@in_plain_state
def prune_layerwise(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction | None,
    setup: Setup,
    choice: Choice,
    progress: Progress | None = None,
    shares: Shares | None = None,
    judging: Judging | None = None,
    journal: Path | str | None = None,
) -> PruneResult:
    """Prune a network layer by layer; see `cbs_opt.prune` for the arguments and errors.

    `shares` are those that `find_shares` found for the same network, data and budget; `judging` is what is found out of
    the masks besides.
    """
    network = open_layerwise(model, data, loss_fn, setup, choice)
    # Asked now, as the network changes.
    _ = network.dense_loss
    make = partial(_pruned_by_layer, network, progress=progress, shares=shares, judging=judging)
    return fine_tuned(network, choice, make, journal, progress)


def _pruned_by_layer(
    network: LayerwiseNetwork,
    choice: Choice,
    progress: Progress | None,
    shares: Shares | None,
    judging: Judging | None,
) -> PruneResult:
    """`prune_layerwise` without fine-tuning."""
    run = _Run(network, choice, progress, shares, judging)
    outcome, parts = run.outcome()
    network.gather()
    result = conclude(network, choice, outcome, own=True, progress=progress)
    rows = tuple(
        replace(row, share=share, gap=gap) for row, (share, gap) in zip(result.report.layers, parts, strict=True)
    )
    shares = run.shares
    report = replace(
        result.report, layers=rows, sensitivity=shares.sensitivity, candidates=shares.candidates, shares=shares.rule
    )
    return replace(result, report=report)


def find_shares(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction | None,
    setup: Setup,
    choice: Choice,
    progress: Progress | None = None,
) -> Shares:
    """What each layer is to lose, by the allocation of a choice; see `cbs_opt.prune` for the arguments and errors.

    `prune_layerwise` finds them by itself. Choices whose `quick` is the same share them.
    """
    run = _Run(open_layerwise(model, data, loss_fn, setup, choice), choice, progress)
    _ = run.network.scales
    chain, _ = run.network.chain()
    try:
        return run.sharing(chain).shares()
    except PathError:
        run.network.restore()
        return run.sharing(run.network.whole()).shares()


def sensitivity(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction | None = None,
    *,
    levels: Sequence[float] = levels_around(0.5),
    measure: str | None = None,
    solver: str | Solver = "sweep",
    update: Update | str = Update.OWN,
    setup: Setup | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """What pruning each layer alone does to a network; see `cbs_opt.engine.sensitivity`.

    Parameters
    ----------
    model, data, loss_fn
        As for `cbs_opt.prune`.
    levels : sequence of float in (0, 1]
        Shares of the weights of a layer that go, rising; 1 is added.
    measure : {"loss", "divergence"}, optional
        None takes the divergence from the dense outputs where these are logits or there is no loss, else the loss.
    solver, update
        Layers are pruned by; ``sweep`` instead where that would take long, which is said in the result.
    setup : Setup, optional
        Of layer-wise curvature; ``layer_inputs`` if left out.
    progress : callable, optional
        Called with (layers done, layers in all).

    Returns
    -------
    Sensitivity

    Raises
    ------
    CBSError
    """
    setup = Setup(curvature="layer_inputs") if setup is None else setup
    if not setup.layerwise:
        raise OptionError(
            f"sensitivity prunes layer by layer, not by curvature={setup.curvature!r}; use 'layer_inputs'"
        )
    if measure is not None:
        one_of("measure", measure, MEASURES)
    levels = check_levels(levels)
    choice = Choice(sparsity=0.5, solver=solver, update=update)
    network = open_layerwise(model, data, loss_fn, setup, choice)
    _ = network.scales
    chain, _ = network.chain()
    parts = Parts.of(network.stream)
    try:
        return measured_curves(network, choice, chain, parts, levels, progress, measure)
    except PathError:
        network.restore()
        return measured_curves(network, choice, network.whole(), parts, levels, progress, measure)


def open_layerwise(
    model: nn.Module, data: object, loss_fn: LossFunction | None, setup: Setup, choice: Choice
) -> LayerwiseNetwork:
    """A copy of the network with its data; raises what can be known by now."""
    if loss_fn is None and setup.curvature == "kfac":
        raise OptionError("curvature='kfac' takes gradients of a loss; pass loss_fn, or use curvature='layer_inputs'")
    if loss_fn is not None and not callable(loss_fn):
        raise OptionError(f"loss_fn must be a function of (output, target), not {type(loss_fn).__name__}")
    if loss_fn is None and choice.distill is not None and choice.distill.loss == "given":
        raise OptionError("distill=Distill(loss='given') takes a loss; pass loss_fn, or use loss='kl' or 'mse'")
    check_fine_tune(choice.finetune, setup.place, has_loss=loss_fn is not None)
    if choice.update is Update.NONE and setup.layer_inputs is not None and setup.layer_inputs.towards_dense:
        raise OptionError(
            "towards_dense moves weights, and update='none' keeps them as they are; use 'own' or 'combinatorial'"
        )
    own, layers = own_copy(model, setup)
    check_layerwise(layers, choice)
    stream = BatchStream(data, setup.samples, small=setup.place.type == "cpu")
    trains = choice.distill is not None or choice.finetune is not None
    if stream.once and (trains or choice.batch_norm != "keep"):
        what = ("distillation" if choice.distill else "fine-tuning") if trains else "batch-norm re-estimation"
        raise DataError(
            f"the calibration data are a one-shot {type(data).__name__}, and {what} reads them again; pass a list, a "
            "Dataset or a DataLoader"
        )
    return LayerwiseNetwork(own, layers, setup, model, stream, loss_fn)


def check_layerwise(layers: PrunableLayers, choice: Choice) -> None:
    """Raise OptionError, CapabilityError for what layers cannot be pruned by; no data are needed for that."""
    Floors.of(choice, layers)
    if choice.pattern is not None:
        if choice.allocation is not None:
            raise OptionError(
                f"budget={str(choice.pattern)!r} says what each layer loses; leave allocation={choice.allocation!r} out"
            )
        layers.resolve(choice.pattern)
    if isinstance(choice.costs, Both):
        raise OptionError(f"budget={str(choice.costs)!r} sets two limits, which takes one shot; give one of them")
    if choice.costs is not None and choice.costs.groups is not None:
        raise OptionError(
            f"budget={str(choice.costs)!r} weighs {choice.costs.groups} of all layers against one another, which takes "
            "curvature='fisher'; layer by layer use 'channels:0.5', a share of each layer"
        )
    if choice.update is Update.SEARCHED:
        raise OptionError("update 'searched' asks the loss of the whole network; layer by layer use 'combinatorial'")
    if choice.start is not None:
        raise OptionError("layers are chosen one by one, which takes no start; leave it out")
    # The smallest layer there is shows what the solver takes.
    outline = QuadraticBlock(torch.ones(4), curvature=Kronecker(torch.ones(2), torch.eye(2), 1.0))
    check_capabilities(choice.solver, SelectionProblem([outline], 1, choice.goal()), choice.time_limit, None)


class _Run:
    """One pruning; see the module's docstring."""

    def __init__(
        self,
        network: LayerwiseNetwork,
        choice: Choice,
        progress: Progress | None,
        shares: Shares | None = None,
        judging: Judging | None = None,
    ) -> None:
        self.network, self.choice, self.progress = network, choice, progress
        self.given, self.judging = shares, judging or Judging()
        self.layers, self.setup = network.layers, network.setup
        default = "uniform" if self.setup.curvature == "layer_inputs" else "surgeon"
        self.rule = choice.allocation or ("uniform" if choice.pattern else default)
        self.shares: Shares
        self.costs: Costs | None = None
        self.notes: list[str] = []

    def outcome(self) -> tuple[Outcome, list[tuple[float, float]]]:
        """What became of the network, and of each layer its share of the objective and its gap."""
        started = time.perf_counter()
        _ = self.network.scales
        chain, note = self.network.chain()
        self.notes += [note] if note else []
        try:
            solved = self._prune(chain)
        except PathError as error:
            self.notes = [f"segments depend on the data ({error}): {ONE_PASS}"]
            self.network.restore()
            solved = self._prune(self.network.whole())
        seconds = time.perf_counter() - started
        found = [solved[layer.name] for layer in self.layers]
        pruned = np.concatenate([layer.pruned for layer in found])
        record = self._record(found, int(np.count_nonzero(~pruned)), seconds)
        figures = ModelFigures(self.setup.curvature, "per_layer", sum(layer.n_blocks for layer in found))
        figures = replace(figures, damping=float(self.network.options.damping))
        total = record.objective
        parts = [
            (one.objective / total if total else math.nan, one.gap if math.isfinite(one.bound) else math.nan)
            for one in (layer.solution for layer in found)
        ]
        costs = self.costs
        spent = {} if costs is None else costs.summary(pruned, self.shares.split)
        return Outcome(pruned, None, (record,), figures, costs=spent), parts

    def sharing(self, chain: Chain) -> Sharing:
        """What finds how much each layer is to lose."""
        return Sharing(self.network, self.choice, chain, self.rule)

    def _prune(self, chain: Chain) -> dict[str, PrunedLayer]:
        """Choose and update the weights of all layers, in the network."""
        network = self.network
        sharing = self.sharing(chain)
        self.costs, self.shares = sharing.costs, self.given or sharing.shares()
        self.notes += self.shares.notes
        pruner = LayerPruner(network, self.choice, self.shares.rule, self.judging)
        found: dict[str, PrunedLayer] = {}

        def told(layer: Layer, moment: InputMoment, pruned: PrunedLayer) -> None:
            found[layer.name] = pruned
            self.notes += moment.notes(network.options.damping, network.scales.get(layer.name))
            self.notes += [
                f"layer {layer.name!r} is also used by {owner!r}, as another matrix: it was not measured there"
                for owner, _ in network.streamed().unlike(layer)
            ]
            if self.progress is not None:
                self.progress(len(found), len(self.layers))

        prune_segments(network, chain, pruner, self.shares.counts, network.stream, told)
        return found

    def _record(self, found: list[PrunedLayer], n_kept: int, seconds: float) -> StageRecord:
        solutions = [layer.solution for layer in found]
        objective, bound = sum(s.objective for s in solutions), sum(s.bound for s in solutions)
        gap = (objective - bound) / abs(objective) if objective and math.isfinite(bound) else math.inf
        proven = all(s.status is Status.OPTIMAL for s in solutions)
        seconds_solve = sum(s.seconds for s in solutions)
        seconds_update = sum(layer.seconds_update for layer in found)
        limited = [s.reason for s in solutions if s.reason is not Reason.COMPLETED]
        return StageRecord(
            stage=1,
            kind="prune",
            n_kept=n_kept,
            sparsity=1.0 - n_kept / self.layers.n,
            loss_gradients=math.nan,
            loss_before=self.network.dense_loss,
            loss_masked=math.nan,
            loss_after=math.nan,
            damping=float(self.network.options.damping),
            step=self.choice.update_scale if self.choice.update is not Update.NONE else math.nan,
            evaluations=0,
            n_regrown=0,
            n_images=self.network.stream.n,
            seconds_gradients=max(seconds - seconds_solve - seconds_update, 0.0),
            seconds_solve=seconds_solve,
            seconds_update=seconds_update,
            seconds_batch_norm=0.0,
            solver=f"{self.choice.solver.spec}@{self.shares.rule}",
            objective=objective,
            refit_objective=sum(s.refit_objective for s in solutions),
            bound=bound,
            gap=0.0 if proven else gap,
            status=(Status.OPTIMAL if proven else Status.FEASIBLE).value,
            reason=(limited[0] if limited else Reason.COMPLETED).value,
            repairs=tuple(dict.fromkeys((*self.notes, *(repair for layer in found for repair in layer.repairs)))),
        )
