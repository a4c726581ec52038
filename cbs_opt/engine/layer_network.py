"""A network whose layers are pruned one by one: its data are streamed, and it stays where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import cut
from cbs_opt.data.forward import Forward, LossFunction
from cbs_opt.data.losses import StreamMeter
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.estimate import estimate_layerwise
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.update import Update, Updated, own_update, scaled, update_weights
from cbs_opt.engine.workspace import OpenNetwork
from cbs_opt.measure.costs import SAMPLES, Costs
from cbs_opt.measure.layer_inputs import InputMoment, LayerInputOptions, Streamed
from cbs_opt.measure.row_scales import row_scales
from cbs_opt.measure.segments import Chain, find_chain, whole
from cbs_opt.network.identity import copy_network
from cbs_opt.network.layers import Layer, PrunableLayers
from cbs_opt.network.masks import remove_masks
from solvers import Capability, Objective, QuadraticBlock, SelectionProblem, Solution, solve
from solvers import bound as lower_bound
from solvers.allocation import ALLOCATIONS
from solvers.arrays import Mask
from solvers.errors import DataError, OptionError
from solvers.refit import refit
from solvers.verify import certify

#: What is said where segments cannot be.
ONE_PASS = "all layers were measured in one pass of the dense network"


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
        self.options = setup.layer_inputs or LayerInputOptions()

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

    def dense_weight(self, layer: Layer) -> Tensor:
        """The weight of one layer in the network that was given."""
        weight: Tensor = getattr(*layer.held(self.given))
        return weight.detach()

    @cached_property
    def dense_loss(self) -> float:
        """Mean calibration loss of the network given, to be asked for before it is pruned."""
        self.gather()
        return self.meter.of_network(self.model)

    @property
    def source(self) -> BatchStream:
        """The calibration data."""
        return self.stream

    def dense_copy(self) -> nn.Module:
        """A copy of the network given, in eval mode."""
        return remove_masks(copy_network(self.given)).eval()

    def gather(self) -> None:
        """Put all of the network on the device, if there is a loss to be taken of it."""
        if self.has_loss:
            self.model.to(self.setup.place)

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """s of every layer; to be asked for before it is pruned."""
        return row_scales(self.streamed()) if self.setup.curvature == "kfac" else {}

    def compared_scales(self, stream: BatchStream) -> dict[str, Tensor]:
        """s by which scores of several layers compare, while the network is dense; without a loss the curvature's."""
        if self.setup.curvature == "kfac" or not self.has_loss:
            return self.scales
        self.gather()
        return row_scales(self.streamed(stream))

    def streamed(self, stream: BatchStream | None = None) -> Streamed:
        """As what measures takes it, with all of its data or others."""
        return Streamed(self.model, self.layers, stream or self.stream, self.forward, self.setup.place)

    def weights(self, layer: Layer) -> Tensor:
        """Those of one layer as they are, float64 (R·d,)."""
        weight = getattr(*layer.held(self.model))
        return layer.view.flatten(weight.detach()).to(self.setup.place, torch.float64)

    def costs(self, choice: Choice) -> Costs | None:
        """What the weights cost, under a budget of that."""
        if choice.costs is None:
            return None
        batch = self.stream.first()
        inputs, targets, size = cut(batch, np.arange(min(SAMPLES, batch[2])))
        self.model.to(self.setup.place)
        streamed = self.streamed()
        put = streamed.put(inputs), None if targets is None else streamed.put(targets), size
        return Costs.of(choice.costs, streamed, put)

    def blocks(self, moment: InputMoment, scales: dict[str, Tensor] | None = None) -> list[QuadraticBlock]:
        """Of one layer, by the scales of the curvature or others."""
        layer, options = moment.layer, self.options
        scale = (self.scales if scales is None else scales).get(layer.name)
        weights = moment.towards(self.weights(layer), options.damping, options.towards_dense)
        return moment.blocks(weights, options.damping, scale)

    def chain(self) -> tuple[Chain, str]:
        """Its segments, and what is to be said of them; raises OptionError where their moments do not fit."""
        chain, note = self._found_chain()
        estimate_layerwise(self.model, chain.segments, self.setup)
        return chain, note

    def whole(self) -> Chain:
        """All layers in one pass; raises OptionError where their moments do not fit."""
        chain = whole(self.streamed())
        estimate_layerwise(self.model, chain.segments, self.setup)
        return chain

    def _found_chain(self) -> tuple[Chain, str]:
        streamed = self.streamed()
        if not self.options.segments:
            return whole(streamed), ""
        try:
            self.model.to(self.setup.place)
            chain = find_chain(streamed)
        except torch.OutOfMemoryError:
            self.model.cpu()
            chain = find_chain(replace(streamed, device=torch.device("cpu")))
        if chain.cuts and self.stream.once:
            raise DataError(
                f"the {len(chain.segments)} segments of the network are measured one after the other, which takes data "
                "that can be read again; pass a list, a Dataset or a DataLoader, or LayerInputOptions(segments=False)"
            )
        alone = not chain.cuts and len(self.layers) > 1
        return chain, f"no chain of segments was found: {ONE_PASS}" if alone else ""

    @torch.no_grad()
    def write(self, layer: Layer, weights: Tensor) -> None:
        """Put weights (R·d,) into one layer."""
        weight = getattr(*layer.held(self.model))
        weight.copy_(layer.view.unflatten(weights.to(weight.device)))

    def restore(self) -> None:
        """Undo all pruning."""
        for layer, weight in zip(self.layers, self.dense_layers(), strict=True):
            self.write(layer, layer.view.flatten(weight.detach()))


def _no_loss(*_: object) -> Tensor:
    raise OptionError("no loss was given")


@dataclass(frozen=True)
class Judging:
    """What is found out of the masks of layers beside what the plan needs.

    Attributes
    ----------
    refit : bool
        The joint objective of each mask, whatever the update; it costs as much as one.
    bound : str, optional
        Method of `solvers.bound` for a lower bound of each layer's objective, given what the layer loses.
    """

    refit: bool = False
    bound: str | None = None


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """A layer that is done: the solver's mask and figures, and what the update took."""

    solution: Solution
    seconds_update: float
    n_blocks: int
    repairs: tuple[str, ...]

    @property
    def pruned(self) -> Mask:
        """The mask."""
        return self.solution.pruned


class LayerPruner:
    """Prunes layers of a network as a choice says.

    Parameters
    ----------
    network : LayerwiseNetwork
    choice : Choice
    rule : str
        What splits the budget inside a layer, for solvers that cannot share it among the layer's blocks; one of
        layers alone is taken as uniform.
    judging : Judging
    """

    def __init__(self, network: LayerwiseNetwork, choice: Choice, rule: str, judging: Judging = Judging()) -> None:
        self.network, self.choice, self.judging = network, choice, judging
        self.floors = Floors.of(choice, network.layers)
        self._inner = rule if rule in ALLOCATIONS else "uniform"

    def prune(self, layer: Layer, blocks: list[QuadraticBlock], n_prune: int) -> PrunedLayer:
        """Choose and update the weights of a layer, in the network."""
        choice, network = self.choice, self.network
        inside = self.floors.inside(layer.start, layer.stop)
        budget = inside.budget(n_prune) if choice.pattern is None else layer.fitted(choice.pattern)
        problem = SelectionProblem(blocks, budget, choice.goal())
        refits = choice.update in (Update.COMBINATORIAL, Update.SINGLE)
        shares = len(problem.blocks) > 1 and Capability.GLOBAL_BUDGET not in choice.solver.capabilities
        shares = choice.pattern is None and (shares or self._inner == "rows")
        solution = solve(
            problem,
            choice.solver,
            time_limit=choice.time_limit,
            seed=network.setup.seed if choice.seed is None else choice.seed,
            allocation=self._inner if shares else None,
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
        solution = self._judged(problem, solution)
        network.write(layer, torch.from_numpy(updated.weights))
        solution = replace(solution, refit_weights=None, own_weights=None, trace=())
        return PrunedLayer(solution, updated.seconds, len(problem.blocks), (*solution.repairs, *updated.repairs))

    def _judged(self, problem: SelectionProblem, solution: Solution) -> Solution:
        """With what else is asked for."""
        if self.judging.refit and math.isnan(solution.refit_objective):
            solution = replace(solution, refit_objective=refit(problem, solution.pruned).value)
        if self.judging.bound is None:
            return solution
        best = max(solution.bound, lower_bound(problem, self.judging.bound).value)
        best, gap, status = certify(solution.objective, best, solution.solver)
        return replace(solution, bound=best, gap=gap, status=status)
