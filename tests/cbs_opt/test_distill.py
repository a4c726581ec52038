"""Distillation after pruning: against least squares, masks to the bit, the held-out rule, padding, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import CalibrationData, DataError, Distill, FisherOptions, ModelError, OptionError, PruneReport
from cbs_opt.data.divergence import compared, distance
from cbs_opt.data.stream import BatchStream
from cbs_opt.data.training_batches import TrainingBatches
from cbs_opt.engine.distil_pruned import distil_pruned
from cbs_opt.engine.masked_training import TrainedWeights, linear_adamw
from solvers.errors import UnknownNameError

WAYS: dict[str, dict[str, Any]] = {
    "none": {"curvature": "none", "solver": "magnitude", "update": "none"},
    "fisher": {"fisher": FisherOptions(n_rows=60)},
    "stages": {"stages": 2},
    "layer_inputs": {"curvature": "layer_inputs", "solver": "sweep"},
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


def samples(n: int = 240) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return x, mlp()(x).argmax(1)


class Reader(nn.Module):
    """Tokens to logits (B, T, V); a position sees itself alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.up(self.embed(input_ids))))}


def test_a_linear_student_comes_to_masked_least_squares() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3, bias=False)).double()
    x = torch.randn(200, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    options = Distill(steps=3000, lr=0.03, loss="mse", batch_size=1000)
    choice = {"sparsity": 0.5, "solver": "magnitude", "update": "none", "curvature": "layer_inputs"}
    result = cbs_opt.prune(model, [(x[:175],), (x[175:],)], distill=options, device="cpu", **choice)
    weight, kept = model[0].weight.detach(), result.masks["0"]
    found = result.model[0].weight.detach()
    for row in range(3):
        best = torch.linalg.lstsq(x[:175][:, kept[row]], x[:175] @ weight[row]).solution
        assert torch.allclose(found[row, kept[row]], best, rtol=1e-3, atol=1e-4)
    done = result.report.distill
    assert done is not None and done.n_samples == 175 and done.n_held_out == 25
    dense = x[175:] @ weight.T
    expected = float(((x[175:] @ found.T - dense) ** 2).sum() / (dense**2).sum())
    assert done.loss_after == pytest.approx(expected, rel=1e-9) and expected < done.loss_before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parameters", ["layers", "all"])
def test_every_curvature_is_followed_by_steps_under_the_same_mask(way: str, parameters: str) -> None:
    model, data = mlp(), samples()
    before = copy.deepcopy(model.state_dict())
    plain = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, device="cpu", **WAYS[way])
    options = Distill(steps=40, lr=5e-3, parameters=parameters)
    result = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, device="cpu", distill=options, **WAYS[way])
    again = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, device="cpu", distill=options, **WAYS[way])
    report, done = result.report, result.report.distill
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(result.pruned, plain.pruned) and np.array_equal(result.weights, again.weights)
    for name, mask in result.masks.items():
        stored = result.model.get_submodule(name).parametrizations.weight.original.detach()
        assert not any(stored[~mask].numpy().tobytes())
    assert done is not None and done.steps_kept > 0 and done.loss_after < done.loss_before and done.lr == 5e-3
    assert plain.report.distill is None and report.loss_undistilled == pytest.approx(plain.report.loss_pruned)
    loss = F.cross_entropy(result.model(data[0]).detach(), data[1])
    assert report.loss_pruned == pytest.approx(float(loss), rel=1e-5)
    assert report.n_kept == plain.report.n_kept == np.count_nonzero(~result.pruned)
    assert not np.array_equal(result.weights, plain.weights)
    biases = [torch.equal(result.model[i].bias, model[i].bias) for i in (0, 2)]
    assert not any(biases) if parameters == "all" else all(biases)
    assert all(p.requires_grad for p in result.model.parameters()) and "distillation" in str(report)
    for row in report.layers:
        norm = float(result.model.get_submodule(row.name).weight.detach().norm())
        assert row.norm_after == pytest.approx(norm, rel=1e-5)


def test_kept_gradients_are_prunings_and_frozen_parameters_stay() -> None:
    model, data = mlp(), samples()
    model[2].bias.requires_grad_(False)
    options = Distill(steps=20, lr=5e-3, parameters="all")
    result = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.7, device="cpu", distill=options, **WAYS["none"])
    assert torch.equal(result.model[2].bias, model[2].bias) and not torch.equal(result.model[0].bias, model[0].bias)
    assert [p.requires_grad for p in result.model.parameters()].count(False) == 1


def test_steps_that_gain_nothing_are_undone_and_said() -> None:
    model, data = mlp(), samples()
    choice = {"sparsity": 0.7, "device": "cpu", **WAYS["none"]}
    plain = cbs_opt.prune(model, data, F.cross_entropy, **choice)
    wild = cbs_opt.prune(model, data, F.cross_entropy, distill=Distill(steps=8, lr=1e4), **choice)
    done = wild.report.distill
    assert done is not None and done.steps_kept == 0 and done.loss_after == done.loss_before and np.isnan(done.lr)
    assert np.array_equal(wild.weights, plain.weights) and wild.report.loss_pruned == plain.report.loss_pruned
    assert any("gained nothing" in warning for warning in wild.report.warnings)
    shorter = cbs_opt.prune(model, data, F.cross_entropy, distill=Distill(steps=30, lr=1.0, tries=6), **choice)
    done = shorter.report.distill
    assert done is not None and done.lr < 1.0 and done.loss_after < done.loss_before


def test_values_that_are_not_finite_are_undone_and_said() -> None:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().exp()

    model = nn.Sequential(mlp(), Exp()).eval()
    choice = {"sparsity": 0.7, "device": "cpu", **WAYS["none"]}
    plain = cbs_opt.prune(model, samples(), F.cross_entropy, **choice)
    result = cbs_opt.prune(model, samples(), F.cross_entropy, distill=Distill(8, 1e4, "mse", tries=2), **choice)
    assert np.array_equal(result.weights, plain.weights)
    assert len([repair for repair in result.report.repairs if "not finite" in repair]) == 2


def test_the_given_loss_falls_and_a_divergence_that_raises_it_is_said() -> None:
    model, data = mlp(), samples()
    with torch.no_grad():
        model[2].weight.mul_(0.2)
    choice = {"sparsity": 0.5, "device": "cpu", **WAYS["layer_inputs"]}
    given = cbs_opt.prune(model, data, F.cross_entropy, distill=Distill(100, 1e-2, "given"), **choice).report
    assert given.distill is not None and given.loss_pruned < given.loss_undistilled < 2 * given.loss_dense
    better = cbs_opt.prune(
        model, data, F.cross_entropy, stages=6, sparsity=0.2, device="cpu", distill=Distill(100, 1e-2)
    )
    assert better.report.loss_pruned > better.report.loss_undistilled
    assert any("raised the calibration loss" in warning for warning in better.report.warnings)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    ids = torch.randint(1, 9, (24, 7))
    mask = (torch.arange(7) < torch.randint(2, 8, (24, 1))).long()
    choice = {"sparsity": 0.6, "curvature": "layer_inputs", "solver": "magnitude", "update": "none", "device": "cpu"}
    found = []
    for filler in (0, 5):
        padded = torch.where(mask == 1, ids, filler)
        data = [{"input_ids": padded[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, 24, 4)]
        found.append(cbs_opt.prune(model, data, distill=Distill(20, 1e-2, batch_size=8), **choice))
    one, other = found
    assert np.array_equal(one.weights, other.weights)
    assert one.report.distill is not None and one.report.distill.loss_after < one.report.distill.loss_before
    assert one.report.distill.n_held_out == 4 and np.isnan(one.report.loss_undistilled)


def test_sums_and_weights_are_their_formulas() -> None:
    torch.manual_seed(0)
    z, dense = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    p, q = dense.softmax(-1), z.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    total, weight = distance("kl", z, compared({"logits": dense}), {"attention_mask": mask})
    assert weight == 9 and float(total) == pytest.approx(float(expected[mask == 1].sum()), rel=1e-12)
    # A mask of another length is not that of these positions.
    total, weight = distance("kl", z, dense, {"attention_mask": mask[:, :4]})
    assert weight == 15 and float(total) == pytest.approx(float(expected.sum()), rel=1e-12)
    total, weight = distance("mse", compared((mask, z)), dense, {"attention_mask": mask})
    assert float(total) == pytest.approx(float((z - dense)[mask == 1].square().sum()), rel=1e-12)
    assert weight == pytest.approx(float(dense[mask == 1].square().sum()), rel=1e-12)
    for kind, output, target in (("kl", z[..., :1], dense[..., :1]), ("mse", z, dense[:1]), ("kl", mask, dense)):
        with pytest.raises(ModelError):
            distance(kind, compared(output), target, z)


def test_gradients_of_pieces_add_up_and_removed_weights_leave_no_trace() -> None:
    model = mlp().double()
    layers = cbs_opt.find_layers(model)
    pruned = np.random.default_rng(0).random(layers.n) < 0.6
    layers.zero(model, pruned)
    weights = TrainedWeights(model, layers, pruned, "layers")
    x, y = samples(30)
    with weights.differentiable():
        assert model[0].bias.requires_grad is False
        (F.cross_entropy(model(x.double()[:10]), y[:10]) * 10).backward()
        (F.cross_entropy(model(x.double()[10:]), y[10:]) * 20).backward()
        assert weights.take_gradients(30.0)
    found = torch.cat([m.grad.reshape(-1) for m in weights.masters])  # type: ignore[union-attr]
    free = copy.deepcopy(model)
    F.cross_entropy(free(x.double()), y).backward()
    whole = torch.cat([layer.grad.reshape(-1) for layer in layers.parameters(free)])  # type: ignore[union-attr]
    expected = torch.where(torch.from_numpy(pruned), 0.0, whole)
    expected /= max(float(expected.norm()), 1.0)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-12)
    assert model[0].bias.requires_grad and model[0].weight.grad is None


def test_halves_move_by_steps_below_their_rounding() -> None:
    model = mlp().bfloat16()
    layers = cbs_opt.find_layers(model)
    weights = TrainedWeights(model, layers, np.zeros(layers.n, dtype=bool), "layers")
    before, optimiser = model[0].weight.detach().clone(), linear_adamw(weights, 1e-5, 10**6)
    for _ in range(1000):
        for tensor in weights.tensors:
            tensor.grad = torch.full_like(tensor, 0.01)
        assert optimiser.step(1.0)
    assert torch.allclose(weights.masters[0], before.float() - 1e-2, atol=1e-3)
    assert torch.equal(model[0].weight.detach(), weights.masters[0].bfloat16())


@pytest.mark.parametrize("sizes", [[5], [3, 4], [4] * 9, [1] * 17])
@pytest.mark.parametrize("size", [None, 2, 6])
def test_held_out_samples_are_never_trained_on_and_all_others_are(sizes: list[int], size: int | None) -> None:
    numbers = iter(range(sum(sizes)))
    data = [{"x": torch.tensor([float(next(numbers)) for _ in range(n)])} for n in sizes]
    batches = TrainingBatches(BatchStream(data), size, 0.125, 0)
    seen: set[float] = set()
    for _, group in zip(range(60), batches, strict=False):
        assert size is None or (sum(b[2] for b in group) >= size and all(b[2] <= size for b in group))
        seen |= {float(v) for batch in group for v in batch[0]["x"]}  # type: ignore[index,union-attr]
    held = {float(v) for batch in batches.held_out for v in batch[0]["x"]}  # type: ignore[index,union-attr]
    assert held and not held & seen and len(held | seen) == sum(sizes)
    assert batches.n_train == len(seen) and batches.n_held_out == len(held)


def test_data_in_memory_are_drawn_in_permutations() -> None:
    data = CalibrationData(torch.arange(21.0), None, 21)
    batches = TrainingBatches(data, 6, 0.125, 3)
    held = set(torch.cat([b[0] for b in batches.held_out]).tolist())  # type: ignore[misc]
    drawn = [v for _, (batch,) in zip(range(19), batches, strict=False) for v in batch[0].tolist()]  # type: ignore[union-attr]
    assert len(held) == 2 and not held & set(drawn) and {drawn.count(v) for v in drawn} == {6}
    with pytest.raises(DataError, match="single sample"):
        TrainingBatches(CalibrationData(torch.zeros(1), None, 1), None, 0.5, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Distill(steps=0),
        lambda: Distill(lr=0.0),
        lambda: Distill(lr=1e30),
        lambda: Distill(lr=float("nan")),
        lambda: Distill(loss="hiden"),
        lambda: Distill(parameters="biases"),
        lambda: Distill(batch_size=0),
        lambda: Distill(held_out=0.9),
        lambda: Distill(tries=True),
        lambda: cbs_opt.Choice(sparsity=0.5, distill=32),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises((OptionError, UnknownNameError)):
        make()


def test_what_cannot_be_distilled_is_refused_before_the_data_are_read() -> None:
    class Unread:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> object:
            raise AssertionError("read")

    choice = {"sparsity": 0.5, "curvature": "layer_inputs", "solver": "sweep"}
    with pytest.raises(OptionError, match="takes a loss"):
        cbs_opt.prune(mlp(), Unread(), distill=Distill(loss="given"), **choice)
    with pytest.raises(DataError, match="one-shot"):
        options = cbs_opt.CalibrationOptions(n_samples=8, check_passes=False, order="first")
        data = iter([(samples(8)[0],)])
        layer_inputs = cbs_opt.LayerInputOptions(segments=False)
        cbs_opt.prune(mlp(), data, distill=Distill(), calibration=options, layer_inputs=layer_inputs, **choice)


def test_reports_come_back_from_their_files(tmp_path: Any) -> None:
    for options in (Distill(4), Distill(4, 1e4)):
        report = cbs_opt.prune(mlp(), samples(), F.cross_entropy, sparsity=0.5, distill=options, **WAYS["none"]).report
        report.save(tmp_path / "report.json")
        assert str(PruneReport.load(tmp_path / "report.json")) == str(report)


def test_a_prepared_network_stays_what_it_was() -> None:
    prepared = cbs_opt.prepare(mlp(), samples(), F.cross_entropy, fisher=FisherOptions(n_rows=60), device="cpu")
    first = prepared.prune(sparsity=0.7, distill=Distill(20, 5e-3, parameters="all"))
    second = prepared.prune(sparsity=0.7, distill=Distill(20, 5e-3, parameters="all"))
    plain = prepared.prune(sparsity=0.7)
    assert np.array_equal(first.weights, second.weights) and not np.array_equal(first.weights, plain.weights)
    assert torch.equal(plain.model[0].bias, mlp()[0].bias)


def test_a_network_that_was_pruned_before_comes_to_the_same() -> None:
    data, model = samples(), mlp()
    setup = cbs_opt.Setup(curvature="layer_inputs", device="cpu")
    options = Distill(steps=20, lr=1e-3)
    how = {"sparsity": 0.6, "solver": "sweep", "update": "own", "curvature": "layer_inputs", "device": "cpu"}
    before = cbs_opt.prune(model, data, F.cross_entropy, **how)
    after = cbs_opt.prune(model, data, F.cross_entropy, distill=options, **how)
    plain = cbs_opt.remove_masks(copy.deepcopy(before.model))
    for pruned in (before.model, plain):
        state = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
        found = distil_pruned(pruned, model, data, F.cross_entropy, setup, options)
        assert torch.equal(found.model(data[0]), after.model(data[0]))
        assert found.loss == after.report.loss_pruned and found.record.loss_after == after.report.distill.loss_after
        assert found.masks.keys() == before.masks.keys()
        assert all(torch.equal(found.masks[name], mask) for name, mask in before.masks.items())
        assert all(torch.equal(pruned.state_dict()[name], tensor) for name, tensor in state.items())


LAYERS = cbs_opt.Setup(curvature="layer_inputs", device="cpu")
ONCE = replace(LAYERS, calibration=cbs_opt.CalibrationOptions(n_samples=240))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": mlp()}, ModelError, "no layer of the network has a mask or zeros"),
        ({"dense": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()}, ModelError, "different layers"),
        ({"data": iter([samples()]), "setup": ONCE}, DataError, "one-shot"),
        ({"options": Distill(loss="given")}, OptionError, "takes a loss"),
    ],
)
def test_what_cannot_be_distilled_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    pruned = mlp()
    with torch.no_grad():
        pruned[0].weight[0] = 0.0
    given = {"model": pruned, "dense": mlp(), "data": samples(), "loss_fn": None, "options": Distill()}
    with pytest.raises(error, match=message):
        distil_pruned(**{**given, "setup": LAYERS, **change})
