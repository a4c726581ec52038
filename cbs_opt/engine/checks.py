"""Does everything fit together? Asked once, of every plan, before any data are read.

What cannot be refused here, because only the data or the gradients tell, is refused where it shows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cbs_opt.engine.choice import Choice, Extent
from cbs_opt.engine.estimate import Estimate, estimate_memory
from cbs_opt.engine.floors import Floors
from cbs_opt.engine.plan import Plan
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.engine.tuning import check_fine_tune
from cbs_opt.engine.update import Update
from cbs_opt.measure.blocks import contiguous_partition
from cbs_opt.measure.costs import channels_of
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.network.layers import PrunableLayers
from solvers import Capability, Knapsack, Objective, QuadraticBlock, SelectionProblem
from solvers.curvature import Curvature, LowRank, Unmeasured
from solvers.errors import CapabilityError, OptionError
from solvers.routes import check_budget
from solvers.running import check_capabilities


def check_plan(
    model: nn.Module, layers: PrunableLayers, setup: Setup, choice: Choice, plan: Plan, n_samples: int | None = None
) -> Estimate:
    """Raise for a plan that cannot be carried out on a network; what it takes.

    Parameters
    ----------
    model, layers
        The network, of which only shapes are looked at.
    setup, choice, plan
    n_samples : int, optional
        Calibration samples, where that is known.

    Raises
    ------
    OptionError, CapabilityError
        The message says what to do instead.
    """
    Floors.of(choice, layers)
    check_fine_tune(choice.finetune, setup.place)
    fisher, stages = setup.options, plan.stages
    need = choice.needs if stages is None else Extent.CURVATURE
    if setup.curvature == "none" and need is not Extent.WEIGHTS:
        what = f"{choice.solver.name!r} with update {choice.update.value!r} needs" if stages is None else "stages need"
        raise CapabilityError(f"{what} the {need}, which curvature='none' does not measure; use curvature='fisher'")
    if stages is None:
        _check_one_shot(choice, fisher, need)
    else:
        _check_stages(choice, fisher, stages)
    if choice.shared is None:
        problem = _outline(layers, fisher, choice, stages, need)
        check_capabilities(choice.solver, problem, choice.time_limit, choice.start)
        if choice.budget is not None:
            if not fisher.spec.contiguous and need is Extent.CURVATURE:
                raise OptionError(
                    f"budget={str(choice.budget)!r} takes blocks of consecutive weights, not {str(fisher.spec)!r}"
                )
            grouped = choice.costs is not None and choice.costs.groups is not None
            labels = channels_of(layers) if grouped else None
            costs = Knapsack(np.ones(problem.n if labels is None else labels[-1] + 1), problem.n, labels)
            limited = problem.with_budget(costs if choice.pattern is None else layers.resolve(choice.pattern))
            check_budget(choice.solver, limited)
    refits = choice.update in (Update.COMBINATORIAL, Update.SEARCHED)
    columns = choice.kept(layers.n) if refits else 0
    return estimate_memory(model, layers, setup, need, n_columns=columns, n_samples=n_samples)


def _check_one_shot(choice: Choice, fisher: FisherOptions, need: Extent) -> None:
    if choice.update is Update.SEARCHED:
        if choice.update_scale != 1.0:
            raise OptionError(f"update 'searched' finds its own length; leave update_scale={choice.update_scale:g} out")
        if fisher.ridge <= 0.0 and not fisher.relative_damping:
            raise OptionError("update 'searched' varies the damping; pass a positive one, e.g. damping=1e-3")
    if choice.selects is Extent.GRADIENT and need is Extent.CURVATURE and not fisher.first_order:
        raise OptionError(
            f"solver {choice.solver.name!r} needs the mean gradient; pass FisherOptions(first_order=True)"
        )


def _check_stages(choice: Choice, fisher: FisherOptions, stages: StageOptions) -> None:
    """What stages decide themselves or do not support."""
    if choice.costs is not None and choice.costs.groups not in (None, "channels"):
        raise OptionError(
            f"budget={str(choice.budget)!r} prices {choice.costs.groups} by what a smaller network lacks, which "
            "changes with every one that goes; use one stage, or groups='channels'"
        )
    if choice.shared is not None and choice.budget is not None:
        raise OptionError(f"stages share out budget={str(choice.budget)!r} themselves; leave allocation out")
    if choice.update is not Update.COMBINATORIAL:
        raise OptionError(f"stages refit the kept weights: update must be 'combinatorial', not {choice.update.value!r}")
    if choice.update_scale != 1.0:
        raise OptionError(f"stages search the length of the update: leave update_scale={choice.update_scale!r} out")
    if choice.time_limit is not None:
        raise OptionError("stages keep no time limit; leave time_limit out")
    if choice.batch_norm != "keep":
        raise OptionError("stages re-estimate batch norms by StageOptions.batch_norm; leave batch_norm= out")
    if choice.start is not None:
        raise OptionError("stages start from the network as it is; leave start out")
    if fisher.relative_damping is not None:
        raise OptionError("stages search the damping of each step from a number; pass damping=, not relative_damping=")
    if fisher.ridge <= 0.0:
        raise OptionError("stages need a positive damping to start from, e.g. FisherOptions(damping=1e-4)")
    if not fisher.spec.contiguous:
        raise OptionError(
            f"stages rebuild the blocks as weights go, which {str(fisher.spec)!r} does not support; use 'one', "
            "'per_layer', 'per_row' or 'fixed:SIZE'"
        )
    if choice.selects is Extent.GRADIENT and stages.first_order is not True and not fisher.first_order:
        raise OptionError(f"solver {choice.solver.name!r} needs the gradient; pass StageOptions(first_order=True)")


def _outline(
    layers: PrunableLayers, fisher: FisherOptions, choice: Choice, stages: StageOptions | None, need: Extent
) -> SelectionProblem:
    """A problem of the shape of the one to come, without its values: enough to check a solver's capabilities."""
    objective: Objective = choice.goal(staged=stages is not None)
    gradient = fisher.first_order if stages is None else Capability.LINEAR_TERM in choice.solver.capabilities
    blocks = []
    if need is Extent.CURVATURE:
        sizes = contiguous_partition(layers, fisher.spec).sizes if fisher.spec.contiguous else (layers.n,)
    else:
        sizes, gradient = tuple(layer.n for layer in layers), need is Extent.GRADIENT
    for size in sizes:
        # Expanded, so that the outline of a large network takes no memory.
        zeros = torch.zeros(1).expand(size)
        outline: Curvature = LowRank(zeros.unsqueeze(0), 1.0) if need is Extent.CURVATURE else Unmeasured(size)
        blocks.append(QuadraticBlock(zeros, curvature=outline, gradient=zeros if gradient else None))
    return SelectionProblem(blocks, layers.n - choice.kept(layers.n), objective)
