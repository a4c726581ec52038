"""Exact decomposition: weights that do not interact, directly or through others, are decided apart.

Two weights of a block interact if their columns share a row in which neither is zero (otherwise H_ij is exactly 0);
for the selection objective a weight w_i = 0 interacts with nothing. The connected components of this graph are
independent except for the budget, so with f_c(k) the best objective of component c with k removed,

    optimum = min Σ_c f_c(k_c)   subject to  Σ_c k_c = n_prune ,

a dynamic programme (min-plus convolution) over the components, which shares the budget exactly. Components of a single
weight need no solver: together they are the sorted list of their costs. If every f_c(k) is optimal so is the mask, and
the same programme over lower bounds of f_c(k) is a lower bound.

Cost: the inner solver runs once for every component and every k from 1 to min(n_c − 1, n_prune), of which a budget
close to 0 or n leaves only few; a problem in one piece costs one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import networkx as nx
import numpy as np
import torch

from solvers.arrays import Index
from solvers.baselines.obd import diagonal_saliency
from solvers.block import QuadraticBlock
from solvers.composites.nested import Composite, merged, run_inner, run_parts
from solvers.curvature import Dense, Diagonal, LowRank
from solvers.problem import Array, Mask, Objective, SelectionProblem
from solvers.ranking import prune_smallest
from solvers.solution import Proposal
from solvers.solver import ANY_PROBLEM, Capability, Context, option


def interaction_components(problem: SelectionProblem) -> list[Index]:
    """The connected components of the interaction graph: arrays of weights (ascending), by their first weight."""
    graph = nx.Graph()
    graph.add_nodes_from(range(problem.n))
    for block, where in zip(problem.blocks, problem.slices, strict=True):
        # Rows whose weights interact with one another: those of a factor, or of H itself.
        matrix = block.factor if isinstance(block.curvature, LowRank) else block.curvature.dense()
        supports = matrix.detach().cpu().numpy() != 0.0
        if problem.objective is Objective.SELECTION:
            supports &= block.weights.cpu().numpy() != 0.0
        # They are connected: a path through them has the same components.
        for row in np.unique(supports, axis=0):
            nx.add_path(graph, np.flatnonzero(row) + where.start)
            if row.all():
                break
    components = [np.array(sorted(c), dtype=np.int64) for c in nx.connected_components(graph)]
    return sorted(components, key=lambda c: int(c[0]))


@dataclass(frozen=True, eq=False)
class _Profile:
    """f_c(k), a bound on it and the mask that attains it, for k from `low` on."""

    index: Index
    low: int
    values: Array
    bounds: Array
    mask_of: Callable[[int], Mask]


@dataclass(frozen=True)
class ByComponentSolver(Composite):
    """Solve each connected component of the interaction graph for every budget and share the budget exactly."""

    name = "by_component"
    summary = "split into independent components, solve each alone, share the budget by dynamic programming"
    reference = "dynamic programming over connected components"
    adopted = ANY_PROBLEM - {Capability.GLOBAL_BUDGET} | {Capability.BOUND, Capability.EXACT}
    capabilities = ANY_PROBLEM | adopted | {Capability.RANDOMISED, Capability.TIME_LIMIT}
    hands_on_whole = False
    curvatures = (LowRank, Dense, Diagonal)

    solver: str = option("branch_bound", "the solver of one component, with its options")

    @property
    def member_specs(self) -> list[str]:
        """The solver of one component."""
        return [self.solver]

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Decompose, solve, merge."""
        inner = self.members[0]
        components = interaction_components(problem)
        if len(components) == 1 or _unbounded_single(problem):
            seconds = context.deadline.remaining()
            return run_inner(inner, problem, context, seed=context.seed, seconds=seconds, start=context.start)
        singles = np.array([int(c[0]) for c in components if c.shape[0] == 1], dtype=np.int64)
        profiles = [_singles_profile(problem, singles)] if singles.size else []
        pieces = [(c, component_problems(problem, c)) for c in components if c.shape[0] > 1]
        proposals = run_parts(inner, [(part, context.seed, None) for _, parts in pieces for part in parts], context)
        outcomes = iter(proposals)
        profiles += [_profile(index, parts, list(islice(outcomes, len(parts)))) for index, parts in pieces]
        bound = _merge([(p.low, p.bounds) for p in profiles], problem.n_prune)[0]
        return merged(
            _share_budget(problem, profiles),
            proposals,
            context,
            bound=bound if math.isfinite(bound) else -math.inf,
            statistics={"components": float(len(components)), "runs": float(len(proposals))},
        )


def _profile(index: Index, parts: Sequence[SelectionProblem], proposals: Sequence[Proposal]) -> _Profile:
    """What a component costs for every budget, from its solved problems."""
    low = parts[0].n_prune
    values = np.array([part.value(p.pruned) for part, p in zip(parts, proposals, strict=True)])
    decided = [part.budget.only_mask(part.n) is not None for part in parts]
    bounds = np.where(decided, values, np.minimum(values, [p.bound for p in proposals]))
    return _Profile(index, low, values, bounds, lambda k: proposals[k - low].pruned)


def _budget_range(problem: SelectionProblem, size: int) -> tuple[int, int]:
    """How many of `size` weights can be removed at all, inclusive."""
    return max(0, problem.n_prune - (problem.n - size)), min(size, problem.n_prune)


def component_problems(problem: SelectionProblem, index: Index) -> list[SelectionProblem]:
    """The problems of one component, which lies within one block, for all budgets; rows zero on it are left out."""
    number = next(b for b, where in enumerate(problem.slices) if where.start <= index[0] < where.stop)
    block, where = problem.blocks[number], problem.slices[number]
    local = index - where.start
    part = block.select(torch.as_tensor(local, device=block.device))
    if isinstance(part.curvature, LowRank):
        rows = (part.factor != 0.0).any(1)
        factor = part.factor[rows].double() if bool(rows.any()) else part.factor[:1].double()
        part = QuadraticBlock(part.weights, factor, part.damping, part.gradient, part.name)
    low, high = _budget_range(problem, part.n)
    return [SelectionProblem(part, k, problem.objective) for k in range(low, high + 1)]


def _unbounded_single(problem: SelectionProblem) -> bool:
    """Whether some weight alone makes the joint objective unbounded below: a gradient but no curvature."""
    if problem.objective is Objective.SELECTION or problem.gradient is None:
        return False
    return bool(((problem.diagonal == 0.0) & (problem.gradient != 0.0)).any())


def _singles_profile(problem: SelectionProblem, singles: Index) -> _Profile:
    """All components of one weight at once: the cheapest k of them, for every k that is possible."""
    low, high = _budget_range(problem, singles.shape[0])
    removal, base = diagonal_saliency(problem)[singles], 0.0
    if problem.objective is Objective.JOINT and problem.gradient is not None:
        gradient = problem.gradient[singles]
        curvature = problem.diagonal[singles]
        kept = -0.5 * gradient**2 / np.where(gradient == 0.0, 1.0, curvature)
        base, removal = float(kept.sum()), removal - kept
    values = (base + np.concatenate([[0.0], np.cumsum(np.sort(removal))]))[low : high + 1]
    return _Profile(singles, low, values, values, lambda k: prune_smallest(removal, k))


def _merge(profiles: list[tuple[int, Array]], n_prune: int) -> tuple[float, list[Index]]:
    """Min-plus convolution; (least sum, for every profile and total the number it removes)."""
    best = np.full(n_prune + 1, math.inf)
    best[0] = 0.0
    choices = []
    for low, values in profiles:
        fresh = np.full(n_prune + 1, math.inf)
        choice = np.zeros(n_prune + 1, dtype=np.int64)
        for offset, value in enumerate(values):
            k = low + offset
            if k > n_prune:
                break
            with np.errstate(invalid="ignore"):
                candidate = best[: n_prune + 1 - k] + value
            # A sum of ∞ (impossible) and −∞ (no bound) is nan, which is never better.
            better = candidate < fresh[k:]
            fresh[k:][better] = candidate[better]
            choice[k:][better] = k
        best = fresh
        choices.append(choice)
    return float(best[n_prune]), choices


def _share_budget(problem: SelectionProblem, profiles: list[_Profile]) -> Mask:
    """The mask of the best split of the budget."""
    _, choices = _merge([(p.low, p.values) for p in profiles], problem.n_prune)
    pruned = np.zeros(problem.n, dtype=bool)
    total = problem.n_prune
    for profile, choice in zip(reversed(profiles), reversed(choices), strict=True):
        k = int(choice[total])
        pruned[profile.index] = profile.mask_of(k)
        total -= k
    return pruned
