"""Rows drawn by importance: exactly r of them, unbiased, and nearer to the whole than uniform ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import FisherOptions, UnknownNameError
from cbs_opt.measure.row_sampling import inclusion, systematic

SAMPLES, ROWS = 300, 60


def network_and_data() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A classifier that is sure of most samples, as trained ones are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[2].weight.mul_(6.0)
    x = torch.randn(SAMPLES, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:30] = torch.randint(0, 3, (30,))
    return model, (x, y)


def sample_of(seed: int, sampling: str, rows: int = ROWS, batch: int = 1) -> cbs_opt.Prepared:
    model, data = network_and_data()
    options = FisherOptions(n_rows=rows, batch_size=batch, row_sampling=sampling, dtype="float64")
    return cbs_opt.prepare(model, data, F.cross_entropy, fisher=options, seed=seed)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), st.integers(0, 60), st.floats(0.0, 0.999))
def test_as_many_as_asked_for_and_none_twice(weights: list[float], rows: int, offset: float) -> None:
    rows = min(rows, len(weights))
    chances = inclusion(np.array(weights), rows) if rows else np.zeros(len(weights))
    assert chances.max() <= 1.0 + 1e-12 and np.isclose(chances.sum(), rows)
    if rows:
        picked = systematic(chances, rows, offset)
        assert len(np.unique(picked)) == rows


def test_shares_below_one_are_proportional() -> None:
    chances = inclusion(np.array([100.0, 1.0, 2.0, 3.0]), 2)
    np.testing.assert_allclose(chances, [1.0, 1 / 6, 2 / 6, 3 / 6])


def test_factor_gradient_and_loss_are_unbiased_and_nearer_than_uniform_ones() -> None:
    exact = sample_of(0, "uniform", SAMPLES).gradients
    whole = exact.factor.T @ exact.factor
    errors: dict[str, list[float]] = {"importance": [], "uniform": []}
    means, grams, losses = [], [], []
    for seed in range(40):
        for sampling, found in errors.items():
            sample = sample_of(seed, sampling).gradients
            gram = sample.factor.T @ sample.factor
            found.append(float((gram - whole).norm() / whole.norm()))
            if sampling == "importance":
                grams.append(gram)
                means.append(sample.mean)
                losses.append(sample.loss)
    assert np.mean(errors["importance"]) < 0.7 * np.mean(errors["uniform"])
    # The mean of 40 draws is nearer than one of them by about the root of 40.
    assert float((torch.stack(grams).mean(0) - whole).norm() / whole.norm()) < 0.4 * np.mean(errors["importance"])
    spread = torch.stack(means).std(0).norm() / 40**0.5
    assert float((torch.stack(means).mean(0) - exact.mean).norm()) < 3.0 * float(spread)
    assert abs(np.mean(losses) - exact.loss) < 4.0 * np.std(losses) / 40**0.5


def test_uniform_where_rows_hold_several_samples_or_all_samples_are_rows() -> None:
    for rows, batch in ((20, 4), (SAMPLES, 1)):
        one, other = (sample_of(3, sampling, rows, batch).gradients for sampling in ("importance", "uniform"))
        assert torch.equal(one.factor, other.factor) and not one.notes


def test_a_loss_that_does_not_see_the_output_is_said() -> None:
    model, (x, y) = network_and_data()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.inner(x), y)}

    data = [{"x": x, "y": y}]
    prepared = cbs_opt.prepare(Wrapped().eval(), data, lambda out, _: out["loss"], fisher=FisherOptions(n_rows=ROWS))
    assert any("rows were drawn uniformly" in note for note in prepared.gradients.notes)


def test_unknown_sampling_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="importance"):
        FisherOptions(row_sampling="length")
