"""Gradients per row against plain autograd, and what is refused before or after they are taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt import CalibrationData, Forward, ModelError, OptionError, UnknownNameError, find_layers, sample_gradients
from tests.cbs_opt.networks import (
    Branching,
    ConvNet,
    Mlp,
    SequenceNet,
    Tied,
    TiedEmbedding,
    build,
    inputs_for,
    oracle_rows,
)

NETWORKS = [Mlp, ConvNet, SequenceNet, Tied, TiedEmbedding]


def setting(cls: type[nn.Module], n: int = 12, loss_fn=F.cross_entropy, dtype: torch.dtype = torch.float64):
    model = build(cls, dtype=dtype)
    data = CalibrationData.read(inputs_for(cls, n, dtype=dtype))
    return model, find_layers(model), data, Forward(model, loss_fn)


@pytest.mark.parametrize("cls", NETWORKS)
@pytest.mark.parametrize("method", ["auto", "outer", "vmap", "loop"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_are_those_of_autograd(cls: type[nn.Module], method: str, batch: int) -> None:
    model, layers, data, forward = setting(cls)
    index = data.draw(7, batch, seed=4)
    if method == "outer" and cls is TiedEmbedding:
        with pytest.raises(ModelError, match=r"embedding\.weight"):
            sample_gradients(model, layers, data, forward, index, method=method)
        return
    found = sample_gradients(model, layers, data, forward, index, method=method, dtype=torch.float64)
    expected = oracle_rows(model, layers, forward, data, index)
    torch.testing.assert_close(found.factor, expected / math.sqrt(7), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.mean, expected.mean(0), rtol=1e-10, atol=1e-13)
    inputs, targets = data.batch(index.reshape(-1), "cpu")
    assert found.loss == pytest.approx(F.cross_entropy(model(inputs), targets).item(), rel=1e-10)
    assert (found.n_rows, found.batch_size) == (7, batch)
    # The factor's square is the empirical Fisher matrix.
    fisher = sum(torch.outer(row, row) for row in expected) / 7
    torch.testing.assert_close(found.factor.T @ found.factor, fisher, rtol=1e-9, atol=1e-13)


def test_central_differences() -> None:
    model, layers, data, forward = setting(ConvNet, n=5)
    found = sample_gradients(model, layers, data, forward, np.array([[0, 1], [2, 3]]), dtype=torch.float64)
    w = layers.read(model)
    inputs, targets = data.batch(np.array([2, 3]), "cpu")
    for i in range(0, layers.n, 17):
        values = []
        for step in (1e-6, -1e-6):
            moved = w.clone()
            moved[i] += step
            layers.write(model, moved)
            values.append(F.cross_entropy(model(inputs), targets).item())
        layers.write(model, w)
        assert float(found.factor[1, i]) * math.sqrt(2) == pytest.approx((values[0] - values[1]) / 2e-6, abs=2e-7)


def normed() -> tuple[nn.Module, CalibrationData]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)
    )
    x = torch.randn(12, 2, 6, 6, dtype=torch.float64)
    return model.double().eval(), CalibrationData(x, torch.arange(12) % 4, 12)


def test_central_differences_under_batch_statistics() -> None:
    model, data = normed()
    layers, forward = find_layers(model), Forward(model, F.cross_entropy)
    index = data.draw(2, 6, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sample_gradients(model, layers, data, forward, index, dtype=torch.float64, batch_norm="batch")
    assert found.method == "loop"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module.training for module in model.modules())
    w = layers.read(model)
    inputs, targets = data.batch(index[1], "cpu")
    model.train()
    for i in range(0, layers.n, 7):
        values = []
        for step in (1e-5, -1e-5):
            moved = w.clone()
            moved[i] += step
            layers.write(model, moved)
            values.append(F.cross_entropy(model(inputs), targets).item())
        assert float(found.factor[1, i]) * math.sqrt(2) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)
    # But for its ε, a batch norm takes out the scale of the weights before it, so the gradient is orthogonal to them.
    fc = next(layer for layer in layers if layer.name == "4")
    row, weights = found.factor[0, fc.slice], w[fc.slice]
    assert abs(float(row @ weights)) < 1e-4 * float(row.norm() * weights.norm())


def test_batch_statistics_need_batches_and_the_loop() -> None:
    model, data = normed()
    arguments = (model, find_layers(model), data, Forward(model, F.cross_entropy))
    with pytest.raises(OptionError, match="one sample"):
        sample_gradients(*arguments, data.draw(3, 1, seed=0), batch_norm="batch")
    with pytest.raises(OptionError, match="loop"):
        sample_gradients(*arguments, data.draw(3, 4, seed=0), batch_norm="batch", method="vmap")
    with pytest.raises(OptionError, match="'running' or 'batch'"):
        sample_gradients(*arguments, data.draw(3, 4, seed=0), batch_norm="both")


def test_auto_says_what_it_took_and_why() -> None:
    plain = sample_gradients(*setting(Mlp), np.arange(6).reshape(6, 1))
    assert plain.method == "outer" and plain.notes == ()
    tied = sample_gradients(*setting(TiedEmbedding), np.arange(6).reshape(6, 1))
    assert tied.method == "vmap" and len(tied.notes) == 1 and "embedding.weight" in tied.notes[0]
    branching = sample_gradients(*setting(Branching), np.arange(6).reshape(6, 1))
    assert branching.method == "loop" and len(branching.notes) == 3
    assert "depends on those beside it" in branching.notes[0]


def test_control_flow_that_depends_on_the_data_is_followed() -> None:
    model, layers, data, forward = setting(Branching)
    index = data.draw(9, 1, 0)
    found = sample_gradients(model, layers, data, forward, index, dtype=torch.float64)
    torch.testing.assert_close(found.factor * 3, oracle_rows(model, layers, forward, data, index))


def test_a_loss_that_cannot_be_vmapped_is_taken_row_by_row() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if not bool(output.isfinite().all()):
            raise ValueError("no numbers")
        return F.cross_entropy(output, target)

    model, layers, data, forward = setting(Mlp, loss_fn=loss_fn)
    index = data.draw(8, 1, 0)
    found = sample_gradients(model, layers, data, forward, index, method="outer", dtype=torch.float64)
    torch.testing.assert_close(found.factor * math.sqrt(8), oracle_rows(model, layers, forward, data, index))


def test_dict_batches_and_dict_outputs() -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(x)}

    torch.manual_seed(0)
    model = Dictionary().double()
    x, y = inputs_for(Mlp, 10)
    data = CalibrationData.read([{"x": x, "label": y}])
    forward = Forward(model, lambda output, batch: F.cross_entropy(output["logits"], batch["label"]))
    index = data.draw(5, 2, 0)
    expected = oracle_rows(model, find_layers(model), forward, data, index)
    for method in ("outer", "vmap", "loop"):
        found = sample_gradients(model, find_layers(model), data, forward, index, method=method, dtype=torch.float64)
        torch.testing.assert_close(found.factor * math.sqrt(5), expected)


def test_outputs_of_a_class_of_their_own_reach_the_loss_as_they_are() -> None:
    class Output(dict):
        @property
        def logits(self) -> Tensor:
            return self["logits"]

    class Wrapped(Mlp):
        def forward(self, x: Tensor) -> Output:
            return Output(logits=super().forward(x))

    torch.manual_seed(0)
    model = Wrapped().double()
    data = CalibrationData.read(inputs_for(Mlp, 8))
    forward = Forward(model, lambda output, target: F.cross_entropy(output.logits, target))
    index = data.draw(4, 2, 0)
    found = sample_gradients(model, find_layers(model), data, forward, index, dtype=torch.float64)
    assert found.method == "vmap" and "Output" in found.notes[0]
    torch.testing.assert_close(found.factor * 2, oracle_rows(model, find_layers(model), forward, data, index))


@pytest.mark.parametrize("case", ["positions first", "output not per sample", "functional use"])
def test_networks_the_fast_method_cannot_follow_still_get_the_right_rows(case: str) -> None:
    class Odd(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if case == "positions first":
                both = torch.stack([x, x * 0.5, x - 1.0])
                return self.fc3(torch.tanh(self.fc2(F.relu(self.fc1(both))))).sum(0)
            if case == "output not per sample":
                return super().forward(x).T
            return self.fc3(torch.tanh(F.linear(self.fc1(x), self.fc2.weight)))

    torch.manual_seed(0)
    model = Odd().double()
    data = CalibrationData.read(inputs_for(Mlp, 9))
    loss = lambda output, target: F.cross_entropy(output.T if "per" in case else output, target)  # noqa: E731
    forward = Forward(model, loss)
    index = data.draw(4, 1, 0)
    found = sample_gradients(model, find_layers(model), data, forward, index, dtype=torch.float64)
    assert found.method != "outer" and found.notes
    torch.testing.assert_close(found.factor * 2, oracle_rows(model, find_layers(model), forward, data, index))
    with pytest.raises(ModelError, match="does not apply"):
        sample_gradients(model, find_layers(model), data, forward, index, method="outer")


def test_chunks_of_any_size_give_the_same_rows() -> None:
    model, layers, data, forward = setting(ConvNet)
    index = data.draw(11, 1, 0)
    whole = sample_gradients(model, layers, data, forward, index, dtype=torch.float64)
    done: list[tuple[int, int]] = []
    pieces = sample_gradients(
        model, layers, data, forward, index, dtype=torch.float64, memory_budget=1, progress=lambda *a: done.append(a)
    )
    torch.testing.assert_close(pieces.factor, whole.factor, rtol=1e-11, atol=1e-15)
    assert done == [(i, 11) for i in range(1, 12)]


def test_the_factor_is_float32_by_default_and_can_be_written_into_given_memory() -> None:
    model, layers, data, forward = setting(Mlp, dtype=torch.float32)
    index = data.draw(6, 1, 0)
    memory = torch.full((6, layers.n), 7.0)
    found = sample_gradients(model, layers, data, forward, index, out=memory)
    assert found.factor is memory and found.factor.dtype == torch.float32 and found.mean.dtype == torch.float64
    expected = oracle_rows(model, layers, forward, data, index) / math.sqrt(6)
    torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(OptionError, match="out has shape"):
        sample_gradients(model, layers, data, forward, index[:5], out=memory)


def test_layers_that_were_not_chosen_have_no_columns() -> None:
    model, _, data, forward = setting(Mlp)
    layers = find_layers(model, include="fc2")
    index = data.draw(4, 1, 0)
    found = sample_gradients(model, layers, data, forward, index, dtype=torch.float64)
    torch.testing.assert_close(found.factor * 2, oracle_rows(model, layers, forward, data, index))


def test_the_first_order_term_is_scaled_to_the_factor() -> None:
    model, layers, data, forward = setting(Mlp)
    found = sample_gradients(model, layers, data, forward, data.draw(3, 4, 0))
    torch.testing.assert_close(found.gradient, found.mean / 4)


def test_the_network_is_left_as_it_was() -> None:
    class WithDropout(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(x))

    torch.manual_seed(0)
    model = WithDropout().double().train()
    model.fc2.eval()
    model.fc3.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = CalibrationData.read(inputs_for(Mlp, 8))
    layers = find_layers(model)
    for method in ("outer", "vmap", "loop"):
        sample_gradients(model, layers, data, Forward(model, F.cross_entropy), data.draw(4, 1, 0), method=method)
    assert model.training and model.drop.training and not model.fc2.training
    assert model.fc1.weight.requires_grad and not model.fc3.weight.requires_grad
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_batch_norm_in_train_mode_is_refused_by_name_with_the_remedy() -> None:
    model, layers, data, forward = setting(ConvNet)
    model.train()
    with pytest.raises(ModelError, match=r"batch norm 'bn' is in train mode; call model\.eval\(\)"):
        sample_gradients(model, layers, data, forward, data.draw(4, 1, 0))
    assert model.training


def test_batch_norm_without_statistics_is_refused() -> None:
    model = (
        nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double().eval()
    )
    data = CalibrationData.read(inputs_for(Mlp, 8))
    with pytest.raises(ModelError, match="track_running_stats"):
        sample_gradients(model, find_layers(model), data, Forward(model, F.cross_entropy), data.draw(4, 1, 0))


def test_samples_that_see_one_another_are_noticed() -> None:
    class Centred(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - 0.9 * x.mean(0))

    model, layers, data, forward = setting(Mlp)
    coupled = Centred().double()
    coupled.load_state_dict(model.state_dict())
    index = data.draw(5, 1, 0)
    forward = Forward(coupled, F.cross_entropy)
    found = sample_gradients(coupled, layers, data, forward, index, dtype=torch.float64)
    assert found.method == "vmap" and "depends on those beside it" in found.notes[0]
    assert "differ from those of autograd" in found.notes[1]
    torch.testing.assert_close(found.factor * math.sqrt(5), oracle_rows(coupled, layers, forward, data, index))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), "scalar tensor"),
        (lambda o, t: 1.0, "scalar tensor"),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum"), "sums over the batch"),
        (lambda o, t: F.cross_entropy(o, t) * float("nan"), "is nan"),
        (lambda o, t: F.cross_entropy(o + torch.randn_like(o), t), "random in eval mode"),
    ],
)
def test_losses_that_make_no_sense_are_refused(loss_fn, message: str) -> None:
    model, layers, data, forward = setting(Mlp, loss_fn=loss_fn)
    with pytest.raises(ModelError, match=message):
        sample_gradients(model, layers, data, forward, data.draw(4, 1, 0))


def test_a_gradient_that_is_not_finite_is_refused_with_row_and_layer() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(self.fc(x).abs())

    model = Root()
    x = torch.ones(5, 2)
    x[3] = 0.0
    data = CalibrationData.read((x, torch.zeros(5, dtype=torch.long)))
    with pytest.raises(ModelError, match="gradient of row 3 is not finite in layer 'fc'"):
        sample_gradients(
            model, find_layers(model), data, Forward(model, F.cross_entropy), np.arange(5).reshape(5, 1), method="loop"
        )


def test_unknown_methods_dtypes_and_budgets_are_refused() -> None:
    arguments = setting(Mlp)
    index = np.arange(4).reshape(4, 1)
    with pytest.raises(UnknownNameError, match="Did you mean 'vmap'"):
        sample_gradients(*arguments, index, method="vmp")
    with pytest.raises(OptionError, match="float32 or float64"):
        sample_gradients(*arguments, index, dtype=torch.float16)
    with pytest.raises(OptionError, match="memory_budget"):
        sample_gradients(*arguments, index, memory_budget=0)
    with pytest.raises(OptionError, match=r"GB .*fewer rows"):
        sample_gradients(*arguments, np.broadcast_to(np.int64(0), (10**13, 1)))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(4, 7), torch.zeros(4, dtype=torch.long), r"x \(1, 7\).*check shapes"),
        (torch.ones(4, 6), torch.full((4,), 9), r"range of the targets"),
        (torch.ones(4, 6), torch.zeros(4, 5), r"y \(1, 5\)"),
        (torch.ones(4, 6, dtype=torch.long), torch.zeros(4, dtype=torch.long), r"torch\.int64"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused_with_their_shapes(x: Tensor, y: Tensor, message: str) -> None:
    model, layers, _, forward = setting(Mlp)
    data = CalibrationData.read((x, y)).cast(torch.float64)
    with pytest.raises(ModelError, match=message):
        sample_gradients(model, layers, data, forward, np.arange(4).reshape(4, 1))


@pytest.mark.parametrize("method", ["outer", "vmap", "loop"])
def test_a_target_out_of_range_among_many_is_refused(method: str) -> None:
    model, layers, _, forward = setting(Mlp)
    x, y = inputs_for(Mlp, 8)
    y[6] = 11
    with pytest.raises(ModelError, match="range of the targets"):
        sample_gradients(
            model, layers, CalibrationData.read((x, y)), forward, np.arange(8).reshape(8, 1), method=method
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cls", NETWORKS)
def test_cuda_rows_are_those_of_the_cpu(cls: type[nn.Module]) -> None:
    model, layers, data, forward = setting(cls)
    index = data.draw(6, 2, 0)
    expected = oracle_rows(model, layers, forward, data, index) / math.sqrt(6)
    model.cuda()
    found = sample_gradients(model, layers, data, forward, index, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(found.factor.cpu(), expected, rtol=1e-8, atol=1e-11)
