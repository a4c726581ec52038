"""Whatever masks, partitions and states are drawn, they come back as they went in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import cbs_opt
from cbs_opt import BlockSpec, Partition, StageRecord
from cbs_opt.engine.journal import Journal, StageState
from cbs_opt.measure.blocks import contiguous_partition, interaction_partition
from solvers.errors import OutputError

MASKS = hnp.arrays(bool, 62)
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).eval()


@settings(deadline=None)
@given(pruned=MASKS)
def test_masks_zero_what_they_remove_and_nothing_else(pruned: np.ndarray) -> None:
    model = network()
    layers = cbs_opt.find_layers(model)
    before = layers.read(model).numpy()
    masks = layers.split(~pruned)
    assert np.array_equal(layers.pruned_by(masks), pruned)
    assert np.array_equal(~layers.join(masks).numpy(), pruned)
    cbs_opt.apply_masks(model, masks)
    assert np.array_equal(layers.read(model).numpy(), np.where(pruned, 0.0, before))
    assert all(torch.equal(mask, masks[name]) for name, mask in cbs_opt.read_masks(model).items())
    cbs_opt.remove_masks(model)
    layers.zero(model, pruned)
    assert np.array_equal(layers.read(model).numpy(), np.where(pruned, 0.0, before))


@settings(deadline=None)
@given(text=st.sampled_from(["one", "per_layer", "per_row", "fixed:1", "fixed:7", "fixed:100"]))
def test_consecutive_groups_cover_the_weights_once_and_keep_to_layers(text: str) -> None:
    layers = cbs_opt.find_layers(network())
    partition = contiguous_partition(layers, BlockSpec.parse(text))
    covered = np.concatenate([np.arange(62)[where] for where in partition.slices])
    assert np.array_equal(covered, np.arange(62)) and len(set(partition.names)) == len(partition.sizes)
    if text != "one":
        assert {0, *(layer.stop for layer in layers)} <= {0, *np.cumsum(partition.sizes).tolist()}


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    text=st.sampled_from(["components", "components:0.1", "clusters:1", "clusters:5", "clusters:50"]),
)
def test_interacting_groups_are_a_permutation_that_goes_back(seed: int, n: int, text: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(4, n, generator=generator) * (torch.rand(4, n, generator=generator) < 0.3)
    partition = interaction_partition(factor, torch.randn(n, generator=generator), BlockSpec.parse(text))
    assert sorted(partition.order.tolist()) == list(range(n)) and sum(partition.sizes) == n
    if text.startswith("clusters"):
        assert max(partition.sizes) <= int(text.partition(":")[2])
    vector = np.arange(n)
    assert np.array_equal(partition.to_network(partition.to_groups(vector)), vector)
    assert np.array_equal(Partition(("all",), (n,)).to_network(vector), vector)


@settings(deadline=None)
@given(
    weights=hnp.arrays(np.float64, 62, elements=st.floats(allow_nan=False)),
    pruned=MASKS,
    figures=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    moved=st.booleans(),
)
def test_a_journal_gives_back_states_and_records(tmp_path_factory, weights, pruned, figures, moved) -> None:
    folder = tmp_path_factory.mktemp("journal")
    step = torch.from_numpy(weights) * 2 if moved else None
    state = StageState(1, torch.from_numpy(weights), pruned, 1e-3, {"1.running_mean": torch.arange(3.0)}, step)
    loss, objective, bound = figures
    record = StageRecord(
        stage=1, kind="prune", n_kept=5, sparsity=0.5, loss_gradients=loss, loss_before=1.0, loss_masked=math.nan,
        loss_after=loss, damping=0.1, step=1.0, evaluations=3, n_regrown=0, n_images=4, solver="obs",
        objective=objective, seconds_gradients=0.0, seconds_solve=0.0, seconds_update=0.0, seconds_batch_norm=0.0,
        repairs=("one",), bound=bound, method="outer",
    )  # fmt: skip
    Journal(folder, {"seed": "0"}).append(state, record)
    book = Journal(folder, {"seed": "0"})
    found = book.last()
    assert found is not None and torch.equal(found.weights, state.weights) and found.n_kept == int((~pruned).sum())
    assert np.array_equal(found.pruned, pruned) and torch.equal(found.statistics["1.running_mean"], torch.arange(3.0))
    assert (found.step is None) == (not moved) and found.damping == 1e-3
    assert repr(book.records[0]) == repr(record)
    with pytest.raises(OutputError, match="seed"):
        Journal(folder, {"seed": "1"})
