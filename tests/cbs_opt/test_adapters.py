"""Every kind of layer as a matrix: its rows times its inputs is its output, and its rows' gradients autograd's."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import cbs_opt
from cbs_opt.network import adapters
from cbs_opt.network.adapters import adapter_of
from tests.cbs_opt.transformers import Conv1D


def leaves(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, PackedSequence):
        yield tree.data
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from leaves(part)


def like(tree: object, values: Iterator[Tensor]) -> object:
    """The tree with its tensors replaced."""
    if isinstance(tree, PackedSequence):
        return tree._replace(data=next(values))
    if isinstance(tree, (tuple, list)):
        return tuple(like(part, values) for part in tree)
    return next(values) if isinstance(tree, Tensor) else tree


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "2d": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 2, 7, 8)),
    "3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=1, groups=2), (2, 2, 3, 4, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(5, 5, 3, groups=5), (2, 5, 6, 4)),
    "circular": (nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), (2, 2, 6)),
    "valid": (nn.Conv1d(2, 4, 3, padding="valid"), (2, 2, 6)),
    "alone": (nn.Conv2d(2, 3, 2), (2, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (0, 1), (1, 0), 2, dilation=(2, 1)), (2, 4, 4, 3)),
    "transposed 3d": (nn.ConvTranspose3d(2, 2, 2, stride=2, groups=2, bias=False), (1, 2, 2, 3, 2)),
    "transposed, more padding than kernel": (nn.ConvTranspose1d(2, 3, 1, stride=3, padding=2), (2, 2, 6)),
}
SIMPLE = {
    **CONVOLUTIONS,
    "linear": (nn.Linear(4, 3), (2, 5, 4)),
    "vectors": (nn.Linear(4, 3, bias=False), (4,)),
    "transformers": (Conv1D(3, 4), (2, 5, 4)),
}


@pytest.mark.parametrize("name", SIMPLE)
def test_rows_times_the_matrix_are_the_output(name: str) -> None:
    module, shape = SIMPLE[name]
    module.double()
    x = torch.randn(shape, dtype=torch.float64)
    bias = 0 if module.bias is None else module.bias
    output = module(x)
    adapter = adapter_of(module)
    (weight,) = adapter.weights(module)
    view = adapter.view(module, weight)
    (found,) = adapter.input_rows(module, (x,), {})[weight]
    matrix = view.flatten(module.weight).view(view.groups, view.rows // view.groups, view.inputs)
    products = (found @ matrix.mT).movedim(0, 1).flatten(1)
    # Samples, then places, then channels.
    last = "Conv1d" in type(module).__name__ or name in CONVOLUTIONS
    dimensions = module.weight.ndim - 2 if last else 0
    batched = output if output.ndim == dimensions + 2 or not last else output.unsqueeze(0)
    flat = (batched.movedim(1, -1) if last else batched).reshape(-1, view.rows)
    assert view.groups == getattr(module, "groups", 1)
    torch.testing.assert_close(products + bias, flat)


def test_a_transposed_convolution_of_an_asked_size() -> None:
    module = nn.ConvTranspose1d(2, 3, 3, stride=3).double()
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    (found,) = adapter_of(module).input_rows(module, (x,), {"output_size": [14]})["weight"]
    assert found.shape == (1, 2 * 14, 6)


def test_views_flatten_and_unflatten_with_leading_dimensions() -> None:
    module = nn.ConvTranspose2d(4, 6, (3, 2), groups=2)
    view = adapter_of(module).view(module, "weight")
    stack = torch.randn(5, *view.shape)
    flat = view.flatten(stack)
    assert flat.shape == (5, view.n) and (view.rows, view.inputs) == (6, 12)
    assert torch.equal(view.unflatten(flat), stack)
    # Row r = (group 1, output 2): channels 2 and 3 of the input.
    assert torch.equal(flat[0].view(6, 2, 6)[5].flatten(), stack[0, 2:, 2].flatten())
    assert view.flatten(stack[0]).shape == (view.n,)


def attention_calls() -> dict[str, tuple[nn.Module, tuple, dict]]:
    def r(*s: int) -> Tensor:
        return torch.randn(*s, dtype=torch.float64)

    x, y = r(2, 5, 8), r(2, 3, 8)
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    first = {"batch_first": True}
    return {
        "self": (nn.MultiheadAttention(8, 2, **first), (x, x, x), {}),
        "places first": (nn.MultiheadAttention(8, 2), (x, x, x), {"need_weights": False}),
        "cross": (nn.MultiheadAttention(8, 2, bias=False, **first), (x, y, y), {}),
        "padded": (nn.MultiheadAttention(8, 2, **first), (x, x, x), {"key_padding_mask": hidden}),
        "causal": (nn.MultiheadAttention(8, 2, **first), (x, x), {"value": x, "attn_mask": causal, "is_causal": True}),
        "more keys": (nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True, **first), (x, y, y), {}),
        "separate": (nn.MultiheadAttention(8, 2, kdim=6, vdim=7, **first), (x, r(2, 4, 6), r(2, 4, 7)), {}),
        "alone": (nn.MultiheadAttention(8, 2, **first), (x[0], x[0], x[0]), {}),
    }


def recurrent_calls() -> dict[str, tuple[nn.Module, tuple, dict]]:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    state = torch.randn(4, 4, 6, dtype=torch.float64)
    packed = pack_sequence([x[:2, 0], x[:, 1], x[:1, 2]], enforce_sorted=False)
    both = {"num_layers": 2, "bidirectional": True}
    return {
        "lstm": (nn.LSTM(5, 6), (x,), {}),
        "lstm, samples first": (nn.LSTM(5, 6, num_layers=2, batch_first=True), (x,), {}),
        "lstm with states": (nn.LSTM(5, 6, **both), (x, (state, state + 1)), {}),
        "projected": (nn.LSTM(5, 6, proj_size=3, bias=False, **both), (x,), {}),
        "gru": (nn.GRU(5, 6, **both), (x,), {"hx": state}),
        "gru, one sequence": (nn.GRU(5, 6), (x[:, 0],), {}),
        "rnn": (nn.RNN(5, 6, batch_first=True), (x,), {}),
        "relu": (nn.RNN(5, 6, nonlinearity="relu", **both), (x,), {}),
        "packed lstm": (nn.LSTM(5, 6, **both), (packed,), {}),
        "packed gru": (nn.GRU(5, 6, **both), (packed, state[:, :3]), {}),
    }


EMBEDDING = {"embedding": (nn.Embedding(7, 3), (torch.randint(0, 7, (2, 5)),), {})}
CALLS = {
    **{name: (module, (torch.randn(shape, dtype=torch.float64),), {}) for name, (module, shape) in SIMPLE.items()},
    **attention_calls(),
    **recurrent_calls(),
    **EMBEDDING,
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", CALLS)
def test_gradient_rows_and_input_rows_make_the_gradient_of_autograd(name: str, frozen: bool) -> None:
    module, args, kwargs = CALLS[name]
    module.double().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    adapter = adapter_of(module)
    weights = {attribute: attrgetter(attribute)(module) for attribute in adapter.weights(module)}
    output = module(*args, **kwargs)
    ends = list(leaves(output))
    directions = [torch.randn_like(end) for end in ends]
    expected = torch.autograd.grad(ends, list(weights.values()), directions, allow_unused=True)
    for parameter in module.parameters():
        parameter.requires_grad_(not frozen)
    seen = adapter.input_rows(module, args, kwargs)
    gradients = adapter.output_gradient_rows(module, args, kwargs, like(output, iter(directions)))
    assert list(seen) == list(gradients) and set(seen) == set(weights)
    for (attribute, weight), wanted in zip(weights.items(), expected, strict=True):
        view = adapter.view(module, attribute)
        pairs = list(zip(seen[attribute], gradients[attribute], strict=True))
        assert not any(x.requires_grad or g.requires_grad for x, g in pairs)
        matrix = torch.cat([(g.mT @ x).reshape(-1, view.inputs) for x, g in pairs])
        assert sum(len(x) for x, _ in pairs) == view.groups and matrix.shape == (view.rows, view.inputs)
        torch.testing.assert_close(view.unflatten(matrix.reshape(-1)), wanted)
        assert view.shape == tuple(weight.shape)


@pytest.mark.parametrize("name", ["places first", "lstm, samples first", "lstm"])
def test_positions_of_replays_have_the_samples_first(name: str) -> None:
    module, args, kwargs = CALLS[name]
    rows = next(iter(adapter_of(module.double()).input_rows(module, args, kwargs).values()))[0]
    x = args[0] if module.batch_first else args[0].transpose(0, 1)
    assert torch.equal(rows[0], x.reshape(-1, x.shape[-1]))


def test_the_gradient_of_the_first_tensor_alone() -> None:
    module, args, _ = CALLS["lstm"]
    adapter = adapter_of(module.double().requires_grad_())
    output, _ = module(*args)
    (wanted,) = torch.autograd.grad(output.sum(), [module.weight_hh_l0])
    x = adapter.input_rows(module, args, {})["weight_hh_l0"][0]
    g = adapter.output_gradient_rows(module, args, {}, torch.ones_like(output))["weight_hh_l0"][0]
    torch.testing.assert_close((g.mT @ x)[0], wanted)


def test_third_parties_register_kinds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the example of the documentation."""
    monkeypatch.setattr(adapters, "_ADAPTERS", list(adapters._ADAPTERS))
    text = (Path(__file__).parents[2] / "docs" / "writing_a_layer.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("cbs_opt.register_layer", "#"), names)
    model = nn.Sequential(names["Experts"](2, 3, 4), nn.Flatten(), nn.Linear(24, 2)).double()
    before = cbs_opt.find_layers(model)
    assert before.names == ("2",) and "register_layer" in before.skipped[0].reason
    adapter = names["ExpertsAdapter"]()
    cbs_opt.register_layer(adapter)
    x, y = torch.randn(16, 3, 3, dtype=torch.float64), torch.randint(0, 2, (16,))
    module = model[0]
    output = module(x)
    direction = torch.randn_like(output)
    (wanted,) = torch.autograd.grad(output, [module.w], direction)
    (seen,) = adapter.input_rows(module, (x,), {})["w"]
    (gradients,) = adapter.output_gradient_rows(module, (x,), {}, direction)["w"]
    view = adapter.view(module, "w")
    torch.testing.assert_close(view.unflatten((gradients.mT @ seen).reshape(-1)), wanted)
    result = cbs_opt.prune(model, [(x, y)], F.cross_entropy, sparsity=0.5, solver="obd")
    assert result.layers.names == ("0.w", "2") and result.layers["0.w"].kind == "Experts"
    assert int((result.model[0].w == 0).sum()) + int((result.model[2].weight == 0).sum()) == 36
    with pytest.raises(cbs_opt.OptionError, match="LayerAdapter"):
        cbs_opt.register_layer(module)
