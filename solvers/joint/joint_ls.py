"""`joint_ls`: local search by swaps, each judged by the joint objective with all kept weights re-optimised.

With S kept, P pruned, v the refit on S and ρ minus the gradient of the model at v,

    removing i costs   v_i² / (2 [H_SS⁻¹]_ii) ,
    putting j back gains   ρ_j² / (2 (H_jj − H_jS H_SS⁻¹ H_Sj)) ,

and a swap changes the objective by cost − gain corrected for the interaction of i and j, exactly
(`solvers.moves.joint_swaps`, `solvers.joint.pool_search`). Small problems are held as a dense tableau, searched by
descent from several starts and then by a tabu walk with kicks; layers row by row (`solvers.layer_rows`); other large
ones by rounds of exact searches over pools of promising weights. Either way the result cannot be bettered by one swap,
unless a limit stopped it earlier. Groups that go whole, and weights that cost differently, are searched by items
(`solvers.moves.item_search`): flips and exchanges that the budget allows, a tabu walk of them.

Source: this package. In- and out-scores: Hassibi and Stork (NeurIPS 1993), Miller (*Subset Selection in
Regression*); swaps for pruning: Yu et al. (*The Combinatorial Brain Surgeon*, ICML 2022), there for CBS-S.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.linalg import block_diag

from solvers.budget import Groups, Knapsack, as_partition
from solvers.errors import CapabilityError, SingularHessianError
from solvers.joint.admm import AdmmSolver
from solvers.joint.dense_search import DenseJoint, search
from solvers.joint.kept import KEPT_SYSTEMS
from solvers.joint.pool_search import pool_search
from solvers.joint.row_search import settle_row
from solvers.joint.support import search_problem
from solvers.layer_rows import LayerRows, settle
from solvers.moves.item_problem import MOST_ITEMS, search_items, tabu_walk
from solvers.problem import Mask, Objective, SelectionProblem
from solvers.registry import make_solver
from solvers.running import run_backend, with_remaining_time
from solvers.solution import Proposal, Reason
from solvers.solver import ANYTIME, JOINT_PROBLEM, RANKED, Capability, Context, Solver, option
from solvers.tensors import ProblemTensors


@contextmanager
def _invertible() -> Iterator[None]:
    """A singular H_SS is an error of ours."""
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise SingularHessianError(
            f"joint_ls: H of the kept weights is singular ({error}); use a larger damping"
        ) from error


@dataclass(frozen=True)
class JointLocalSearchSolver(Solver):
    """Swaps by the joint objective, from the mask of another solver or a given one."""

    name = "joint_ls"
    summary = "local search by swaps judged by the joint objective, every swap with refit"
    reference = "this package; Miller, Subset Selection in Regression; Yu et al., ICML 2022"
    capabilities = JOINT_PROBLEM | ANYTIME | {Capability.RANDOMISED}

    curvatures = KEPT_SYSTEMS
    budgets = (*RANKED, Groups, Knapsack)
    most_items = {Groups: MOST_ITEMS, Knapsack: MOST_ITEMS}
    apart = True
    rows_beyond = 20_000

    start: str = option("obs[chunks=8,pool=0]", "solver that makes the first mask, unless one is given")
    dense_limit: int = option(600, "weights up to which H is held dense and searched by tabu", minimum=1)
    iterations: int = option(20000, "tabu swaps on dense problems; beyond 200 weights fewer as 1/n²", minimum=0)
    rounds: int = option(40, "rounds on a large problem", minimum=1)
    width: int = option(200, "weights of each kind that enter the pool of a round", minimum=1)
    min_gain: float = option(1e-7, "least gain of a swap on a large problem, relative to the objective", minimum=0)
    most_pairs: float = option(3e8, "pairs a round of a large problem scans at most", minimum=1)

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        """A one-swap local optimum of the joint objective, or the best mask when the time is up."""
        if not isinstance(problem.budget, RANKED):
            return search_items(problem, context, tabu_walk(self.iterations))
        first, notes = self._first_mask(problem, context)
        vectors, repairs = search_problem(problem)
        notes.extend(repair for repair in repairs if repair not in notes)
        if context.deadline.expired():
            return Proposal(first, reason=Reason.TIME_LIMIT, repairs=tuple(notes))
        if problem.n <= self.dense_limit:
            return self._dense(problem, vectors, context, first, tuple(notes))
        layers = LayerRows.of(problem, invertible=True)
        if layers is not None:
            return self._rows(layers, context, first, tuple(notes))
        result = pool_search(
            problem,
            first,
            width=self.width,
            rounds=self.rounds,
            min_gain=self.min_gain,
            most_pairs=self.most_pairs,
            deadline=context.deadline,
            record=context.record,
        )
        statistics = {"rounds": result.rounds, "swaps": result.swaps, "scan_complete": float(result.complete)}
        return Proposal(result.pruned, reason=result.reason, repairs=tuple(notes), statistics=statistics)

    def _rows(self, layers: LayerRows, context: Context, first: Mask, repairs: tuple[str, ...]) -> Proposal:
        with _invertible():
            found = settle(
                layers,
                first,
                settle_row,
                min_gain=self.min_gain,
                rounds=self.rounds,
                deadline=context.deadline,
                record=context.record,
            )
        statistics = {"rounds": found.rounds, "swaps": found.swaps, "moves": found.moves}
        return Proposal(
            found.pruned,
            reason=found.reason,
            repairs=repairs,
            statistics={name: float(count) for name, count in statistics.items()},
        )

    def _first_mask(self, problem: SelectionProblem, context: Context) -> tuple[Mask, list[str]]:
        """The given mask, or that of the starting solver with what it had to repair."""
        if context.start is not None:
            return context.start, []
        solver = make_solver(self.start)
        wanted = problem
        if Capability.JOINT not in solver.capabilities:
            wanted = problem.with_objective(Objective.SELECTION)
        if problem.has_gradient and Capability.LINEAR_TERM not in solver.capabilities:
            raise CapabilityError(
                f"joint_ls: the starting solver {self.start!r} ignores the gradient of the problem; choose another"
            )
        if len(problem.blocks) > 1 and Capability.GLOBAL_BUDGET not in solver.capabilities:
            raise CapabilityError(f"joint_ls: the starting solver {self.start!r} cannot share one budget over blocks")
        proposal = run_backend(solver, wanted, with_remaining_time(context))
        return proposal.pruned, list(proposal.repairs)

    def _dense(
        self,
        problem: SelectionProblem,
        vectors: ProblemTensors,
        context: Context,
        first: Mask,
        repairs: tuple[str, ...],
    ) -> Proposal:
        hessian = block_diag(*[block.curvature.dense().cpu().numpy() for block in vectors.blocks])
        weights, linear = problem.weights, hessian @ problem.weights
        constant = 0.5 * float(weights @ linear)
        if problem.gradient is not None:
            constant -= float(problem.gradient @ weights)
            linear = linear - problem.gradient
        starts = [~first]
        if context.start is None:
            starts.append(~problem.budget.cheapest_of(np.abs(weights)))
            starts.append(~problem.budget.cheapest_of(np.diag(hessian) * weights**2))
            starts.append(~run_backend(AdmmSolver(), problem, with_remaining_time(context)).pruned)
        iterations = int(self.iterations * min(1.0, (200 / problem.n) ** 2))
        dense = DenseJoint(hessian, linear, constant, as_partition(problem.budget, problem.n).groups)
        with _invertible():
            found = search(dense, starts, iterations, context.rng(), context.deadline, record=context.record)
        reason = Reason.TIME_LIMIT if context.deadline.expired() else Reason.COMPLETED
        return Proposal(~found.kept, reason=reason, repairs=repairs, statistics={"swaps": float(found.swaps)})
