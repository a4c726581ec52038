"""The loss of one sample must be the loss of a batch: refused, or said, where it is not; and right rows in any case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.data.calibration import CalibrationData
from cbs_opt.data.forward import Forward
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.gradients import sample_gradients
from cbs_opt.network.finding import find_layers
from solvers.errors import CBSError, DataError, ModelError

WEIGHT = torch.tensor([0.2, 1.0, 4.0])


def net(outputs: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).eval()


def labels(n: int = 48, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def rare(n: int = 48) -> tuple[Tensor, Tensor]:
    """One sample of another class."""
    x, y = labels(n)
    y.zero_()[n - 1] = 2
    return x, y


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def dice(z: Tensor, y: Tensor) -> Tensor:
    p, t = z.softmax(1), F.one_hot(y, 3)
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def ohem(z: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(z, y, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


LOSSES = {
    "class weights": lambda z, y: F.cross_entropy(z, y, WEIGHT),
    "contrastive": contrastive,
    "root mean square": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()).sqrt(),
    "dice": dice,
    "hard examples": ohem,
    "softmax over the batch": lambda z, y: -(z.softmax(0)[torch.arange(len(y)), y] + 1e-3).log().mean(),
    "distance from the mean": lambda z, y: (
        (F.cross_entropy(z, y, reduction="none") - F.cross_entropy(z, y)).abs().mean()
    ),
    "variance": lambda z, y: F.cross_entropy(z, y) - z.var(0, unbiased=False).mean(),
    "maximum": lambda z, y: F.cross_entropy(z, y, reduction="none").max(),
    "divided by a constant": lambda z, y: F.cross_entropy(z, y, reduction="sum") / 32,
    "hinge in sum": lambda z, y: F.multi_margin_loss(z, y, margin=0.05, reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_losses_that_are_no_means_are_refused(name: str, seed: int) -> None:
    with pytest.raises(ModelError, match=r"mean|sums|broadcast"):
        cbs_opt.prune(net(seed=seed), labels(), LOSSES[name], sparsity=0.5, seed=seed, solver="obd")


def test_class_weights_are_noticed_where_nearly_all_samples_are_of_one_class() -> None:
    with pytest.raises(ModelError, match="mean"):
        cbs_opt.prune(net(), rare(), LOSSES["class weights"], sparsity=0.5)


@pytest.mark.parametrize("name", ["class weights", "contrastive", "root mean square", "dice", "hard examples"])
def test_rows_of_batches_stand_for_batches_and_it_is_said(name: str) -> None:
    fisher = FisherOptions(n_rows=4, batch_size=8)
    result = cbs_opt.prune(net(), labels(), LOSSES[name], sparsity=0.5, fisher=fisher, solver="obd")
    assert any("batches of 8" in repair for repair in result.report.repairs)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_targets_broadcast_against_outputs_are_refused(batch_size: int) -> None:
    x, _ = labels()
    with pytest.raises(ModelError, match=r"broadcast.*unsqueeze"), pytest.warns(UserWarning):
        cbs_opt.prune(
            net(1), (x, x.sum(1)), nn.MSELoss(), sparsity=0.5, fisher=FisherOptions(n_rows=8, batch_size=batch_size)
        )


MEANS = {
    "cross entropy": F.cross_entropy,
    "weights, a mean over samples": lambda z, y: (WEIGHT[y] * F.cross_entropy(z, y, reduction="none")).mean(),
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "hinge": F.multi_margin_loss,
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).float()),
    "tiny": lambda z, y: 1e-6 * F.cross_entropy(z, y),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_taken(name: str) -> None:
    for data in (labels(), rare()):
        result = cbs_opt.prune(net(), data, MEANS[name], sparsity=0.5, solver="obd")
        assert not any("mean" in repair for repair in result.report.repairs)


def test_a_loss_that_does_not_depend_on_the_network_in_value_is_refused() -> None:
    def constant(z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y)
        return loss - loss.detach()

    with pytest.raises(ModelError, match="whatever the sample"):
        cbs_opt.prune(net(), labels(), constant, sparsity=0.5)


def test_an_ignored_sample_is_named_with_its_remedy() -> None:
    x, y = labels()
    y[7] = -100
    with pytest.raises(ModelError, match=r"sample 7 is nan.*ignore_index"):
        cbs_opt.prune(net(), (x, y), F.cross_entropy, sparsity=0.5)


@pytest.mark.parametrize("where", ["forward", "loss"])
def test_what_user_code_raises_is_the_cause_and_names_the_samples(where: str) -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            _ = 1 / (0 if where == "forward" and bool((x > 2).any()) else 1)
            return super().forward(x)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        _ = 1 / (0 if where == "loss" and bool((y == 2).any()) else 1)
        return F.cross_entropy(z, y)

    with pytest.raises(ModelError, match=r"samples? \d+.*ZeroDivisionError") as caught:
        cbs_opt.prune(Broken(6, 3).eval(), labels(), loss, sparsity=0.5)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Scaled(nn.Module):
    """Takes bytes for images where it sees large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 1:
            x = x / 255
        return self.fc2(torch.tanh(self.fc1(x)))


class Gru(nn.Module):
    """Two layers, and its state beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(6, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, state = self.rnn(x)
        return self.fc(found[:, -1]), state


def _rows(model: nn.Module, x: Tensor, y: Tensor, loss) -> tuple[Tensor, list[Tensor]]:
    layers = find_layers(model)
    oracle = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), layers.parameters(model))
        oracle.append(
            torch.cat([layer.view.flatten(g).reshape(-1) for layer, g in zip(layers, gradients, strict=True)])
        )
    data = CalibrationData.read((x, y))
    return torch.stack(oracle) / len(x) ** 0.5, sample_gradients(
        model, layers, data, Forward(model, loss), np.arange(len(x)).reshape(-1, 1)
    )


@pytest.mark.parametrize("often", [0.5, 0.05, 0.01])
def test_forwards_that_depend_on_the_data_are_taken_one_by_one_and_it_is_said(often: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, 6, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    x[torch.randperm(200, generator=generator)[: int(200 * often)]] *= 255
    torch.manual_seed(0)
    oracle, found = _rows(Scaled().eval(), x, y, F.cross_entropy)
    torch.testing.assert_close(found.factor, oracle, rtol=1e-4, atol=1e-7)
    assert found.method == "loop" and any("outer" in note for note in found.notes)


def test_states_beside_the_output_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 4, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    torch.manual_seed(0)
    oracle, found = _rows(Gru().eval(), x, y, lambda out, t: F.cross_entropy(out[0], t))
    torch.testing.assert_close(found.factor, oracle, rtol=1e-4, atol=1e-7)
    assert found.method == "loop" and len(found.notes) == 2


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) + self.b(right)


def test_networks_of_two_inputs_say_how_they_are_called() -> None:
    x, y = labels()
    with pytest.raises(CBSError, match="dict of them by name"):
        cbs_opt.prune(TwoInputs().eval(), [(x, y)], F.cross_entropy, sparsity=0.5)
    result = cbs_opt.prune(TwoInputs().eval(), [({"left": x, "right": x}, y)], F.cross_entropy, sparsity=0.5)
    assert result.report.n_kept == 18


def test_wrapped_networks_take_the_entries_they_name() -> None:
    x, y = labels()
    batches = [{"left": x, "right": x, "labels": y}]
    loss = lambda z, batch: F.cross_entropy(z, batch["labels"])  # noqa: E731
    torch.manual_seed(0)
    plain = TwoInputs().eval()
    expected = cbs_opt.prune(plain, batches, loss, sparsity=0.5)
    found = cbs_opt.prune(nn.DataParallel(plain), batches, loss, sparsity=0.5)
    assert np.array_equal(found.pruned, expected.pruned)
    assert Forward(torch.compile(plain), loss).names == Forward(plain, loss).names


def test_endless_data_are_refused() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            x, y = labels()
            while True:
                yield x, y

    options = cbs_opt.CalibrationOptions(n_samples=64)
    with pytest.raises(DataError, match="order='first'"):
        cbs_opt.prune(net(), Endless(), F.cross_entropy, sparsity=0.5, calibration=options)
    options = cbs_opt.CalibrationOptions(n_samples=64, order="first")
    assert cbs_opt.prune(net(), Endless(), F.cross_entropy, sparsity=0.5, calibration=options).report.n_rows == 64
