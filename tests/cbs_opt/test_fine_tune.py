"""Fine-tuning: masks to the bit, momentum included, early stop, schedules, resuming, what is refused, what is said."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt import CalibrationData, DataError, Distillation, FineTune, FisherOptions, ModelError, OptionError
from cbs_opt.data.training_batches import TrainingBatches
from cbs_opt.engine.fine_tune import OPTIMIZERS
from cbs_opt.engine.masked_training import MaskedOptimiser, TrainedWeights
from cbs_opt.engine.plan import Plan, Prune, Train
from cbs_opt.report.report import PruneReport
from solvers.errors import CheckpointError, OutputError, UnknownNameError

WAYS: dict[str, dict[str, Any]] = {
    "none": {"curvature": "none", "solver": "magnitude", "update": "none"},
    "fisher": {"curvature": "fisher", "fisher": FisherOptions(n_rows=60), "solver": "obs", "update": "combinatorial"},
    "stages": {"curvature": "fisher", "stages": 3, "solver": "obs", "update": "combinatorial"},
    "layer_inputs": {"curvature": "layer_inputs", "solver": "sweep", "update": "own"},
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).eval()


def normed() -> nn.Sequential:
    """With batch norm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 4)).eval()


def samples(n: int = 400) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return x, mlp()(x).mul(4).argmax(1)


def tuned(model: nn.Module | None = None, finetune: FineTune | None = None, **more: Any) -> cbs_opt.PruneResult:
    settings = {"sparsity": 0.7, "device": "cpu", **WAYS["none"], **more}
    options = finetune or FineTune(epochs=3, batch_size=16)
    return cbs_opt.prune(model or mlp(), samples(), F.cross_entropy, finetune=options, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_pruning_is_followed_by_training_under_its_masks(way: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    options = FineTune(epochs=30 if way == "stages" else 4, batch_size=16)
    result, again = (tuned(model, options, **WAYS[way]) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(result.weights, again.weights) and np.array_equal(result.pruned, again.pruned)
    done, report = result.report.finetune, result.report
    assert done is not None and done.steps_taken == done.steps == options.n_steps(done.n_samples / 16)
    # In stages the first loss is that of a lower sparsity.
    assert 0 < done.steps_kept <= done.steps and (way == "stages" or done.loss_after < done.loss_before)
    for name, mask in result.masks.items():
        stored = result.model.get_submodule(name).parametrizations.weight.original.detach()
        assert not any(stored[~mask].numpy().tobytes())
    assert report.n_kept == np.count_nonzero(~result.pruned) and "fine-tuning" in str(report)
    assert not torch.equal(result.model[0].bias, model[0].bias) and not result.model.training
    loss = F.cross_entropy(result.model(samples()[0]).detach(), samples()[1])
    assert report.loss_pruned == pytest.approx(float(loss), rel=1e-5)
    if way == "stages":
        assert [record.kind for record in result.stages] == ["prune", "train"] * 3 and report.stages == 3
        assert sum(record.steps for record in result.stages) == done.steps and math.isnan(report.loss_untuned)
    else:
        assert report.loss_pruned < report.loss_untuned
        plain = cbs_opt.prune(mlp(), samples(), F.cross_entropy, sparsity=0.7, device="cpu", **WAYS[way])
        assert np.array_equal(plain.pruned, result.pruned)
        assert report.loss_untuned == pytest.approx(plain.report.loss_pruned)
    for row in report.layers:
        norm = float(result.model.get_submodule(row.name).weight.detach().norm())
        assert row.norm_after == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_are_zero_after_every_step_and_momentum_holds_none_of_them(optimizer: str) -> None:
    model, (x, y) = mlp(), samples()
    layers = cbs_opt.find_layers(model)
    pruned = np.random.default_rng(0).random(layers.n) < 0.6
    layers.zero(model, pruned)
    weights = TrainedWeights(model, layers, pruned, "all")
    options = FineTune(steps=20, optimizer=optimizer, weight_decay=0.1)
    inner = options.optimiser(weights.masters)
    steps = MaskedOptimiser(weights, inner, lambda done: options.rate(done, 20))
    gone = {id(w): g for w, g in zip(weights.masters, weights._masks, strict=True)}
    for _ in range(20):
        with weights.differentiable():
            F.cross_entropy(model(x), y).backward()
            assert steps.step(1.0)
        assert not any(layers.read(model).numpy()[pruned].tobytes())
        for parameter, state in inner.state.items():
            mask = gone[id(parameter)]
            assert mask is None or all(
                not any(value[mask].numpy().tobytes())
                for value in state.values()
                if isinstance(value, Tensor) and value.shape == mask.shape
            )


def test_sgd_is_that_of_torch_on_the_weights_that_stay() -> None:
    """One pass in one batch per step against a loop of one's own with masks as parametrisations."""
    data = samples(200)
    options = FineTune(steps=15, lr=0.1, batch_size=1000, clip=0, evaluations=15, weight_decay=0.01)
    result = tuned(mlp(), options)
    held = result.report.finetune
    assert held is not None and held.steps_kept == 15
    batches = TrainingBatches(CalibrationData(*samples(), 400), 1000, 0.1, 0)
    model = cbs_opt.apply_masks(mlp(), result.masks)
    params = [{"params": [model[0].parametrizations.weight.original, model[2].parametrizations.weight.original]}]
    params += [{"params": [model[0].bias, model[2].bias], "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for step, ((x, y, _),) in zip(range(15), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 15))
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert torch.allclose(model(data[0]), result.model(data[0]), atol=1e-5)


def test_batch_norms_follow_and_dropout_drops_in_train_mode_alone() -> None:
    for train in (True, False):
        model = normed()
        result = tuned(model, FineTune(epochs=2, batch_size=16, train_mode=train))
        moved = not torch.equal(result.model[1].running_mean, model[1].running_mean)
        assert moved == train and torch.equal(model[1].running_mean, torch.zeros(24))
        assert not any(result.model.get_submodule(name).training for name, _ in model.named_modules())
    frozen = normed()
    frozen[1].weight.requires_grad_(False)
    result = tuned(frozen, FineTune(epochs=1))
    assert torch.equal(result.model[1].weight, torch.ones(24)) and not result.model[1].weight.requires_grad
    layers = tuned(normed(), FineTune(epochs=1, parameters="layers"))
    assert torch.equal(layers.model[0].bias, normed()[0].bias)


def test_patience_stops_and_the_best_state_is_kept() -> None:
    result = tuned(None, FineTune(epochs=200, lr=0.5, schedule="constant", batch_size=16, evaluations=100, patience=3))
    done = result.report.finetune
    assert done is not None and done.steps_taken < done.steps and done.steps_kept < done.steps_taken
    held = TrainingBatches(CalibrationData(*samples(), 400), 16, 0.1, 0).held_out
    (x, y, _) = held[0]
    assert float(F.cross_entropy(result.model(x), y).detach()) == pytest.approx(done.loss_after, rel=1e-5)
    # Each look that found nothing better is 22 or 23 steps apart.
    assert done.steps_taken - done.steps_kept <= 3 * 23 * 2


@pytest.mark.parametrize("way", ["none", "stages"])
def test_a_training_that_diverges_ends_in_the_best_state_and_says_so(way: str) -> None:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().exp()

    model = nn.Sequential(mlp(), Exp()).eval()
    result = tuned(model, FineTune(epochs=4, lr=1e5, batch_size=16, schedule="constant"), **WAYS[way])
    report = result.report
    assert np.isfinite(result.weights).all() and math.isfinite(report.loss_pruned)
    assert (
        report.finetune is not None and report.finetune.loss_after <= report.finetune.loss_before
    ) or way == "stages"
    assert any("not finite" in warning and "smaller lr" in warning for warning in report.warnings)
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_steps_that_gain_nothing_leave_the_network_and_are_said() -> None:
    plain = cbs_opt.prune(mlp(), samples(), F.cross_entropy, sparsity=0.7, device="cpu", **WAYS["none"])
    result = tuned(None, FineTune(steps=5, lr=1e3, schedule="constant"))
    assert np.array_equal(result.weights, plain.weights)
    assert any("fine-tuning gained nothing" in warning for warning in result.report.warnings)


def test_an_optimiser_and_a_schedule_of_ones_own() -> None:
    seen: list[float] = []

    def halved(done: float) -> float:
        seen.append(done)
        return 0.5

    own = FineTune(steps=10, optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.02), schedule=halved)
    result = tuned(None, own)
    named = tuned(None, FineTune(steps=10, optimizer="adam", lr=0.01, schedule="constant"))
    assert np.allclose(result.weights, named.weights, atol=1e-7) and seen == [i / 10 for i in range(10)]
    done = result.report.finetune
    assert done is not None and "lambda" in done.optimizer and math.isnan(done.lr)


def test_distillation_takes_the_dense_networks_outputs() -> None:
    options = FineTune(epochs=20, batch_size=32, distill=1.0, temperature=1.0)
    result = tuned(None, options)
    x = samples()[0]
    dense = mlp()(x).log_softmax(1)
    apart = [
        float(F.kl_div(net(x).log_softmax(1), dense, log_target=True, reduction="batchmean").detach())
        for net in (result.model, tuned(None, FineTune(epochs=20, batch_size=32)).model)
    ]
    assert apart[0] < apart[1]
    given = FineTune(epochs=1, distill=Distillation(0.3, 4.0))
    assert given.distill == 0.3 and given.temperature == 4.0


class Reader(nn.Module):
    """Tokens to logits; the loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 9)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.up(self.embed(input_ids))))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("curvature", ["none", "layer_inputs"])
def test_dict_batches_and_networks_with_losses_of_their_own(curvature: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (64, 7))
    data = [{"input_ids": ids[i : i + 8], "labels": (ids[i : i + 8] + 1) % 9} for i in range(0, 64, 8)]
    solver = {"none": "magnitude", "layer_inputs": "sweep"}[curvature]
    result = cbs_opt.prune(
        Reader().eval(),
        data,
        lambda output, batch: output["loss"],
        sparsity=0.5,
        curvature=curvature,
        solver=solver,
        update="none" if curvature == "none" else "own",
        finetune=FineTune(epochs=10, optimizer="adamw", lr=0.01, batch_size=8, distill=0.1),
        device="cpu",
    )
    done = result.report.finetune
    assert done is not None and done.loss_after < 0.7 * done.loss_before
    assert done.steps == round(10 * done.n_samples / 8)
    assert cbs_opt.check(result.model, result.masks).ok


def test_augmentation_sees_each_step_once_and_keeps_shapes() -> None:
    calls: list[tuple[int, ...]] = []

    def noise(inputs: Any, generator: torch.Generator) -> Tensor:
        calls.append(tuple(inputs.shape))
        return inputs + 0.01 * torch.randn(inputs.shape, generator=generator)

    one, other = (tuned(None, FineTune(steps=12, batch_size=16, augment=noise)) for _ in range(2))
    assert np.array_equal(one.weights, other.weights) and calls == [(16, 6)] * 24
    with pytest.raises(OptionError, match="shapes"):
        tuned(None, FineTune(steps=2, augment=lambda inputs, generator: inputs[:1]))
    with pytest.raises(OptionError, match="augment fails"):
        tuned(None, FineTune(steps=2, augment=lambda inputs, generator: inputs.no_such))


@pytest.mark.parametrize("way", ["none", "layer_inputs"])
def test_what_a_caller_has_switched_on_does_not_count(way: str) -> None:
    expected = tuned(None, FineTune(steps=6, batch_size=16), **WAYS[way])
    state = torch.random.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = tuned(None, FineTune(steps=6, batch_size=16), **WAYS[way])
        assert torch.equal(torch.random.get_rng_state(), state) or way == "layer_inputs"
    assert np.array_equal(found.weights, expected.weights)
    assert expected.report.finetune is not None and expected.report.finetune.steps_kept > 0


def test_schedules_go_from_the_first_length_to_nothing() -> None:
    for name, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        options = FineTune(steps=10, schedule=name)
        assert options.rate(0, 10) == 1.0 and options.rate(5, 10) == pytest.approx(middle)
        assert [FineTune(steps=10, schedule=name, warmup=0.2).rate(t, 10) for t in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert FineTune(epochs=0.5).n_steps(7.0) == 4 and FineTune(epochs=0.01).n_steps(7.0) == 1
    assert FineTune.of(2) == FineTune(epochs=2)


def test_gradual_plans_share_the_steps_and_prune_cubically() -> None:
    options = cbs_opt.StageOptions(n_stages=4)
    plan = Plan.staged(options, n=1000, n_kept=100, finetune=FineTune(epochs=1, final=0.4))
    counts = [step.n_kept for step in plan.steps if isinstance(step, Prune)]
    assert counts == [100 + int(900 * (1 - t / 4) ** 3) for t in (1, 2, 3)] + [100]
    parts = [(step.begin, step.end) for step in plan.steps if isinstance(step, Train)]
    assert parts == [pytest.approx(pair) for pair in ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 1.0))]
    assert plan.n_stages == 4 and len(plan.steps) == 8
    untrained = Plan.staged(options, n=1000, n_kept=100)
    assert len(untrained.steps) == 9 and untrained.steps[0] == Prune(562)
    own = cbs_opt.StageOptions(n_stages=2, n_polish=1, schedule="linear")
    kinds = [type(s).__name__ for s in Plan.staged(own, n=10, n_kept=2, finetune=FineTune(steps=1)).steps]
    assert kinds == ["Prune", "Train", "Prune", "Train", "Polish", "Train"]


def test_stages_do_not_measure_on_what_training_holds_out() -> None:
    seen: set[int] = set()
    x, y = samples()
    x = torch.cat([x[:, :5], torch.arange(400.0)[:, None] / 400], 1)

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not torch._C._functorch.is_functorch_wrapped_tensor(x):
                seen.update((x[:, 5] * 400).round().int().tolist())
            return super().forward(x)

    held = TrainingBatches(CalibrationData(x, y, 400), 128, 0.1, 0).held_index
    assert held is not None and len(held) == 40
    model = Watched(*mlp()).eval()
    options = FisherOptions(batch_size=16, method="loop")
    cbs_opt.prune(
        model,
        (x, y),
        F.cross_entropy,
        sparsity=0.7,
        stages=2,
        fisher=options,
        finetune=FineTune(epochs=2),
        device="cpu",
    )
    assert len(seen) == 360 and not seen & set(held.tolist())


# -- resuming ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopper(at: int) -> Callable[[int, int], None]:
    """Ends a run at its n-th report of progress."""
    left = [at]

    def tick(done: int, total: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    return tick


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_goes_on_to_the_same_bits(way: str, optimizer: str, tmp_path: Path) -> None:
    options = FineTune(epochs=4, batch_size=16, optimizer=optimizer, checkpoint_every=7)
    alone = tuned(normed(), options, **WAYS[way])
    for number, at in enumerate((3, 30, 55, 80)):
        with pytest.raises(Stop):
            tuned(normed(), options, **WAYS[way], journal=tmp_path / "journal", progress=stopper(at - 25 * number))
    result = tuned(normed(), options, **WAYS[way], journal=tmp_path / "journal")
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    one, other = alone.report.finetune, result.report.finetune
    assert one is not None and other is not None
    names = ("steps", "steps_taken", "steps_kept", "loss_before", "loss_after", "n_samples", "evaluations")
    assert all(getattr(one, name) == getattr(other, name) for name in names)
    assert result.report.loss_pruned == alone.report.loss_pruned
    assert any("journal" in repair for repair in result.report.repairs)
    # What is finished stays finished.
    again = tuned(normed(), options, **WAYS[way], journal=tmp_path / "journal")
    assert np.array_equal(again.weights, alone.weights)


@pytest.mark.parametrize(
    "change",
    [
        {"finetune": FineTune(epochs=2, batch_size=16, lr=0.01)},
        {"sparsity": 0.6},
        {"seed": 1},
        {"model": normed()},
    ],
)
def test_a_journal_of_another_run_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    given = {"model": mlp(), "finetune": FineTune(epochs=2, batch_size=16), "journal": tmp_path / "journal"}
    with pytest.raises(Stop):
        tuned(**given, progress=stopper(30))
    with pytest.raises(OutputError, match="another run"):
        tuned(**{**given, **change})


def test_damaged_trainings_are_refused(tmp_path: Path) -> None:
    given = {"finetune": FineTune(epochs=2, batch_size=16, checkpoint_every=5), "journal": tmp_path}
    with pytest.raises(Stop):
        tuned(**given, progress=stopper(30))
    (state,) = tmp_path.glob("training-*.safetensors")
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="remove the folder"):
        tuned(**given)
    state.unlink()
    with pytest.raises(CheckpointError, match="remove the folder"):
        tuned(**given)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match="remove the folder"):
        tuned(**given)


_RUN = """
import hashlib, os, signal, sys
import torch
from torch.nn import functional as F
import cbs_opt
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5)).eval()
data = torch.randn(600, 20), torch.randint(0, 5, (600,))
left = int(sys.argv[2])
def tick(done, total):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
result = cbs_opt.prune(
    model, data, F.cross_entropy, sparsity=0.9, solver="obs", stages=int(sys.argv[3]),
    journal=sys.argv[1], progress=tick,
    finetune=cbs_opt.FineTune(epochs=3, batch_size=32, checkpoint_every=4), device="cpu",
)
print(hashlib.sha256(result.weights.tobytes() + result.pruned.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("stages", [1, 3])
def test_a_killed_process_resumes_to_the_same_bits(stages: int, tmp_path: Path) -> None:
    def run(folder: str, kill: int) -> tuple[int, str]:
        command = [sys.executable, "-c", _RUN, str(tmp_path / folder), str(kill), str(stages)]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
        return done.returncode, done.stdout.strip()

    code, expected = run("alone", 0)
    assert code == 0
    assert run("killed", 13)[0] == -signal.SIGKILL
    assert run("killed", 9)[0] == -signal.SIGKILL
    assert run("killed", 0) == (0, expected)
    assert not [path for path in (tmp_path / "killed").rglob(".*") if path.name != ".lock"]


def test_an_optimiser_whose_state_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["history"] = [p.clone()]

    options = FineTune(steps=6, optimizer=lambda tensors: Odd(tensors, lr=0.01))
    assert tuned(None, options).report.finetune is not None
    with pytest.raises(OptionError, match="journal cannot hold"):
        tuned(None, options, journal=tmp_path)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: FineTune(),
        lambda: FineTune(epochs=1, steps=1),
        lambda: FineTune(epochs=0),
        lambda: FineTune(epochs=float("inf")),
        lambda: FineTune(steps=1.5),  # type: ignore[arg-type]
        lambda: FineTune(steps=True),
        lambda: FineTune(epochs=1, lr=float("nan")),
        lambda: FineTune(epochs=1, lr=-1.0),
        lambda: FineTune(epochs=1, lr=1e30),
        lambda: FineTune(epochs=1, schedule="cosin"),
        lambda: FineTune(epochs=1, optimizer="sdg"),
        lambda: FineTune(epochs=1, optimizer=3),  # type: ignore[arg-type]
        lambda: FineTune(epochs=1, optimizer=torch.optim.SGD, lr=0.1),  # type: ignore[arg-type]
        lambda: FineTune(epochs=1, warmup=1.0),
        lambda: FineTune(epochs=1, momentum=1.0),
        lambda: FineTune(epochs=1, weight_decay=-1.0),
        lambda: FineTune(epochs=1, clip=-1.0),
        lambda: FineTune(epochs=1, distill=1.5),
        lambda: FineTune(epochs=1, distill="kl"),  # type: ignore[arg-type]
        lambda: FineTune(epochs=1, temperature=0.0),
        lambda: FineTune(epochs=1, parameters="biases"),
        lambda: FineTune(epochs=1, train_mode=1),  # type: ignore[arg-type]
        lambda: FineTune(epochs=1, augment=3),  # type: ignore[arg-type]
        lambda: FineTune(epochs=1, held_out=0.0),
        lambda: FineTune(epochs=1, held_out=0.9),
        lambda: FineTune(epochs=1, evaluations=0),
        lambda: FineTune(epochs=1, patience=0),
        lambda: FineTune(epochs=1, mixed_precision="fp8"),
        lambda: FineTune(epochs=1, final=0.0),
        lambda: FineTune(epochs=1, checkpoint_every=0),
        lambda: FineTune(epochs=1, batch_size=0),
        lambda: FineTune.of(float("nan")),
        lambda: FineTune.of("3"),  # type: ignore[arg-type]
        lambda: cbs_opt.Choice(sparsity=0.5, finetune="3"),  # type: ignore[arg-type]
        lambda: cbs_opt.Choice(sparsity=0.5, finetune=1, distill=cbs_opt.Distill()),
    ],
)
def test_bad_options_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises((OptionError, UnknownNameError)):
        make()


class Unread:
    """Data that must not be read."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("read")


@pytest.mark.parametrize("way", ["none", "stages", "layer_inputs"])
def test_half_precision_on_a_cpu_is_refused_before_the_data_are_read(way: str) -> None:
    options = FineTune(epochs=1, mixed_precision="fp16")
    with pytest.raises(OptionError, match="CPU"):
        cbs_opt.prune(mlp(), Unread(), F.cross_entropy, sparsity=0.5, finetune=options, device="cpu", **WAYS[way])


def test_bfloat16_on_a_cpu_is_done_and_said() -> None:
    result = tuned(None, FineTune(epochs=3, batch_size=16, mixed_precision="bf16"))
    done = result.report.finetune
    assert done is not None and done.loss_after < done.loss_before
    assert any("bf16 on a CPU" in repair for repair in result.report.repairs)
    assert result.model[0].weight.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mixed precision in halves takes a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu(precision: str) -> None:
    result = tuned(None, FineTune(epochs=3, batch_size=16, mixed_precision=precision), device="cuda")
    assert result.report.finetune is not None and result.report.loss_pruned < result.report.loss_untuned


def test_a_scaled_loss_halves_its_factor_for_gradients_that_overflow() -> None:
    model, (x, y) = mlp(), samples()
    layers = cbs_opt.find_layers(model)
    weights = TrainedWeights(model, layers, np.zeros(layers.n, dtype=bool), "all")
    steps = MaskedOptimiser(weights, torch.optim.SGD(weights.masters, lr=0.1), lambda done: 1.0, None, scaled=True)
    reference, before = copy.deepcopy(model), layers.read(model)
    for factor in (math.inf, 1.0):
        with weights.differentiable():
            (F.cross_entropy(model(x), y) * steps.scale).backward()
            weights.tensors[0].grad.mul_(factor)  # type: ignore[union-attr]
            assert steps.step(1.0)
        if factor == math.inf:
            assert steps.scale == 2.0**15 and torch.equal(layers.read(model), before)
    F.cross_entropy(reference(x), y).backward()
    expected = reference[0].weight - 0.1 * reference[0].weight.grad
    assert torch.allclose(model[0].weight, expected, atol=1e-6)


def test_what_cannot_be_trained_is_refused() -> None:
    once = cbs_opt.CalibrationOptions(n_samples=8, check_passes=False, order="first")
    with pytest.raises(DataError, match="one-shot"):
        cbs_opt.prune(mlp(), iter([samples(8)]), F.cross_entropy, sparsity=0.5, finetune=1, device="cpu")
    with pytest.raises(DataError, match="fine-tuning reads them again"):
        cbs_opt.prune(
            mlp(),
            iter([samples(8)]),
            F.cross_entropy,
            sparsity=0.5,
            finetune=1,
            calibration=once,
            layer_inputs=cbs_opt.LayerInputOptions(segments=False),
            device="cpu",
            **WAYS["layer_inputs"],
        )
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), batch_size=16, shuffle=True)
    with pytest.raises(DataError):
        cbs_opt.prune(mlp(), shuffled, F.cross_entropy, sparsity=0.5, finetune=1, device="cpu", **WAYS["none"])
    with pytest.raises(OptionError, match="trains on a loss"):
        cbs_opt.prune(mlp(), [(samples()[0],)], sparsity=0.5, finetune=1, device="cpu", **WAYS["layer_inputs"])
    with pytest.raises(OptionError, match="journal"):
        cbs_opt.prune(mlp(), samples(), F.cross_entropy, sparsity=0.5, journal="x", device="cpu", **WAYS["none"])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda tensors: None, "must return"),
        (lambda tensors: tensors[99], "fails"),
        (lambda tensors: torch.optim.SGD(mlp().parameters(), lr=0.1), "tensors that it is given"),
        (lambda tensors: torch.optim.LBFGS(tensors), "closure"),
    ],
)
def test_functions_that_make_no_optimiser_are_refused(optimizer: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tuned(None, FineTune(steps=2, optimizer=optimizer))


def test_a_schedule_that_returns_nonsense_is_refused() -> None:
    with pytest.raises(OptionError, match="schedule"):
        tuned(None, FineTune(steps=2, schedule=lambda done: float("nan")))


# -- reports and prepared networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["none", "stages"])
def test_reports_and_folders_come_back(way: str, tmp_path: Path) -> None:
    result = tuned(None, FineTune(epochs=2, batch_size=16), **WAYS[way])
    result.save(tmp_path / "kept")
    loaded = cbs_opt.load(tmp_path / "kept", mlp())
    assert str(loaded.report) == str(result.report) and np.array_equal(loaded.weights, result.weights)
    assert loaded.report.finetune == result.report.finetune and loaded.stages[0].kind == "prune"
    assert PruneReport.load(tmp_path / "kept" / "report.json").finetune == result.report.finetune
    settings = json.loads((tmp_path / "kept" / "settings.json").read_text())
    assert settings["finetune"]["epochs"] == 2 and settings["finetune"]["optimizer"] == "sgd"


def test_a_prepared_network_stays_what_it_was() -> None:
    prepared = cbs_opt.prepare(normed(), samples(), F.cross_entropy, fisher=FisherOptions(n_rows=60), device="cpu")
    options = FineTune(epochs=2, batch_size=16, distill=0.5)
    first, second = (prepared.prune(sparsity=0.7, solver="obs", finetune=options) for _ in range(2))
    plain = prepared.prune(sparsity=0.7, solver="obs")
    assert np.array_equal(first.weights, second.weights) and not np.array_equal(first.weights, plain.weights)
    assert torch.equal(plain.model[1].running_mean, torch.zeros(24))
    masked = prepared.update_masks(plain.masks, update="none", finetune=1)
    assert masked.report.finetune is not None and np.array_equal(masked.pruned, plain.pruned)


def test_a_network_without_weights_to_train_is_refused() -> None:
    class Integers(nn.Module):
        pass

    with pytest.raises(ModelError):
        cbs_opt.prune(Integers(), samples(), F.cross_entropy, sparsity=0.5, finetune=1, device="cpu")


def test_batches_go_on_where_they_were() -> None:
    data = CalibrationData(torch.arange(21.0), None, 21)
    batches = TrainingBatches(data, 6, 0.125, 3)
    drawn = [batch[0].tolist() for _, (batch,) in zip(range(9), batches, strict=False)]  # type: ignore[union-attr]
    later = [batch[0].tolist() for _, (batch,) in zip(range(4), batches.after(5), strict=False)]  # type: ignore[union-attr]
    assert later == drawn[5:] and batches.per_epoch == 19 / 6
