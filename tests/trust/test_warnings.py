"""What a report must say: silent gradients, a damping above the curvature, collapse, networks pruned before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cbs_opt
from cbs_opt.measure.fisher import FisherOptions
from solvers.errors import ModelError, OptionError
from tests.trust.test_losses import labels, net

QUIET = FisherOptions(damping=1e-8)


class Cut(nn.Module):
    """Two layers, of which the first gets no gradient, for one of several reasons."""

    def __init__(self, why: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back, self.head, self.why = nn.Linear(6, 8), nn.Linear(8, 3), why

    def forward(self, x: Tensor) -> Tensor:
        if self.why == "no_grad":
            with torch.no_grad():
                hidden = torch.tanh(self.back(x))
        elif self.why == "detach":
            hidden = torch.tanh(self.back(x)).detach()
        elif self.why == "checkpoint":
            hidden = _reentrant(self.back, x)
        elif self.why == "never routed":
            hidden = torch.where(x[:, :1] > 1e9, torch.tanh(self.back(x)), torch.ones(8))
        else:
            hidden = torch.tanh(self.back(x))
        return self.head(hidden)


def _reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda t: torch.tanh(layer(t)), x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("why", ["no_grad", "detach", "checkpoint", "never routed"])
@pytest.mark.parametrize("way", ["curvature", "gradient", "stages"])
def test_layers_without_gradients_are_named(why: str, way: str) -> None:
    options = {
        "curvature": {"fisher": QUIET},
        "gradient": {"solver": "gradient_magnitude", "update": "none"},
        "stages": {"stages": 2, "solver": "obs"},
    }[way]
    report = cbs_opt.prune(Cut(why).eval(), labels(80), F.cross_entropy, sparsity=0.5, **options).report
    assert [w for w in report.warnings if "every gradient is zero" in w and "'back'" in w]
    assert not [w for w in report.warnings if "'head'" in w]
    assert "warning:" in str(report)


def test_layers_with_gradients_are_not() -> None:
    report = cbs_opt.prune(Cut("").eval(), labels(), F.cross_entropy, sparsity=0.3, fisher=QUIET).report
    assert report.warnings == ()


def test_gradients_lost_in_halves_are_named() -> None:
    x, y = labels()
    model = net().half()
    loss = lambda z, t: F.cross_entropy(z, t) * 1e-7  # noqa: E731
    report = cbs_opt.prune(model, (x, y), loss, sparsity=0.3, fisher=FisherOptions(damping=1e-30)).report
    assert [w for w in report.warnings if "every gradient is zero" in w]


def test_a_damping_above_the_curvature_is_said_per_layer_and_a_relative_one_is_not() -> None:
    loss = lambda z, t: 1e-3 * F.cross_entropy(z, t)  # noqa: E731
    found = cbs_opt.prune(net(), labels(), loss, sparsity=0.5, fisher=FisherOptions(damping=1e-4)).report.warnings
    assert len(found) == 1 and "λ = 0.0001" in found[0] and "0 100.0%" in found[0] and "2 100.0%" in found[0]
    result = cbs_opt.prune(net(), labels(), loss, sparsity=0.5)
    plain = cbs_opt.prune(net(), labels(), F.cross_entropy, sparsity=0.5)
    assert result.report.warnings == plain.report.warnings == ()
    assert np.array_equal(result.pruned, plain.pruned)
    assert result.report.damping == pytest.approx(1e-6 * plain.report.damping, rel=1e-3)


def test_a_relative_damping_is_a_multiple_of_the_mean_diagonal() -> None:
    for share, options in ((0.5, FisherOptions(relative_damping=0.5)), (0.1, FisherOptions())):
        prepared = cbs_opt.prepare(net(), labels(), F.cross_entropy, fisher=options)
        factor = prepared.gradients.factor.double()
        assert prepared.fisher.damping == pytest.approx(share * float(factor.square().sum(0).mean()), rel=1e-6)
    with pytest.raises(OptionError, match="damping="):
        cbs_opt.prune(
            net(), labels(), F.cross_entropy, sparsity=0.5, stages=2, fisher=FisherOptions(relative_damping=0.5)
        )
    with pytest.raises(ModelError, match="every gradient is zero"):
        cbs_opt.prune(
            net(), labels(), lambda z, t: (z * 0).mean(), sparsity=0.5, fisher=FisherOptions(relative_damping=0.5)
        )


@pytest.mark.parametrize("solver", ["magnitude", "greedy_ls"])
def test_layers_of_which_nothing_is_left_and_constant_outputs_are_said(solver: str) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-4)
    update = {"update": "none"} if solver == "magnitude" else {}
    report = cbs_opt.prune(model, labels(), F.cross_entropy, n_kept=10, solver="magnitude", min_kept=0, **update).report
    assert [layer.n_kept for layer in report.layers] == [10, 0]
    assert any("nothing is left of 1 of 2 layers: 2" in w for w in report.warnings)
    assert any("same output" in w for w in report.warnings)
    kept = cbs_opt.prune(net(), labels(), F.cross_entropy, sparsity=0.3, solver=solver, fisher=QUIET).report
    assert kept.warnings == ()


def test_everything_removed_is_said() -> None:
    report = cbs_opt.prune(net(), labels(), F.cross_entropy, n_kept=0, solver="magnitude", update="none").report
    assert any("nothing is left of 2 of 2" in w for w in report.warnings)
    assert any("the 0 weights that stay are fewer than the 2 layers" in w for w in report.warnings)
    assert any("same output" in w for w in report.warnings)


class Exponential(nn.Module):
    """Overflows where its weights grow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).exp()


@pytest.mark.parametrize("scale", [1e30, 1e12, 1e300])
def test_updates_that_end_in_no_loss_are_refused(scale: float) -> None:
    with pytest.raises(ModelError, match=r"loss of the pruned network is (nan|inf).*update_scale"):
        cbs_opt.prune(Exponential().eval(), labels(), F.cross_entropy, sparsity=0.5, update_scale=scale)


def test_networks_pruned_further_before_are_said() -> None:
    first = cbs_opt.prune(net(), labels(), F.cross_entropy, n_kept=9, solver="magnitude", update="none")
    again = cbs_opt.prune(first.model, labels(), F.cross_entropy, sparsity=0.302, solver="magnitude", update="none")
    assert again.report.n_kept > 9 and math.isclose(again.report.sparsity, 0.302, abs_tol=0.02)
    assert any("only 9 of the network given" in w and "9 of this one" in w for w in again.report.warnings)
    further = cbs_opt.prune(first.model, labels(), F.cross_entropy, n_kept=5, solver="magnitude", update="none")
    assert not any("pruned before" in w for w in further.report.warnings)


def test_warnings_survive_a_report_on_disk(tmp_path) -> None:
    report = cbs_opt.prune(net(), labels(), F.cross_entropy, n_kept=0, solver="magnitude", update="none").report
    report.save(tmp_path / "report.json")
    assert cbs_opt.PruneReport.load(tmp_path / "report.json").warnings == report.warnings
