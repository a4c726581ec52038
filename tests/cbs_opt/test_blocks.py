"""Block structures: which weights interact, and the way back to the network."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cbs_opt import (
    BlockSpec,
    CalibrationData,
    FisherOptions,
    Forward,
    Structure,
    build_blocks,
    find_layers,
    sample_gradients,
)
from cbs_opt.measure.blocks import MOST_WEIGHTS, interaction_partition
from solvers import SelectionProblem
from solvers.errors import DataError, OptionError, ProblemError, UnknownNameError
from tests.cbs_opt.networks import Mlp, build, inputs_for


@pytest.fixture(scope="module")
def model_data():
    model = build(Mlp)
    layers = find_layers(model)
    data = CalibrationData.read(inputs_for(Mlp, 40))
    sample = sample_gradients(
        model, layers, data, Forward(model, F.cross_entropy), data.draw(10, 4, 0), dtype=torch.float64
    )
    return layers, layers.read(model), sample


def dense(sample, spec: str, layers, damping: float) -> np.ndarray:
    """H of a contiguous structure, built entry by entry."""
    full = (sample.factor.T @ sample.factor).numpy()
    group = np.empty(layers.n, dtype=object)
    for layer in layers:
        for i in range(layer.n):
            row = i // (layer.n // layer.n_rows)
            group[layer.start + i] = {
                "one": "all", "per_layer": layer.name, "per_row": (layer.name, row), "fixed:7": (layer.name, i // 7)
            }[spec]  # fmt: skip
    same = np.array([[a == b for b in group] for a in group])
    return np.where(same, full, 0.0) + damping * np.eye(layers.n)


@pytest.mark.parametrize(("spec", "count"), [("one", 1), ("per_layer", 3), ("per_row", 12), ("fixed:7", 10)])
@pytest.mark.parametrize("first_order", [False, True])
def test_contiguous_blocks_are_views_that_add_up_to_the_block_diagonal_of_h(
    model_data, spec: str, count: int, first_order: bool
) -> None:
    layers, w, sample = model_data
    built = build_blocks(sample, w, layers, FisherOptions(damping=0.3, blocks=spec, first_order=first_order))
    assert len(built.blocks) == count and built.partition.order is None
    storage = sample.factor.untyped_storage().data_ptr()
    assert all(block.factor.untyped_storage().data_ptr() == storage for block in built.blocks)
    problem = SelectionProblem(built.blocks, 5)
    assert np.array_equal(problem.weights, w.numpy())
    found = np.stack([problem.multiply(e) for e in np.eye(layers.n)])
    np.testing.assert_allclose(found, dense(sample, spec, layers, 0.3), rtol=1e-12, atol=1e-14)
    if first_order:
        np.testing.assert_allclose(problem.gradient, sample.mean.numpy() / 4)
    else:
        assert problem.gradient is None


def test_names_of_blocks(model_data) -> None:
    layers, w, sample = model_data
    names = [b.name for b in build_blocks(sample, w, layers, FisherOptions(blocks="per_row")).blocks]
    assert names[:2] == ["fc1[0]", "fc1[1]"] and names[-1] == "fc3[2]"
    names = [b.name for b in build_blocks(sample, w, layers, FisherOptions(blocks="fixed:20")).blocks]
    assert names == ["fc1[0:20]", "fc1[20:30]", "fc2[0:20]", "fc3[0:12]"]


def scattered(
    seed: int = 0, groups: int = 4, size: int = 5, alone: int = 3
) -> tuple[torch.Tensor, torch.Tensor, list[set[int]]]:
    """A factor whose columns interact in known groups, numbered at random."""
    rng = np.random.default_rng(seed)
    n = groups * size + alone
    order = rng.permutation(n)
    factor = np.zeros((2 * groups + alone, n))
    members = []
    for g in range(groups):
        chosen = order[g * size : (g + 1) * size]
        factor[np.ix_([2 * g, 2 * g + 1], chosen)] = rng.normal(size=(2, size))
        members.append({int(i) for i in chosen})
    for k in range(alone):
        factor[2 * groups + k, order[groups * size + k]] = 1.0
    members += [{int(i) for i in order[groups * size :]}]
    return torch.from_numpy(factor), torch.from_numpy(rng.normal(size=n) + 3.0), members


def test_components_are_those_of_networkx_and_exact() -> None:
    factor, w, members = scattered()
    partition = interaction_partition(factor, w, BlockSpec.parse("components"))
    found = [set(partition.order[where].tolist()) for where in partition.slices]
    assert sorted(map(sorted, found)) == sorted(map(sorted, members))
    assert partition.names[-1] == "isolated"
    interactions = (factor.T @ factor).numpy() * np.outer(w, w)
    graph = nx.from_numpy_array(np.abs(interactions) > 0)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    together = [c for c in nx.connected_components(graph) if len(c) > 1]
    assert sorted(map(sorted, together)) == sorted(map(sorted, found[:-1]))


def test_a_threshold_cuts_weak_interactions() -> None:
    factor = torch.eye(4, dtype=torch.float64)
    factor[0, 1] = 0.9
    factor[2, 3] = 0.9
    factor[1, 2] = 1e-5
    w = torch.ones(4, dtype=torch.float64)
    assert len(interaction_partition(factor, w, BlockSpec.parse("components")).sizes) == 1
    assert interaction_partition(factor, w, BlockSpec.parse("components:1e-3")).sizes == (2, 2)


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_clusters_partition_the_weights_and_keep_to_the_size(size: int) -> None:
    factor, w, _ = scattered(groups=5, size=6)
    partition = interaction_partition(factor, w, BlockSpec.parse(f"clusters:{size}"), seed=1)
    assert sorted(partition.order.tolist()) == list(range(len(w)))
    assert max(partition.sizes) <= size
    again = interaction_partition(factor, w, BlockSpec.parse(f"clusters:{size}"), seed=1)
    assert np.array_equal(partition.order, again.order)


def test_clusters_keep_interacting_weights_together() -> None:
    factor, w, members = scattered(groups=4, size=5, alone=0)
    partition = interaction_partition(factor, w, BlockSpec.parse("clusters:5"))
    found = [set(partition.order[where].tolist()) for where in partition.slices]
    assert sorted(map(sorted, found)) == sorted(sorted(m) for m in members if m)


def test_gathered_blocks_map_back_to_the_network(model_data) -> None:
    layers, w, sample = model_data
    for spec in ("components:0.05", "clusters:9"):
        built = build_blocks(sample, w, layers, FisherOptions(damping=0.1, blocks=spec, first_order=True))
        partition = built.partition
        problem = SelectionProblem(built.blocks, 5)
        assert np.array_equal(partition.to_network(problem.weights), w.numpy())
        np.testing.assert_allclose(partition.to_network(problem.gradient), sample.mean.numpy() / 4)
        vector = np.arange(layers.n)
        assert np.array_equal(partition.to_groups(partition.to_network(vector)), vector)
        for block, where in zip(built.blocks, partition.slices, strict=True):
            assert torch.equal(block.factor, sample.factor[:, partition.order[where]])


def test_too_many_weights_for_the_graph_are_refused() -> None:
    n = MOST_WEIGHTS["clusters"] + 1
    with pytest.raises(ProblemError, match=rf"at most {n - 1} of them, not {n}.*per_layer"):
        interaction_partition(torch.zeros(1, n), torch.zeros(n), BlockSpec.parse("clusters:10"))


@pytest.mark.parametrize(
    "text", ["one", "per_layer", "per_row", "fixed:512", "components", "components:0.001", "clusters:64"]
)
def test_a_structure_is_written_as_it_is_read(text: str) -> None:
    spec = BlockSpec.parse(text)
    assert str(spec) == text and BlockSpec.parse(spec) is spec
    assert spec.contiguous == (spec.structure not in (Structure.COMPONENTS, Structure.CLUSTERS))


@pytest.mark.parametrize(
    "text",
    ["fixed", "fixed:", "fixed:0", "fixed:-3", "fixed:2.5", "one:3", "clusters", "components:x", "components:1.5"],
)
def test_parameters_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="block structure"):
        FisherOptions(blocks=text)


def test_an_unknown_structure_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'per_layer'"):
        FisherOptions(blocks="perlayer")


@pytest.mark.parametrize(
    "bad",
    [
        {"n_rows": 0}, {"n_rows": 1.5}, {"n_rows": True}, {"batch_size": 0}, {"memory_budget": -1},
        {"dtype": "float16"}, {"damping": -1e-3}, {"damping": float("nan")}, {"damping": float("inf")},
        {"damping": "small"}, {"damping": True},
    ],
    ids=str,
)  # fmt: skip
def test_bad_fisher_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(bad))):
        FisherOptions(**bad)


def test_the_number_of_rows_and_too_few_samples() -> None:
    data = CalibrationData.read(inputs_for(Mlp, 50))
    assert FisherOptions().rows_for(data) == 50
    assert FisherOptions(batch_size=8).rows_for(data) == 6
    assert FisherOptions(n_rows=30, batch_size=8).rows_for(data) == 30
    for bad in (FisherOptions(n_rows=51), FisherOptions(batch_size=51), FisherOptions(n_rows=2, batch_size=51)):
        with pytest.raises(DataError, match="hold 50"):
            bad.rows_for(data)
