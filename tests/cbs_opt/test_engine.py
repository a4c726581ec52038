"""Setups, choices and plans: what fits together, what is measured, and that nothing else is."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import Choice, FisherOptions, Plan, Polish, Prune, Setup, StageOptions
from cbs_opt.engine.choice import Extent
from cbs_opt.engine.estimate import estimate_memory
from cbs_opt.engine.run import estimate
from solvers import Capability, Context, Objective, Proposal, SelectionProblem, Solver
from solvers.errors import CapabilityError, CBSError, OptionError, UnknownNameError
from tests.cbs_opt.networks import ConvNet, Mlp, build, inputs_for, train_briefly

FISHER = FisherOptions(n_rows=20, batch_size=4, damping=1e-2)
FEW = StageOptions(n_stages=2, n_polish=1, held_out=20, max_evaluations=4)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    x, _ = inputs_for(Mlp, 120, dtype=torch.float32)
    y = (x[:, :3] * 2).argmax(1)
    return train_briefly(build(Mlp, dtype=torch.float32), x, y), (x, y)


class Untouchable:
    """Data that must not be read."""

    def __iter__(self):
        raise AssertionError("data were read")


# -- what does not fit is refused before data are read ---------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stages": True}, OptionError, "stages"),
        ({"stages": 3, "fisher": FisherOptions(blocks="clusters:64")}, OptionError, "clusters:64"),
        ({"stages": StageOptions(n_stages=0)}, OptionError, "only polishes"),
        ({"time_limit": -1.0}, OptionError, "time_limit"),
        ({"time_limit": math.nan}, OptionError, "time_limit"),
        ({"sparsity": 0.5, "n_kept": 3}, OptionError, "one of sparsity, n_kept and budget"),
        ({"n_kept": 63}, OptionError, r"\[0, 62\]"),
        ({"curvature": "hessian"}, UnknownNameError, "fisher"),
        ({"curvature": "none"}, CapabilityError, "curvature='fisher'"),
        ({"curvature": "none", "solver": "magnitude"}, CapabilityError, "combinatorial"),
        ({"curvature": "none", "solver": "magnitude", "update": "none", "stages": 2}, CapabilityError, "stages"),
        ({"solver": "gradient_magnitude"}, OptionError, "first_order"),
        ({"solver": "gradient_magnitude", "stages": 2}, OptionError, "first_order"),
        ({"update": "searched", "update_scale": 0.5}, OptionError, "own length"),
        ({"update": "searched", "fisher": FisherOptions(damping=0.0)}, OptionError, "damping"),
        ({"fisher": FisherOptions(n_rows=10**10)}, OptionError, r"10,000,000,000 rows for 62 weights.*fewer rows"),
        ({"solver": "obs", "objective": "selection"}, CapabilityError, "selection"),
        ({"solver": "obs", "update": "own"}, CapabilityError, "'obs' proposes none"),
        ({"solver": "sweep", "update": "own", "stages": 2}, OptionError, "not 'own'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_the_data_are_read(
    trained, arguments: dict, error: type[CBSError], message: str
) -> None:
    with pytest.raises(error, match=message):
        cbs_opt.prune(trained[0], Untouchable(), F.cross_entropy, **arguments)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_weights_of_the_solver_are_put_into_the_network(trained, scale: float) -> None:
    model, data = trained
    prepared = cbs_opt.prepare(model, data, F.cross_entropy, fisher=FisherOptions(blocks="one", damping=1e-3))
    choice = {"sparsity": 0.5, "solver": "sweep"}
    problem, solution = prepared.choose(cbs_opt.Choice(**choice))
    result = prepared.prune(**choice, update="own", update_scale=scale)
    dense = problem.weights
    expected = np.where(solution.pruned, 0.0, dense + scale * (solution.own_weights - dense))
    np.testing.assert_allclose(result.weights, expected, rtol=1e-6, atol=1e-7)
    assert not np.asarray(result.weights)[solution.pruned].any() and result.report.refit_objective <= solution.objective


@dataclass(frozen=True)
class Blind(Solver):
    """Magnitude that cannot see a gradient."""

    name = "blind"
    summary = "remove the weights with the smallest |w|"
    capabilities = frozenset({Capability.SELECTION, Capability.GLOBAL_BUDGET})

    def run(self, problem: SelectionProblem, context: Context) -> Proposal:
        return Proposal(np.argsort(np.argsort(np.abs(problem.weights))) < problem.n_prune)


def test_stages_take_a_solver_without_a_linear_term_that_one_shot_refuses(trained) -> None:
    model, data = trained
    fisher = FisherOptions(n_rows=20, batch_size=4, damping=1e-2, first_order=True)
    with pytest.raises(CapabilityError, match="gradient"):
        cbs_opt.prune(model, Untouchable(), F.cross_entropy, solver=Blind(), fisher=fisher)
    staged = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.6, solver=Blind(), fisher=fisher, stages=FEW)
    assert staged.report.n_kept == 24 and not any(record.first_order for record in staged.stages)


def test_the_default_objective_depends_on_solver_and_stages_only() -> None:
    for solver, once, staged in (("greedy_ls", "selection", "selection"), ("obs", "joint", "joint"),
                                 ("magnitude", "selection", "joint")):  # fmt: skip
        choice = Choice(0.5, solver=solver)
        assert (choice.goal(), choice.goal(staged=True)) == (Objective(once), Objective(staged))
    assert Choice(0.5, solver="magnitude", objective="joint").goal() is Objective.JOINT


# -- plans -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    n=st.integers(1, 500),
    share=st.floats(0.0, 1.0),
    n_stages=st.integers(1, 12),
    n_polish=st.integers(0, 3),
    schedule=st.sampled_from(["exponential", "polynomial", "linear"]),
    first=st.none() | st.floats(0.0, 0.99),
)
def test_a_plan_prunes_less_and_less_to_the_exact_end(n, share, n_stages, n_polish, schedule, first) -> None:
    n_kept = int(share * n)
    options = StageOptions(n_stages=n_stages, n_polish=n_polish, schedule=schedule, first_sparsity=first)
    plan = Plan.staged(options, n=n, n_kept=n_kept)
    assert len(plan.steps) == n_stages + n_polish
    counts = [n, *(step.n_kept for step in plan.steps if isinstance(step, Prune))]
    assert all(a > b for a, b in pairwise(counts)) and counts[-1] == n_kept
    assert plan.steps[n_stages:] == (Polish(),) * n_polish


def test_one_shot_is_a_plan_of_one_step() -> None:
    assert Plan.one_shot(7).steps == (Prune(7),)
    with pytest.raises(OptionError, match="StageOptions"):
        Plan((Prune(7), Polish()))
    with pytest.raises(OptionError, match="weights still there"):
        Plan.staged(StageOptions(), n=10, n_kept=6, n_start=5)


@settings(deadline=None)
@given(n=st.integers(1, 10_000), sparsity=st.floats(0.0, 1.0, exclude_max=True))
def test_a_sparsity_becomes_a_number_of_weights_as_in_the_literature(n: int, sparsity: float) -> None:
    assert Choice(sparsity, solver="magnitude").kept(n) == int(n * (1.0 - sparsity))


# -- what is measured ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "update", "allocation", "wanted"),
    [
        ("magnitude", "none", None, Extent.WEIGHTS),
        ("random", "none", "uniform", Extent.WEIGHTS),
        ("magnitude", "none", "saliency", Extent.CURVATURE),
        ("magnitude", "combinatorial", None, Extent.CURVATURE),
        ("gradient_magnitude", "none", None, Extent.GRADIENT),
        ("obd", "none", None, Extent.CURVATURE),
    ],
)
def test_solver_and_update_say_what_they_need(solver: str, update: str, allocation: str | None, wanted: Extent) -> None:
    assert Choice(0.5, solver=solver, update=update, allocation=allocation).needs is wanted


@pytest.mark.parametrize("curvature", ["fisher", "none"])
@pytest.mark.parametrize("architecture", [Mlp, ConvNet])
def test_magnitude_alone_takes_no_gradients(monkeypatch, curvature: str, architecture: type[nn.Module]) -> None:
    model = build(architecture, dtype=torch.float32)
    data = inputs_for(architecture, 40, dtype=torch.float32)
    full = cbs_opt.prepare(model, data, F.cross_entropy).prune(sparsity=0.6, solver="magnitude", update="none")
    monkeypatch.setattr(
        "cbs_opt.engine.workspace.sample_gradients", lambda *a, **k: pytest.fail("gradients were taken")
    )
    lean = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.6, solver="magnitude", update="none", curvature=curvature
    )
    assert np.array_equal(lean.pruned, full.pruned) and np.array_equal(lean.weights, full.weights)
    for name, mask in full.masks.items():
        assert torch.equal(lean.masks[name], mask)
    one, other = lean.report, full.report
    assert (one.loss_dense, one.loss_pruned, one.n_kept) == (other.loss_dense, other.loss_pruned, other.n_kept)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert (a.norm_before, a.norm_after, a.norm_removed) == (b.norm_before, b.norm_after, b.norm_removed)
    # What was not computed is not reported as something else.
    assert (one.curvature, one.n_rows, one.gradient_method, one.seconds_gradients) == ("none", 0, "", 0.0)
    assert all(math.isnan(v) for v in (one.objective, one.refit_objective, one.damping, *(r.share for r in one.layers)))
    assert one.bound == -math.inf and "none" in str(one)


def test_layers_of_several_dtypes_share_one_threshold() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).double())

    model, data = build(Mixed, dtype=torch.float32), inputs_for(Mlp, 20, dtype=torch.float32)
    model.two.double()
    result = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5, solver="magnitude", update="none")
    weights = cbs_opt.find_layers(model).read(model).abs().numpy()
    assert weights[result.pruned].max() <= weights[~result.pruned].min() and result.report.n_kept == 22


def test_the_mean_gradient_alone_is_that_of_the_factor() -> None:
    model, data = build(Mlp, dtype=torch.float32), inputs_for(Mlp, 60, dtype=torch.float32)
    fisher = FisherOptions(n_rows=40, first_order=True)
    full = cbs_opt.prepare(model, data, F.cross_entropy, fisher=fisher)
    expected = full.prune(sparsity=0.5, solver="gradient_magnitude", update="none")
    found = cbs_opt.prune(
        model, data, F.cross_entropy, sparsity=0.5, solver="gradient_magnitude", update="none",
        fisher=FisherOptions(n_rows=40),
    )  # fmt: skip
    assert np.array_equal(found.pruned, expected.pruned)
    assert found.report.curvature == "gradient" and found.report.n_rows == 40 and found.report.first_order


def test_what_was_not_measured_is_asked_for_by_name(trained) -> None:
    model, data = trained
    bare = cbs_opt.prepare(model, data, F.cross_entropy, curvature="none")
    before = copy.deepcopy(model.state_dict())
    first, second = (bare.prune(sparsity=s, solver="magnitude", update="none") for s in (0.8, 0.3))
    assert (first.report.n_kept, second.report.n_kept) == (12, 43)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CapabilityError, match=r"greedy_ls.*curvature"):
        bare.prune(sparsity=0.5)
    with pytest.raises(CapabilityError, match="'single' needs the curvature"):
        bare.prune(sparsity=0.5, solver="magnitude", update="single")
    with pytest.raises(CapabilityError, match="no gradients"):
        _ = bare.gradients


# -- memory and time -------------------------------------------------------------------------------------


def test_the_estimate_counts_the_factor_and_not_what_is_not_measured(trained) -> None:
    model, data = trained
    layers = cbs_opt.find_layers(model)
    setup = Setup(fisher=FisherOptions(n_rows=50, dtype="float64"))
    whole = estimate_memory(model, layers, setup, Extent.CURVATURE, n_columns=20)
    lean = estimate_memory(model, layers, setup, Extent.WEIGHTS)
    assert {50 * 62 * 8, 50 * 20 * 8} <= set(whole.memory.values())
    network = sum(p.numel() * p.element_size() for p in model.parameters())
    assert network < lean.total <= 2 * network and lean.available > 0
    unknown = estimate_memory(model, layers, Setup(), Extent.CURVATURE, n_samples=30)
    assert any("30 rows" in what for what in unknown.memory)
    found = estimate(model, data, F.cross_entropy, setup, Choice(n_kept=20))
    assert found.memory == whole.memory and found.seconds > 0.0
    free = estimate(model, data, F.cross_entropy, setup, Choice(n_kept=20, solver="magnitude", update="none"))
    assert free.seconds == 0.0 and free.memory == lean.memory


def test_preparing_more_than_fits_is_refused_before_the_data_are_read(trained) -> None:
    with pytest.raises(OptionError, match="fewer rows"):
        cbs_opt.prepare(trained[0], Untouchable(), F.cross_entropy, fisher=FisherOptions(n_rows=10**10))


def test_long_gradients_are_announced(trained, monkeypatch, caplog) -> None:
    monkeypatch.setattr("cbs_opt.engine.estimate._LARGE", 1.0)
    monkeypatch.setattr("cbs_opt.engine.estimate._LONG", 0.0)
    cbs_opt.prune(*trained, F.cross_entropy, sparsity=0.5, fisher=FISHER)
    assert "gradients of 62 weights will take about" in caplog.text


# -- one report ------------------------------------------------------------------------------------------


def test_no_field_of_the_report_means_something_else_in_stages(trained) -> None:
    model, data = trained
    once = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, solver="obs", fisher=FISHER)
    staged = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, solver="obs", fisher=FISHER, stages=FEW)
    assert once.report.damping == staged.report.damping == 1e-2
    assert once.report.update_scale == 1.0 and math.isnan(staged.report.update_scale)
    assert once.report.first_order is False and staged.report.first_order is None
    assert staged.report.gradient_method == once.report.gradient_method == once.stages[0].method == "outer"
    assert all(math.isnan(row.share) for row in staged.report.layers)
    last = [record for record in staged.stages if record.solver][-1]
    assert (staged.report.objective, staged.report.status) == (last.objective, last.status)
    # Of the joint objective the refit is known.
    assert staged.report.refit_objective == pytest.approx(last.objective)
    assert staged.report.statistics == {} and len(staged.stages) == staged.report.stages == 3
    (record,) = once.stages
    assert record.loss_after == once.report.loss_pruned and record.loss_before == once.report.loss_dense
    assert record.objective == once.report.objective and record.n_images == 80
