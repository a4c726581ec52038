"""`obs`: backward elimination which re-optimises the kept weights while it removes.

With S the kept weights and v their refit, removing i costs v_i²/(2[H_SS⁻¹]_ii) once the others have been
re-optimised. Weights go in rounds that shrink geometrically with the kept set; each round refits, ranks all kept
weights through the r × r Woodbury system K_S = λI + A_SA_Sᵀ,

    [H_SS⁻¹]_ii = (1 − a_iᵀK_S⁻¹a_i)/λ ,      v = u + A_Sᵀ K_S⁻¹ (Aw − A_S u_S) on S,   u = w − g/λ ,

and resolves the interactions among the cheapest exactly. Once H_SS itself fits, weights go one at a time. In the
rows of a layer they do so from the start (`solvers.joint.row_elimination`).

Source: Hassibi and Stork, *Optimal Brain Surgeon*, NeurIPS 1993; Frantar, Singh and Alistarh, *Optimal Brain
Compression*, NeurIPS 2022; Yu et al., *The Combinatorial Brain Surgeon*, ICML 2022, for the model and the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solvers.budget import Groups, Knapsack, LinearRows
from solvers.joint.elimination import EliminationPlan, eliminate
from solvers.joint.group_elimination import eliminate_groups
from solvers.joint.kept import KEPT_SYSTEMS
from solvers.joint.row_elimination import eliminate_rows
from solvers.layer_rows import LayerRows
from solvers.moves.item_moves import ItemMoves
from solvers.moves.item_problem import MOST_ITEMS, search_items
from solvers.moves.item_search import Found, greedy
from solvers.problem import Mask, SelectionProblem
from solvers.solution import Proposal, Reason
from solvers.solver import JOINT_PROBLEM, RANKED, Capability, Context, Solver, option


def _cheapest_first(moves: ItemMoves, rows: LinearRows, starts: Sequence[Mask], context: Context) -> Found:
    """Items go one by one, the cheapest for what it brings nearer to the limit; else by what they cost alone."""
    gone = greedy(moves, rows)
    gone = starts[0] if gone is None else gone
    return Found(gone, moves.value(gone))


@dataclass(frozen=True)
class OptimalBrainSurgeonSolver(Solver):
    """Backward elimination with refit, under one budget over all blocks."""

    name = "obs"
    summary = "backward elimination that refits while it removes (optimal brain surgeon at scale)"
    reference = "Hassibi and Stork, NeurIPS 1993; Frantar et al., Optimal Brain Compression, NeurIPS 2022"
    capabilities = JOINT_PROBLEM | {Capability.TIME_LIMIT}

    curvatures = KEPT_SYSTEMS
    budgets = (*RANKED, Groups, Knapsack)
    most_items = {Knapsack: MOST_ITEMS}
    apart = True
    rows_beyond = 0

    chunks: int = option(20, "rounds before blocks are small enough for one-at-a-time elimination", minimum=1)
    exact_below: int = option(3000, "kept weights of a block from which on weights go one at a time", minimum=1)
    pool: int = option(2000, "cheapest weights of a round whose interactions are resolved exactly; 0 = none", minimum=0)
    refresh: float = option(
        0.7, "fraction a block must shrink to before diag(H_SS⁻¹) is taken anew; 1 = every round", minimum=0, maximum=1
    )
    frozen_zeros: bool = option(False, "weights that are zero already go first and stay out (staged pruning)")

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """Eliminate until exactly ``n_prune`` weights, or as many groups as are to go, are gone."""
        if isinstance(problem.budget, Groups):
            pruned, completed = eliminate_groups(problem, context.deadline)
            return Proposal(pruned, reason=Reason.COMPLETED if completed else Reason.TIME_LIMIT)
        if isinstance(problem.budget, Knapsack):
            return search_items(problem, context, _cheapest_first)
        layers = None if self.frozen_zeros else LayerRows.of(problem, invertible=True)
        if layers is not None:
            pruned, completed = eliminate_rows(layers, context.deadline)
            reason = Reason.COMPLETED if completed else Reason.TIME_LIMIT
            return Proposal(pruned, reason=reason, repairs=layers.repairs)
        plan = EliminationPlan(self.chunks, self.exact_below, self.pool, self.refresh, self.frozen_zeros)
        result = eliminate(problem, plan, context.deadline)
        return Proposal(
            result.pruned,
            reason=result.reason,
            repairs=result.repairs,
            statistics={"rounds": float(result.rounds)},
        )
