"""Layer by layer: each segment of a network is measured with those before it already pruned, chosen and updated.

    for each segment:  C of its layers (one pass over the data) → blocks diag(s) ⊗ (C + λI) → mask → update → network

How many weights each layer loses is settled before, by the allocation: ``uniform`` (the default for ``layer_inputs``,
where the errors of different layers are in different units) or ``rows`` give all layers the same sparsity; the others
put one threshold over the scores of all layers, for which, but for ``magnitude``, the dense network is measured once
more, segment by segment. ``surgeon`` (w² / [H⁻¹]_ii) is the default for ``kfac``, where all layers are in units of the
loss. The total is exact. Where a layer has several blocks, solvers that share a budget do so inside the layer.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.forward import Forward, LossFunction
from cbs_opt.data.losses import StreamMeter
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.measured import ModelFigures, Outcome, conclude
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.update import Update, Updated, own_update, scaled, update_weights
from cbs_opt.engine.workspace import OpenNetwork, own_copy
from cbs_opt.measure.gradients import Progress
from cbs_opt.measure.layer_inputs import InputMoment, LayerInputOptions, Streamed, row_scales
from cbs_opt.measure.segments import Chain, PathError, SegmentPasses, find_chain, whole
from cbs_opt.network.layers import Layer, PrunableLayers
from cbs_opt.report.records import StageRecord
from cbs_opt.report.report import PruneResult
from solvers import Capability, Objective, QuadraticBlock, Reason, SelectionProblem, Solution, Status, solve
from solvers.allocation import SCORES, uniform_shares
from solvers.arrays import Index, Mask
from solvers.curvature import Kronecker
from solvers.errors import DataError, OptionError
from solvers.ranking import prune_smallest_magnitudes
from solvers.running import check_capabilities

_ONE_PASS = "all layers were measured in one pass of the dense network"


class LayerwiseNetwork(OpenNetwork):
    """A network whose data are streamed; it stays where it is, its segments go to the device one by one.

    Parameters
    ----------
    given : nn.Module
        As it was handed in: it still has the dense weights.
    stream : BatchStream
    loss_fn : callable, optional
    model, layers, setup
        As for `OpenNetwork`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: PrunableLayers,
        setup: Setup,
        given: nn.Module,
        stream: BatchStream,
        loss_fn: LossFunction | None,
    ) -> None:
        super().__init__(model, layers, Forward(model, loss_fn or _no_loss), setup)
        self.given, self.has_loss = given, loss_fn is not None
        self.stream = stream.cast(layers.parameters(model)[0].dtype)

    def settle(self, model: nn.Module) -> nn.Module:
        """Put it on the CPU, from where parts go to the device."""
        return model.cpu()

    @cached_property
    def meter(self) -> StreamMeter:
        """The calibration loss; nan without one."""
        setup = self.setup
        return StreamMeter(self.stream, self.forward if self.has_loss else None, setup.place, setup.loss_samples)

    def dense_layers(self) -> list[Tensor]:
        """The weights of the network that was given."""
        return self.layers.parameters(self.given)

    @cached_property
    def dense_loss(self) -> float:
        """Mean calibration loss of the network given, to be asked for before it is pruned."""
        self.gather()
        return self.meter.of_network(self.model)

    def gather(self) -> None:
        """Put all of the network on the device, if there is a loss to be taken of it."""
        if self.has_loss:
            self.model.to(self.setup.place)

    def streamed(self) -> Streamed:
        """As what measures takes it."""
        return Streamed(self.model, self.layers, self.stream, self.forward, self.setup.place)

    @torch.no_grad()
    def write(self, layer: Layer, weights: Tensor) -> None:
        """Put weights (R·d,) into one layer."""
        weight = getattr(*layer.held(self.model))
        weight.copy_(layer.view.unflatten(weights.to(weight.device)))

    def restore(self) -> None:
        """Undo all pruning."""
        for layer, weight in zip(self.layers, self.dense_layers(), strict=True):
            self.write(layer, layer.view.flatten(weight.detach()))


def prune_layerwise(
    model: nn.Module,
    data: object,
    loss_fn: LossFunction | None,
    setup: Setup,
    choice: Choice,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a network layer by layer; see `cbs_opt.prune` for the arguments and errors."""
    if loss_fn is None and setup.curvature == "kfac":
        raise OptionError("curvature='kfac' takes gradients of a loss; pass loss_fn, or use curvature='layer_inputs'")
    if loss_fn is not None and not callable(loss_fn):
        raise OptionError(f"loss_fn must be a function of (output, target), not {type(loss_fn).__name__}")
    own, layers = own_copy(model, setup)
    check_layerwise(layers, choice)
    network = LayerwiseNetwork(own, layers, setup, model, BatchStream(data, setup.samples), loss_fn)
    # Asked now, as the network changes.
    _ = network.dense_loss
    outcome, shares = _Run(network, choice, progress).outcome()
    network.gather()
    result = conclude(network, choice, outcome, own=True)
    rows = tuple(replace(row, share=share) for row, share in zip(result.report.layers, shares, strict=True))
    return replace(result, report=replace(result.report, layers=rows))


def _no_loss(*_: object) -> Tensor:
    raise OptionError("no loss was given")


def check_layerwise(layers: PrunableLayers, choice: Choice) -> None:
    """Raise OptionError, CapabilityError for what layers cannot be pruned by; no data are needed for that."""
    Floors.of(choice, layers)
    if choice.update is Update.SEARCHED:
        raise OptionError("update 'searched' asks the loss of the whole network; layer by layer use 'combinatorial'")
    if choice.start is not None:
        raise OptionError("layers are chosen one by one, which takes no start; leave it out")
    # The smallest layer there is shows what the solver takes.
    outline = QuadraticBlock(torch.ones(4), curvature=Kronecker(torch.ones(2), torch.eye(2), 1.0))
    check_capabilities(choice.solver, SelectionProblem([outline], 1, choice.goal()), choice.time_limit, None)


class _Run:
    """One pruning; see the module's docstring."""

    def __init__(self, network: LayerwiseNetwork, choice: Choice, progress: Progress | None) -> None:
        self.network, self.choice, self.progress = network, choice, progress
        self.layers, self.setup = network.layers, network.setup
        self.options = self.setup.layer_inputs or LayerInputOptions()
        default = "uniform" if self.setup.curvature == "layer_inputs" else "surgeon"
        self.rule = choice.allocation or default
        self.floors = Floors.of(choice, self.layers)
        self.notes: list[str] = []

    def outcome(self) -> tuple[Outcome, list[float]]:
        """What became of the network, and the share of the objective of each layer."""
        started = time.perf_counter()
        self.scales = row_scales(self.network.streamed()) if self.setup.curvature == "kfac" else {}
        chain = self._chain()
        try:
            solved = self._prune(chain)
        except PathError as error:
            self.notes = [f"segments depend on the data ({error}): {_ONE_PASS}"]
            self.network.restore()
            solved = self._prune(whole(self.network.streamed()))
        seconds = time.perf_counter() - started
        found = [solved[layer.name] for layer in self.layers]
        pruned = np.concatenate([layer.pruned for layer in found])
        record = self._record(found, int(np.count_nonzero(~pruned)), seconds)
        figures = ModelFigures(self.setup.curvature, "per_layer", sum(layer.n_blocks for layer in found))
        figures = replace(figures, damping=float(self.options.damping))
        total = record.objective
        shares = [layer.solution.objective / total if total else math.nan for layer in found]
        return Outcome(pruned, None, (record,), figures), shares

    def _chain(self) -> Chain:
        streamed = self.network.streamed()
        if not self.options.segments:
            return whole(streamed)
        try:
            self.network.model.to(self.setup.place)
            chain = find_chain(streamed)
        except torch.OutOfMemoryError:
            self.network.model.cpu()
            chain = find_chain(replace(streamed, device=torch.device("cpu")))
        if not chain.cuts and len(self.layers) > 1:
            self.notes.append(f"no chain of segments was found: {_ONE_PASS}")
        if chain.cuts and self.network.stream.once:
            raise DataError(
                f"the {len(chain.segments)} segments of the network are measured one after the other, which takes data "
                "that can be read again; pass a list, a Dataset or a DataLoader, or LayerInputOptions(segments=False)"
            )
        return chain

    def _prune(self, chain: Chain) -> dict[str, _Pruned]:
        """Choose and update the weights of all layers, in the network."""
        counts = self._counts(chain)
        found: dict[str, _Pruned] = {}
        for moments in SegmentPasses(self.network.streamed(), chain):
            for moment in moments:
                layer = moment.layer
                found[layer.name] = self._prune_layer(moment, counts[layer.name])
                if self.progress is not None:
                    self.progress(len(found), len(self.layers))
        return found

    def _counts(self, chain: Chain) -> dict[str, int]:
        """How many weights each layer loses, its floors being kept."""
        asked = self._shares(chain)
        counts = self.floors.shared(asked, self.layers)
        gains = np.maximum(asked - counts, 0)
        if gains.any():
            names = ", ".join(name for name, gain in zip(self.layers.names, gains, strict=True) if gain)
            self.notes.append(f"floors: {gains.sum()} weights more were left to {names}, and as many fewer to others")
        return dict(zip(self.layers.names, counts.tolist(), strict=True))

    def _shares(self, chain: Chain) -> Index:
        """How many weights each layer loses by the allocation, (layers,)."""
        n_prune = self.layers.n - self.choice.kept(self.layers.n)
        if self.rule not in SCORES:
            return uniform_shares([layer.n for layer in self.layers], n_prune)
        scores = {}
        if self.rule == "magnitude":
            scores = {layer.name: self._weights(layer).abs().float() for layer in self.layers}
        else:
            for moments in SegmentPasses(self.network.streamed(), chain):
                for moment in moments:
                    problem = SelectionProblem(self._blocks(moment), moment.layer.n, self.choice.goal())
                    scores[moment.layer.name] = torch.from_numpy(SCORES[self.rule](problem)).float()
        chosen = prune_smallest_magnitudes([scores[layer.name].cpu() for layer in self.layers], n_prune)
        return np.array([np.count_nonzero(chosen[layer.slice]) for layer in self.layers], dtype=np.int64)

    def _weights(self, layer: Layer) -> Tensor:
        weight = getattr(*layer.held(self.network.model))
        return layer.view.flatten(weight.detach()).to(self.setup.place, torch.float64)

    def _blocks(self, moment: InputMoment) -> list[QuadraticBlock]:
        layer = moment.layer
        return moment.blocks(self._weights(layer), self.options.damping, self.scales.get(layer.name))

    def _prune_layer(self, moment: InputMoment, n_prune: int) -> _Pruned:
        choice, layer = self.choice, moment.layer
        self.notes += moment.notes(self.options.damping, self.scales.get(layer.name))
        self.notes += [
            f"layer {layer.name!r} is also used by {owner!r}, as another matrix: it was not measured there"
            for owner, _ in self.network.streamed().unlike(layer)
        ]
        budget = self.floors.inside(layer.start, layer.stop).budget(n_prune)
        problem = SelectionProblem(self._blocks(moment), budget, choice.goal())
        refits = choice.update in (Update.COMBINATORIAL, Update.SINGLE)
        shares = len(problem.blocks) > 1 and Capability.GLOBAL_BUDGET not in choice.solver.capabilities
        solution = solve(
            problem,
            choice.solver,
            time_limit=choice.time_limit,
            seed=self.setup.seed if choice.seed is None else choice.seed,
            allocation=self.rule if shares or self.rule == "rows" else None,
            with_refit=refits,
            as_is=not refits,
        )
        if choice.update is Update.COMBINATORIAL and solution.refit_weights is not None:
            updated = Updated(solution.refit_weights, solution.refit_objective, 0.0)
            updated = scaled(problem, solution.pruned, updated, choice.update_scale)
        elif choice.update is Update.OWN:
            updated = own_update(problem, solution, choice.update_scale)
        else:
            updated = update_weights(problem, solution.pruned, choice.update, scale=choice.update_scale)
        as_found = refits or (choice.update is Update.OWN and choice.update_scale == 1.0)
        if problem.objective is Objective.JOINT and not as_found:
            # What is judged is what the layer gets.
            solution = replace(solution, objective=problem.change(updated.weights))
        self.network.write(layer, torch.from_numpy(updated.weights))
        solution = replace(solution, refit_weights=None, own_weights=None, trace=())
        return _Pruned(solution, updated.seconds, len(problem.blocks), (*solution.repairs, *updated.repairs))

    def _record(self, found: list[_Pruned], n_kept: int, seconds: float) -> StageRecord:
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
            damping=float(self.options.damping),
            step=self.choice.update_scale if self.choice.update is not Update.NONE else math.nan,
            evaluations=0,
            n_regrown=0,
            n_images=self.network.stream.n,
            seconds_gradients=max(seconds - seconds_solve - seconds_update, 0.0),
            seconds_solve=seconds_solve,
            seconds_update=seconds_update,
            seconds_batch_norm=0.0,
            solver=f"{self.choice.solver.spec}@{self.rule}",
            objective=objective,
            refit_objective=sum(s.refit_objective for s in solutions),
            bound=bound,
            gap=0.0 if proven else gap,
            status=(Status.OPTIMAL if proven else Status.FEASIBLE).value,
            reason=(limited[0] if limited else Reason.COMPLETED).value,
            repairs=tuple(dict.fromkeys((*self.notes, *(repair for layer in found for repair in layer.repairs)))),
        )


@dataclass(frozen=True, eq=False)
class _Pruned:
    """A layer that is done: the solver's mask and figures, and what the update took."""

    solution: Solution
    seconds_update: float
    n_blocks: int
    repairs: tuple[str, ...]

    @property
    def pruned(self) -> Mask:
        return self.solution.pruned
