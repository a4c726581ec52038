"""Large-neighbourhood search: free a few weights, decide them exactly, keep what is better, repeat.

Each round picks a weight at random and frees it together with removed and kept weights that interact with it or are
cheap to move; the problem that is left for them is again a selection or joint problem (derived in
`solvers.composites.subproblem`) and goes to an exact backend. (Shaw, CP 1998; Pisinger and Ropke, 2010.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.arrays import Index, Mask
from solvers.composites.nested import Composite, run_inner
from solvers.composites.subproblem import Subproblem, subproblem
from solvers.errors import OptionError
from solvers.local_search.state import SwapState
from solvers.local_search.working_set import best_of_sides
from solvers.problem import Objective, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import ANY_PROBLEM, ANYTIME, Capability, Context, option

#: An improvement smaller than this, relative to the sub-problem's objective, may be rounding.
_TOLERANCE = 1e-12
#: Standard deviations of the perturbation of log scores, one drawn per round.
_NOISE = (0.5, 1.5, 5.0)


@dataclass(frozen=True)
class LargeNeighbourhoodSolver(Composite):
    """LNS over an exact backend, for both objectives.

    A bound is passed on only when one round could free every weight, that is for n ≤ size.
    """

    name = "lns"
    summary = "free a few weights at a time and decide them with an exact backend"
    reference = "Pisinger and Ropke, Large neighborhood search, Handbook of Metaheuristics 2010"
    capabilities = ANY_PROBLEM | ANYTIME | {Capability.RANDOMISED, Capability.BOUND}
    adopted = frozenset({Capability.GLOBAL_BUDGET, Capability.BOUND})
    hands_on_whole = False

    backend: str = option("branch_bound", "the exact solver of the sub-problems, with its options")
    start: str = option("auto", "solver of the first mask; auto is tabu, or obs for the joint objective")
    size: int | None = option(None, "weights freed per round; none = 60, or 24 for the joint objective", minimum=2)
    rounds: int = option(60, "rounds", minimum=1)
    patience: int = option(30, "rounds without a better mask that end the search", minimum=1)
    round_seconds: float = option(5.0, "time limit of one sub-problem", minimum=1e-3)

    @property
    def member_specs(self) -> list[str]:
        """The backend."""
        return [self.backend]

    def lacking(self) -> frozenset[Capability]:
        """What the backend cannot do; raises OptionError where nothing is left."""
        # Sub-problems of the selection objective always carry a gradient.
        needed = {
            Capability.SELECTION: {Capability.SELECTION, Capability.LINEAR_TERM},
            Capability.JOINT: {Capability.JOINT},
        }
        missing = {kind for kind, wanted in needed.items() if not wanted <= self.members[0].capabilities}
        if len(missing) == len(needed):
            raise OptionError(f"lns: backend {self.backend!r} solves no sub-problem; name an exact solver")
        return super().lacking() | missing

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Start, free, decide, keep."""
        backend = self.members[0]
        pruned = self._first_mask(problem, context)
        context.record(problem.value(pruned))
        rng = context.rng()
        size = self.size or (24 if problem.objective is Objective.JOINT else 60)
        bound, improved, idle, done = -math.inf, 0, 0, 0
        reason = Reason.ITERATION_LIMIT
        for done in range(1, self.rounds + 1):
            if context.deadline.expired():
                reason = Reason.TIME_LIMIT
                break
            everything = problem.n <= size
            free = np.arange(problem.n) if everything else choose_free(problem, pruned, size, rng)
            # Where everything is free it is the problem itself, without the rounding of a derived one.
            part = Subproblem(problem, 0.0, free) if everything else subproblem(problem, pruned, free)
            idle += 1
            if part is not None and part.problem.n_prune not in (0, part.problem.n):
                seconds = context.deadline.remaining()
                current = pruned[part.free]
                # One that frees everything is the problem itself, and may use all the time there is.
                limit = seconds if everything else min(seconds, self.round_seconds)
                seed, alone = context.seed + done, replace(context, calibration_loss=None)
                proposal = run_inner(backend, part.problem, alone, seed=seed, seconds=limit, start=current)
                before = part.problem.value(current)
                if before - part.problem.value(proposal.pruned) > _TOLERANCE * abs(before):
                    pruned, idle, improved = part.widen(pruned, proposal.pruned), 0, improved + 1
                    context.record(problem.value(pruned))
                if everything:
                    bound = part.constant + proposal.bound
                    reason = proposal.reason
                    break
            if idle >= self.patience:
                reason = Reason.COMPLETED
                break
        statistics = {"rounds": float(done), "improved": float(improved)}
        return Proposal(pruned, bound=bound, reason=reason, statistics=statistics)

    def _first_mask(self, problem: SelectionProblem, context: Context) -> Mask:
        if context.start is not None:
            return context.start
        spec = self.start
        if spec == "auto":
            spec = "obs" if problem.objective is Objective.JOINT else "tabu"
        seconds = 0.5 * context.deadline.remaining()
        return run_inner(self.make_inner(spec), problem, context, seed=context.seed, seconds=seconds).pruned


def choose_free(problem: SelectionProblem, pruned: Mask, size: int, rng: np.random.Generator) -> Index:
    """About `size` weights around a random one, half removed and half kept where there are as many; int64, sorted.

    A removed i scores |γ(seed, i)| + max(α_i, 0), a kept j scores (|γ(seed, j)| + c_j) / β_j: interacting with the
    seed, cheap to remove. For the joint objective, where the kept weights make up for the removed ones, α and β
    are the saliencies c alone. Scores are perturbed, in some rounds slightly and in some wildly.
    """
    state = SwapState(problem, pruned)
    inside, drops, outside, rises = state.sides(state.forces())
    if problem.objective is Objective.JOINT:
        drops, rises = state.curvature[inside], state.curvature[outside]
    seed = int(rng.integers(problem.n))
    linked = np.abs(state.interaction(seed))
    tiny = max(problem.scale, np.finfo(np.float64).tiny) * 1e-9 / problem.n
    noise = _NOISE[int(rng.integers(len(_NOISE)))]
    score_in = linked[inside] + np.maximum(drops, 0.0) + tiny
    score_out = (linked[outside] + state.curvature[outside] + tiny) / np.maximum(rises, tiny)
    rank_in = np.log(score_in) + noise * rng.normal(size=inside.shape[0])
    rank_out = np.log(score_out) + noise * rng.normal(size=outside.shape[0])
    return best_of_sides(inside, rank_in, outside, rank_out, size)
