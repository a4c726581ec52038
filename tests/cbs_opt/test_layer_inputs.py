"""Layer-wise curvature against dense oracles: input moments, row scales, segments, errors of layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import CalibrationOptions, DataError, LayerInputOptions, OptionError
from cbs_opt.data.forward import Forward
from cbs_opt.data.stream import BatchStream
from cbs_opt.engine.layer_network import Judging
from cbs_opt.engine.layerwise import prune_layerwise
from cbs_opt.measure.layer_inputs import Accumulator, InputMoment, Recorded, Streamed
from cbs_opt.measure.row_scales import row_scales
from cbs_opt.measure.segment_passes import SegmentPasses
from cbs_opt.measure.segments import Chain, find_chain
from cbs_opt.network.layers import Layer
from solvers import Kronecker, QuadraticBlock, SelectionProblem, solve
from solvers.errors import CapabilityError

SOLVERS = ("magnitude", "obd", "sweep", "admm")


class Block(nn.Module):
    """A residual block with a grouped convolution and an activation in place."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.c1, self.norm = nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.c2, self.short = nn.Conv2d(out, out, 3, padding=1, groups=2), nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c2(F.relu(self.norm(self.c1(x)), inplace=True)) + self.short(x))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages = nn.Conv2d(3, 4, 3), nn.ModuleList([Block(4, 4, 1), Block(4, 6, 2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class DecoderLayer(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor, *, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        y = self.norm(x)
        q, k = self.q(y) * rotary[0], self.k(y) * rotary[1]
        x = x + self.o(F.scaled_dot_product_attention(q, k, self.v(y), attn_mask=mask))
        return x + self.down(F.gelu(self.up(x))), None


class Decoder(nn.Module):
    """Called in order from a list, with a mask and rotary factors that the network computes on the way."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.embed, self.rotary = nn.Embedding(11, d), nn.Linear(1, d).requires_grad_(False)
        self.layers = nn.ModuleList(DecoderLayer(d) for _ in range(3))
        self.norm, self.lm_head = nn.LayerNorm(d), nn.Linear(d, 11, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, length = self.embed(input_ids), input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, :].bool()
        position = torch.linspace(0, 1, length).unsqueeze(1)
        for layer in self.layers:
            x, _ = layer(x, mask=mask, rotary=(self.rotary(position), position.cos()))
        return self.lm_head(self.norm(x))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).eval()


def images(n: int = 40) -> Tensor:
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def tokens(n: int = 24, length: int = 5) -> Tensor:
    return torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(2))


def streamed(model: nn.Module, data: object, loss: object = None, **options: object) -> Streamed:
    model.eval()
    layers = cbs_opt.find_layers(model)
    forward = Forward(model, loss)  # type: ignore[arg-type]
    return Streamed(model, layers, BatchStream(data, CalibrationOptions(**options)), forward, torch.device("cpu"))  # type: ignore[arg-type]


def inputs_of(model: nn.Module, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """What a module is called with when the network runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    return torch.cat(seen)


def moments(network: Streamed, chain: Chain | None = None) -> dict[str, InputMoment]:
    passes = SegmentPasses(network, chain or find_chain(network))
    return {moment.layer.name: moment for segment in passes for moment in segment}


# -- moments ----------------------------------------------------------------------------------------------------------


def test_moments_of_an_mlp_are_those_of_its_inputs() -> None:
    model, x = mlp(), torch.randn(150, 6)
    found = moments(streamed(model, x))
    for name in ("0", "2", "4"):
        seen = inputs_of(model, model[int(name)], x).double()
        torch.testing.assert_close(found[name].matrices[0], seen.T @ seen / 150, rtol=1e-6, atol=1e-7)
        assert found[name].positions == 150


def test_moments_of_convolutions_are_those_of_their_patches() -> None:
    torch.manual_seed(0)
    model, x = Cnn().eval(), images(70)
    found = moments(streamed(model, x))
    for name in ("stem", "stages.0.c2", "stages.1.c1", "stages.1.short"):
        module = model.get_submodule(name)
        assert isinstance(module, nn.Conv2d)
        patches = F.unfold(
            inputs_of(model, module, x), module.kernel_size, padding=module.padding, stride=module.stride
        )
        rows = patches.double().transpose(1, 2).reshape(-1, module.groups, found[name].layer.view.inputs)
        expected = torch.einsum("pgi,pgj->gij", rows, rows) / len(rows)
        torch.testing.assert_close(found[name].matrices, expected, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model, ids = Decoder().eval(), tokens()
    mask = (torch.arange(5) < torch.arange(24).remainder(4).unsqueeze(1) + 2).long()
    found = moments(streamed(model, [{"input_ids": ids, "attention_mask": mask}]))["layers.1.up"]
    seen = inputs_of(model, model.layers[1].up, input_ids=ids, attention_mask=mask)[mask.bool()].double()
    assert found.positions == int(mask.sum())
    torch.testing.assert_close(found.matrices[0], seen.T @ seen / len(seen), rtol=1e-5, atol=1e-6)


def test_batches_of_several_lengths_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    found = moments(streamed(model, [tokens(4, 3), tokens(6, 7)]))
    assert found["layers.2.q"].positions == 4 * 3 + 6 * 7
    parts = [inputs_of(model, model.layers[2].q, tokens(n, t)).reshape(-1, 8).double() for n, t in ((4, 3), (6, 7))]
    seen = torch.cat(parts)
    torch.testing.assert_close(found["layers.2.q"].matrices[0], seen.T @ seen / len(seen), rtol=1e-5, atol=1e-6)


# -- row scales -------------------------------------------------------------------------------------------------------


def test_row_scales_are_squared_gradients_of_single_samples() -> None:
    torch.manual_seed(0)
    model, x, y = Cnn().eval(), images(10), torch.randint(0, 3, (10,))
    network = streamed(model, [(x[:6], y[:6]), (x[6:], y[6:])], F.cross_entropy)
    found = row_scales(network)
    for name, scale in found.items():
        module, expected = model.get_submodule(name), torch.zeros_like(scale)
        for i in range(10):
            outputs: list[Tensor] = []
            handle = module.register_forward_hook(lambda *call, out=outputs: out.append(call[2]) or call[2].clone())  # type: ignore[misc, func-returns-value]
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            handle.remove()
            gradient = torch.autograd.grad(loss, outputs[0])[0].double()
            expected += gradient.transpose(0, 1).reshape(len(scale), -1).square().sum(1) / 10
        torch.testing.assert_close(scale, expected, rtol=1e-4, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "data", "cuts"),
    [
        (mlp, torch.randn(8, 6), ("0", "2")),
        (Cnn, images(8), ("stem", "stages.0", "stages.1")),
        (Decoder, tokens(8), ("layers.0", "layers.1", "layers.2")),
    ],
)
def test_chains_are_found_by_what_the_network_does(make: type[nn.Module], data: Tensor, cuts: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    chain = find_chain(streamed(make(), data))
    assert chain.cuts == cuts
    assert [layer.name for segment in chain.segments for layer in segment] == list(cbs_opt.find_layers(make()).names)


class Skip(nn.Module):
    """The first layer is seen by the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.c(torch.relu(self.b(torch.relu(first))) + 0.0 * first)


def test_a_connection_across_leaves_no_cut_even_if_it_adds_nothing() -> None:
    assert find_chain(streamed(Skip(), torch.randn(8, 6))).cuts == ("a",)


class Twice(nn.Module):
    """One layer for two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.b(torch.relu(self.a(x)))))


def test_a_layer_called_twice_sums_up_and_is_said() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(30, 6)
    found = moments(streamed(model, x))["a"]
    seen = inputs_of(model, model.a, x).double()
    torch.testing.assert_close(found.matrices[0], seen.T @ seen / 60, rtol=1e-6, atol=1e-7)
    report = cbs_opt.prune(model, x, sparsity=0.5, curvature="layer_inputs", solver="obd").report
    assert any("'a' is called 2 times" in repair for repair in report.repairs)
    assert any("no chain of segments" in repair for repair in report.repairs)


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("make", "data"), [(mlp, torch.randn(90, 6)), (Cnn, images(70)), (Decoder, tokens(70))])
def test_every_segment_sees_what_the_pruned_ones_before_give(
    make: type[nn.Module], data: Tensor, in_order: bool
) -> None:
    torch.manual_seed(0)
    network = streamed(make(), data)
    model = network.model
    for segment in SegmentPasses(network, find_chain(network), in_order=in_order):
        for moment in segment:
            accumulator = Accumulator(network, [moment.layer])
            with torch.no_grad():
                for number, batch in enumerate(network.batches()):
                    with accumulator.watching(batch, number):
                        network.call(batch)
            expected = accumulator.moments[moment.layer.name].matrices
            torch.testing.assert_close(moment.matrices, expected, rtol=1e-6, atol=1e-9)
        for moment in segment:
            weight = model.get_submodule(moment.layer.name).weight
            assert isinstance(weight, Tensor)
            weight.data *= torch.rand_like(weight) > 0.5
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_layers_of_a_segment_that_see_the_same_tensor_are_one_step() -> None:
    torch.manual_seed(0)
    chain = find_chain(streamed(Decoder(), tokens(8)))
    steps = [[layer.name.split(".")[-1] for layer in step] for step in chain.in_steps(1)]
    assert steps == [["q", "k", "v"], ["o"], ["up"], ["down"]]
    chain = find_chain(streamed(Cnn(), images(8)))
    names = [[layer.name for layer in step] for step in chain.in_steps(1)]
    assert names == [["stages.0.c1", "stages.0.short"], ["stages.0.c2"]]


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("make", "data"), [(mlp, torch.randn(90, 6)), (Cnn, images(70)), (Decoder, tokens(70))])
def test_cross_moments_are_those_of_both_networks(make: type[nn.Module], data: Tensor, in_order: bool) -> None:
    torch.manual_seed(0)
    network = streamed(make(), data)
    model, dense = network.model, copy.deepcopy(network.model)
    layers = {layer.name: layer for layer in cbs_opt.find_layers(dense)}
    paired = {}

    def rows(net: nn.Module, name: str) -> Tensor:
        recorded = Recorded(replace(network, model=net), [layers[name]])
        with torch.no_grad(), recorded.watching():
            net(data)
        (found,) = recorded.next(layers[name]) or []
        return found.double()

    def weight(layer: Layer) -> Tensor:
        return getattr(*layer.held(dense)).detach()

    for step in SegmentPasses(network, find_chain(network), in_order=in_order, dense=weight):
        for moment in step:
            name = moment.layer.name
            ours, theirs = rows(model, name), rows(dense, name)
            paired[name] = moment.cross is not None
            if moment.cross is None:
                torch.testing.assert_close(ours, theirs)
            else:
                torch.testing.assert_close(moment.cross, theirs.mT @ ours, rtol=1e-4, atol=1e-3)
        for moment in step:
            held = getattr(*moment.layer.held(model)).data
            held *= torch.rand_like(held) > 0.5
    assert sum(paired.values()) >= len(layers) - 6 and set(paired) == set(layers)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("damping", [0.0, 0.03])
def test_layers_are_fitted_to_the_outputs_of_the_dense_network(share: float, damping: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()
    x = torch.randn(300, 7).double()
    options = LayerInputOptions(damping=damping, towards_dense=share)
    result = cbs_opt.prune(model, x, sparsity=0.5, curvature="layer_inputs", solver="obd", layer_inputs=options)
    for name in ("2", "4"):
        ours = inputs_of(result.model, result.model.get_submodule(name), x)
        theirs = inputs_of(model, model.get_submodule(name), x)
        before, after = (net.get_submodule(name).weight.detach() for net in (model, result.model))
        ridge = (damping * float(ours.square().mean()) * len(x)) ** 0.5
        target = ((1 - share) * ours + share * theirs) @ before.T
        for row, kept in enumerate(result.masks[name]):
            stacked = torch.cat([ours[:, kept], ridge * torch.eye(int(kept.sum())).double()])
            wanted = torch.cat([target[:, row], ridge * before[row, kept]])
            # What is removed is drawn to W as well, which is a constant.
            best = torch.linalg.lstsq(stacked, wanted[:, None]).solution[:, 0]
            torch.testing.assert_close(after[row, kept], best, rtol=1e-5, atol=1e-7)


def test_outputs_of_the_dense_network_are_come_closer_to() -> None:
    torch.manual_seed(0)
    model, x = Decoder().eval(), tokens(80)
    errors = {}
    for share, in_order in ((0.0, False), (1.0, False), (1.0, True)):
        options = LayerInputOptions(towards_dense=share, in_order=in_order)
        result = cbs_opt.prune(model, x, sparsity=0.6, curvature="layer_inputs", solver="admm", layer_inputs=options)
        with torch.no_grad():
            errors[share, in_order] = float((result.model(x) - model(x)).square().mean())
    assert errors[1.0, True] < errors[0.0, False] and errors[1.0, False] < errors[0.0, False]


class Routed(nn.Module):
    """Two experts, one for each sign of what the first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        positive = x[:, 0] > 0
        y = torch.zeros_like(x)
        y[positive], y[~positive] = self.one(x[positive]), self.two(x[~positive])
        return y


def test_experts_that_get_others_than_in_the_dense_network_are_fitted_to_their_own() -> None:
    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(100, 6)
    options = LayerInputOptions(towards_dense=1.0, in_order=True)
    result = cbs_opt.prune(model, x, sparsity=0.6, curvature="layer_inputs", solver="sweep", layer_inputs=options)
    assert sum("other positions" in repair for repair in result.report.repairs) == 2
    plain = cbs_opt.prune(model, x, sparsity=0.6, curvature="layer_inputs", solver="sweep")
    np.testing.assert_array_equal(result.weights, plain.weights)


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x))
        return self.head(x if float(x.detach().sum()) == 0.0 else self.c(x))


def test_data_that_leave_early_are_measured_in_one_pass() -> None:
    torch.manual_seed(0)
    model = EarlyExit().eval()
    with torch.no_grad():
        model.a.bias.zero_()
        model.b.bias.fill_(-1e-6)
    batches = [torch.randn(20, 6), torch.zeros(4, 6)]
    result = cbs_opt.prune(model, batches, sparsity=0.5, curvature="layer_inputs", solver="sweep")
    assert any("segments depend on the data" in repair for repair in result.report.repairs)
    options = LayerInputOptions(segments=False)
    plain = cbs_opt.prune(model, batches, sparsity=0.5, curvature="layer_inputs", solver="sweep", layer_inputs=options)
    np.testing.assert_array_equal(result.pruned, plain.pruned)
    np.testing.assert_array_equal(result.weights, plain.weights)


# -- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("update", ["none", "own", "combinatorial"])
def test_the_objective_is_half_the_error_of_the_layers(solver: str, update: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5)).eval(), torch.randn(200, 8) @ torch.randn(8, 8)
    options = LayerInputOptions(damping=0.0)

    def pruned() -> cbs_opt.PruneResult:
        return prune(model, x, solver=solver, update=update, layer_inputs=options)

    if update == "own" and solver != "sweep":
        with pytest.raises(CapabilityError, match="proposes none"):
            pruned()
        return
    result = pruned()
    with torch.no_grad():
        error = float((model(x) - result.model(x)).double().square().sum()) / 200
    joint = result.report.refit_objective if update == "combinatorial" else result.report.objective
    assert error == pytest.approx(2 * joint, rel=1e-4)
    assert math.isnan(result.report.refit_objective) == (update != "combinatorial")
    assert result.report.n_kept == 20


def test_own_weights_are_those_of_the_sweep() -> None:
    """The blocks that the layer makes, given to the solver, with its weights and half of its step."""
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(24, 7)).eval(), torch.randn(100, 24)
    moment = x.T @ x / 100
    curvature = Kronecker(torch.ones(7), moment.double(), 0.01 * float(moment.diagonal().mean()))
    dense = model[0].weight.detach().double().flatten().numpy()
    solution = solve(SelectionProblem(QuadraticBlock(dense, curvature=curvature), 84, "joint"), "sweep")
    for scale in (1.0, 0.5):
        result = prune(model, x, update="own", update_scale=scale)
        np.testing.assert_array_equal(result.pruned, solution.pruned)
        expected = np.where(solution.pruned, 0.0, dense + scale * (solution.own_weights - dense))
        np.testing.assert_allclose(result.weights, expected, rtol=1e-4, atol=1e-6)
        assert not np.asarray(result.weights)[solution.pruned].any()


@pytest.mark.parametrize(("make", "data"), [(mlp, torch.randn(90, 6)), (Cnn, images(70)), (Decoder, tokens(70))])
def test_masks_are_those_of_the_layers_one_by_one(make: type[nn.Module], data: Tensor) -> None:
    """Of each layer: the smallest C_jj w² of the moments under the network as it is pruned so far."""
    torch.manual_seed(0)
    model = make().eval()
    result = prune(model, data, sparsity=0.6, solver="obd", update="none", layer_inputs=LayerInputOptions(damping=0.0))
    network = streamed(cbs_opt.remove_masks(result.model), data)
    for segment in find_chain(streamed(make(), data)).segments:
        for layer in segment:
            weight = model.get_submodule(layer.name).weight
            mask = result.masks[layer.name]
            accumulator = Accumulator(network, [layer])
            with torch.no_grad():
                for number, batch in enumerate(network.batches()):
                    with accumulator.watching(batch, number):
                        network.call(batch)
            # All layers of a segment see the dense layers of their own segment, so only the first ones do as here.
            if layer is not segment[0]:
                continue
            assert isinstance(weight, Tensor)
            diagonal = accumulator.moments[layer.name].matrices.diagonal(dim1=1, dim2=2)
            rows = diagonal.repeat_interleave(layer.n_rows // len(diagonal), 0)
            scores = (rows * weight.detach().reshape(layer.n_rows, -1).double().square()).reshape(-1)
            kept = mask.reshape(-1)
            assert scores[kept].min() >= scores[~kept].max() * (1 - 1e-5)
    assert result.report.n_kept == int(result.layers.n * 0.4)
    spread = [row.sparsity for row in result.report.layers]
    assert max(abs(value - 0.6) * row.n for value, row in zip(spread, result.report.layers, strict=True)) <= 1.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_lose_equally_many(solver: str) -> None:
    result = cbs_opt.prune(
        mlp(), torch.randn(90, 6), sparsity=0.5, curvature="layer_inputs", solver=solver, allocation="rows"
    )
    for mask in result.masks.values():
        counts = mask.sum(1)
        assert counts.max() - counts.min() <= 1
    assert result.report.solver == f"{solver}@rows"


@pytest.mark.parametrize("solver", SOLVERS)
def test_kfac_shares_one_budget_by_the_loss(solver: str) -> None:
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(90, 6), torch.randint(0, 3, (90,))
    result = cbs_opt.prune(model, (x, y), F.cross_entropy, sparsity=0.5, curvature="kfac", solver=solver)
    report = result.report
    assert (report.curvature, report.solver) == ("kfac", f"{solver}@surgeon")
    assert report.n_kept == int(report.n * 0.5)
    assert len({round(row.sparsity, 2) for row in report.layers}) > 1
    assert report.loss_dense == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)
    assert report.loss_pruned == pytest.approx(float(F.cross_entropy(result.model(x), y).detach()), rel=1e-5)
    assert sum(row.share for row in report.layers) == pytest.approx(1.0)


def test_surgeon_shares_are_one_threshold_over_all_layers() -> None:
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(90, 6), torch.randint(0, 3, (90,))
    network = streamed(model, (x, y), F.cross_entropy)
    scores, scales = [], row_scales(network)
    for name, moment in moments(network).items():
        c = moment.matrices[0] + 0.01 * moment.matrices[0].diagonal().mean() * torch.eye(moment.layer.view.inputs)
        s = scales[name].clamp_min(1e-8 * float(scales[name].max()))
        weight = network.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        scores.append((weight.detach().double().square() * s.unsqueeze(1) / c.inverse().diagonal()).reshape(-1))
    limit = torch.cat(scores).sort().values[sum(len(s) for s in scores) // 2 - 1]
    expected = [int((s <= limit).sum()) for s in scores]
    report = cbs_opt.prune(model, (x, y), F.cross_entropy, sparsity=0.5, curvature="kfac", solver="obd").report
    assert [row.n - row.n_kept for row in report.layers] == expected


def test_better_solvers_leave_smaller_errors() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 30)).eval(), torch.randn(400, 40) @ torch.randn(40, 40)
    errors = [
        cbs_opt.prune(model, x, sparsity=0.6, curvature="layer_inputs", solver=solver).report.refit_objective
        for solver in ("magnitude", "obd", "admm")
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_network_given_stays_as_it_is_and_the_result_is_masked() -> None:
    model, x = mlp(), torch.randn(90, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = cbs_opt.prune(model, x, sparsity=0.5, curvature="layer_inputs", solver="sweep")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, mask in result.masks.items():
        assert bool((result.model.get_submodule(name).weight[~mask] == 0.0).all())
    assert math.isnan(result.report.loss_dense)
    assert "no calibration loss" in str(result.report)


# -- input that is not as it should be --------------------------------------------------------------------------------


def prune(model: nn.Module, data: object, loss: object = None, **options: object) -> cbs_opt.PruneResult:
    settings = {"sparsity": 0.5, "curvature": "layer_inputs", "solver": "sweep", **options}
    return cbs_opt.prune(model, data, loss, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "kfac"}, "pass loss_fn"),
        ({"curvature": "fisher"}, "takes a loss"),
        ({"update": "searched"}, "searched"),
        ({"update": "none", "layer_inputs": LayerInputOptions(towards_dense=1.0)}, "update='none'"),
        ({"stages": 3}, "no stages"),
        ({"fisher": cbs_opt.FisherOptions()}, "leave it out"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune(mlp(), torch.randn(20, 6), **options)


def test_layers_are_not_measured_once_for_all() -> None:
    with pytest.raises(CapabilityError, match=r"use cbs_opt\.prune"):
        cbs_opt.prepare(mlp(), (torch.randn(9, 6), torch.zeros(9).long()), F.cross_entropy, curvature="kfac")


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="zero or more"):
        LayerInputOptions(damping=-1.0)
    with pytest.raises(OptionError, match="towards_dense"):
        LayerInputOptions(towards_dense=1.5)
    with pytest.raises(OptionError, match="layer_inputs"):
        cbs_opt.Setup(layer_inputs=LayerInputOptions())
    with pytest.raises(CapabilityError, match="Kronecker"):
        prune(mlp(), torch.randn(20, 6), solver="by_component")


def test_a_sample_that_overflows_is_named() -> None:
    model, x = mlp(), torch.randn(20, 6)
    x[13] = 3e38
    with pytest.raises(DataError, match="sample 3 of batch 1: the inputs of layer '0'"):
        prune(model, [x[:10], x[10:]])
    x[13] = math.nan
    with pytest.raises(DataError, match=r"batch 1.*\[3, 0\]"):
        prune(model, [x[:10], x[10:]])


def test_dead_inputs_and_too_few_positions_are_said() -> None:
    x = torch.randn(4, 6)
    x[:, 2] = 0.0
    result = prune(mlp(), x)
    repairs = " ".join(result.report.repairs)
    assert "layer '0': 1 of 6 inputs are zero in all samples" in repairs
    assert "layer '0' was seen at 4 positions for 6 inputs" in repairs
    assert np.isfinite(result.weights).all()


def test_outputs_without_loss_are_said() -> None:
    model, x, y = mlp(), torch.randn(40, 6), torch.randint(0, 3, (40,))
    with torch.no_grad():
        model[2].weight[:, 4] = 0.0
    repairs = prune(model, (x, y), F.cross_entropy, curvature="kfac").report.repairs
    assert any("layer '0': no loss was seen through 1 outputs" in repair for repair in repairs)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_is_never_called_goes_by_magnitude() -> None:
    torch.manual_seed(0)
    model = Idle()
    result = prune(model, torch.randn(30, 6))
    assert any("'idle' was never called" in repair for repair in result.report.repairs)
    size, kept = model.idle.weight.detach().abs(), result.masks["idle"]
    assert size[kept].min() > size[~kept].max()
    torch.testing.assert_close(result.model.idle.weight[kept], model.idle.weight[kept])


def test_experts_that_no_token_reaches_go_by_magnitude_and_are_said() -> None:
    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(100, 6)
    with torch.no_grad():
        model.first.bias[0] = 100.0
    for options in (LayerInputOptions(), LayerInputOptions(towards_dense=1.0, in_order=True)):
        result = cbs_opt.prune(
            model, x, sparsity=0.5, curvature="layer_inputs", solver="admm", min_kept=0, layer_inputs=options
        )
        weight, kept = model.two.weight.detach().abs(), result.masks["two"]
        assert float(weight[kept].min()) >= float(weight[~kept].max()) and int(kept.sum()) == 18
        assert any("'two'" in repair and "magnitude" in repair for repair in result.report.repairs)


class Tokens(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None = None


def test_named_tuples_are_dicts_where_they_are_no_pairs() -> None:
    torch.manual_seed(0)
    model, ids = Decoder().eval(), tokens()
    mask = (torch.arange(5) < torch.arange(24).remainder(4).unsqueeze(1) + 2).long()
    named = prune(model, [Tokens(ids, mask)])
    plain = prune(model, [{"input_ids": ids, "attention_mask": mask}])
    np.testing.assert_array_equal(named.weights, plain.weights)
    assert not np.array_equal(named.weights, prune(model, [{"input_ids": ids}]).weights)
    pair = NamedTuple("pair", [("image", Tensor), ("label", Tensor)])(ids, mask)
    inputs, targets, _ = BatchStream([pair]).first()
    assert isinstance(inputs, Tensor) and torch.equal(inputs, ids)
    assert isinstance(targets, Tensor) and torch.equal(targets, mask)


@pytest.mark.parametrize("segments", [True, False])
def test_moments_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch, segments: bool) -> None:
    model, x = Cnn().eval(), images(20)
    network = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    sizes = {layer.name: 8 * layer.view.groups * layer.view.inputs**2 for layer in cbs_opt.find_layers(model)}
    last = [sizes[f"stages.1.{name}"] for name in ("c1", "c2", "short")]
    parts = list(sizes.values()) if not segments else last
    needed = network + sum(parts) + max(parts)
    options = LayerInputOptions(segments=segments)
    monkeypatch.setattr("cbs_opt.engine.estimate.available_memory", lambda _: needed)
    prune(model, x, layer_inputs=options)
    monkeypatch.setattr("cbs_opt.engine.estimate.available_memory", lambda _: needed - 1)
    with pytest.raises(OptionError, match="widest layers") as caught:
        prune(model, x, layer_inputs=options)
    assert ("segment by segment" in str(caught.value)) is not segments


def endless() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    while True:
        yield torch.randn(8, 6, generator=generator)


def test_data_that_end_or_never_end() -> None:
    one = LayerInputOptions(segments=False)
    with pytest.raises(DataError, match="may never end"):
        prune(mlp(), endless())
    with pytest.raises(DataError, match="read again"):
        prune(mlp(), endless(), calibration=CalibrationOptions(n_samples=20))
    found = prune(mlp(), endless(), calibration=CalibrationOptions(n_samples=20), layer_inputs=one)
    source = endless()
    kept = torch.cat([next(source) for _ in range(3)])[:20]
    np.testing.assert_array_equal(found.pruned, prune(mlp(), kept, layer_inputs=one).pruned)
    short = iter([torch.randn(8, 6)])
    with pytest.raises(DataError, match="20 calibration samples are asked for, the data hold 8"):
        prune(mlp(), short, calibration=CalibrationOptions(n_samples=20), layer_inputs=one)
    with pytest.raises(DataError, match="empty"):
        prune(mlp(), [])


class Changing:
    """Other batches on every pass."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Tensor]:
        yield from (torch.randn(8, 6) for _ in range(2))


def test_data_that_change_between_passes_are_refused() -> None:
    with pytest.raises(DataError, match="differs between two passes"):
        prune(mlp(), Changing())
    assert prune(mlp(), Changing(), calibration=CalibrationOptions(check_passes=False)).report.n_kept == 69


def test_samples_are_drawn_from_batches() -> None:
    x = torch.randn(30, 6)
    stream = BatchStream([x[:11], x[11:]], CalibrationOptions(n_samples=12, seed=5))
    drawn = torch.cat([batch[0] for batch in stream])  # type: ignore[misc]
    wanted = np.sort(np.random.default_rng(5).permutation(30)[:12])
    torch.testing.assert_close(drawn, x[wanted])
    assert stream.n == 12


@pytest.mark.parametrize("update", ["none", "own", "combinatorial"])
def test_layers_are_refitted_and_bounded_where_that_is_asked_for(update: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3, bias=False)).eval(), torch.randn(50, 6) @ torch.randn(6, 6)
    setup = cbs_opt.Setup(curvature="layer_inputs", device="cpu")
    choice = cbs_opt.Choice(sparsity=0.5, solver="sweep", update=update)
    plain = prune_layerwise(model, x, None, setup, choice).report
    report = prune_layerwise(model, x, None, setup, choice, judging=Judging(refit=True, bound="auto")).report
    block = QuadraticBlock(model[0].weight.detach().double().reshape(-1).numpy(), curvature=moments_of(x))
    problem = SelectionProblem(block, 9, "joint")
    best = solve(problem, "brute_force").objective
    assert report.bound <= best * (1 + 1e-9) <= report.refit_objective * (1 + 2e-9)
    assert report.refit_objective <= report.objective * (1 + 1e-9)
    assert report.layers[0].gap == pytest.approx((report.objective - report.bound) / report.objective)
    assert math.isnan(plain.layers[0].gap)
    assert "gap" in str(report) and report.objective == pytest.approx(plain.objective)


def moments_of(x: Tensor) -> Kronecker:
    """The curvature of a layer of three rows that sees x."""
    c = x.double().T @ x.double() / len(x)
    return Kronecker(torch.ones(3, dtype=torch.float64), c, 0.01 * float(c.diagonal().mean()))
