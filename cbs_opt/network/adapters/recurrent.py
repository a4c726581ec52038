"""LSTM, GRU and RNN: W_ih x_t and W_hh h_{t−1} for the gates of a step, and W_hr of a projected LSTM.

    LSTM   i, f, g, o = W_ih x + W_hh h;  c ← σ(f) c + σ(i) tanh(g);  h ← σ(o) tanh(c), or W_hr of that
    GRU    r, z, n = W_ih x, W_hh h;  n = tanh(n_x + σ(r) n_h);  h ← (1 − σ(z)) n + σ(z) h
    RNN    h ← tanh or relu of W_ih x + W_hh h

torch does all steps in one call, so hidden states are found by doing them again one by one, layer by layer. Sequences
are worked on as `PackedSequence` has them: step after step, the samples that have reached it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from cbs_opt.network.adapters.base import Products, Replayed


class RecurrentAdapter(Replayed):
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: any number of layers, both directions, packed or padded sequences."""

    types = (nn.LSTM, nn.GRU, nn.RNN)

    def weights(self, module: nn.Module) -> tuple[str, ...]:
        """``weight_ih_l0``, ``weight_hh_l0``, … in the order of the layers."""
        assert isinstance(module, nn.RNNBase)
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))

    def replay(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Products]]:
        """Layer by layer, direction by direction, step by step."""
        assert isinstance(module, nn.RNNBase)
        values = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
        sequence = _Sequence(module, values["input"], values.get("hx"))
        products: dict[str, Products] = {}
        data = sequence.data
        ends: list[list[Tensor]] = []
        for layer in range(module.num_layers):
            outputs = []
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 2 if module.bidirectional else 1]:
                run = _Run(module, suffix, sequence, [state[len(ends)] for state in sequence.states])
                outputs.append(run(data))
                ends.append(run.states)
                products.update(run.products)
            data = torch.cat(outputs, dim=-1)
        finals = [torch.stack(states) for states in zip(*ends, strict=True)]
        return sequence.output(data, finals), products


class _Sequence:
    """The input of a call as steps, and the way back to the form of its output."""

    def __init__(self, module: nn.RNNBase, x: Tensor | PackedSequence, given: Any) -> None:
        self._module, self._x = module, x
        self.packed = isinstance(x, PackedSequence)
        if isinstance(x, PackedSequence):
            self.data, self.sizes = x.data.detach(), [int(size) for size in x.batch_sizes]
        else:
            self.alone = x.ndim == 2
            steps = x.detach().unsqueeze(1) if self.alone else x.detach()
            steps = steps.transpose(0, 1) if module.batch_first and not self.alone else steps
            self.data, self.sizes = steps.flatten(0, 1), [steps.shape[1]] * steps.shape[0]
        if given is None:
            count = module.num_layers * (2 if module.bidirectional else 1)
            widths = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + isinstance(module, nn.LSTM)]
            self.states = [self.data.new_zeros(count, self.sizes[0], width) for width in widths]
        else:
            states = [s.detach() for s in (given if isinstance(module, nn.LSTM) else (given,))]
            if isinstance(x, PackedSequence) and x.sorted_indices is not None:
                states = [s.index_select(1, x.sorted_indices) for s in states]
            self.states = [s if s.ndim == 3 else s.unsqueeze(1) for s in states]

    def rows(self, x: Tensor) -> Tensor:
        """Steps (positions, d) with samples first, where all have the same length."""
        return x if self.packed else x.reshape(len(self.sizes), -1, x.shape[-1]).transpose(0, 1)

    def probe(self, width: int) -> tuple[Tensor, Tensor]:
        """Zeros to add to a product, whose gradient is the product's: as rows, and as steps."""
        lead = self.rows(self.data).shape[:-1]
        probe = self.data.new_zeros(*lead, width).requires_grad_()
        return probe, probe if self.packed else probe.transpose(0, 1).flatten(0, 1)

    def output(self, data: Tensor, finals: list[Tensor]) -> Any:
        """What the module returns."""
        x = self._x
        if isinstance(x, PackedSequence):
            if x.unsorted_indices is not None:
                finals = [s.index_select(1, x.unsorted_indices) for s in finals]
            out: Any = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        else:
            steps = data.reshape(len(self.sizes), -1, data.shape[-1])
            out = steps.squeeze(1) if self.alone else steps.transpose(0, 1) if self._module.batch_first else steps
            finals = [s.squeeze(1) for s in finals] if self.alone else finals
        return out, tuple(finals) if isinstance(self._module, nn.LSTM) else finals[0]


class _Run:
    """One direction of one layer."""

    def __init__(self, module: nn.RNNBase, suffix: str, sequence: _Sequence, states: list[Tensor]) -> None:
        self._module, self._suffix, self._sequence = module, suffix, sequence
        self.states = states
        self.products: dict[str, Products] = {}

    def __call__(self, data: Tensor) -> Tensor:
        """The hidden states (positions, H) of inputs (positions, d)."""
        sizes, sequence = self._sequence.sizes, self._sequence
        starts = [sum(sizes[:t]) for t in range(len(sizes))]
        forward = range(len(sizes))
        from_input, from_state = self._weights("ih"), self._weights("hh")
        projection = getattr(self._module, f"weight_hr{self._suffix}", None)
        probe, added = sequence.probe(from_input[0].shape[0])
        self.products[f"weight_ih{self._suffix}"] = [(sequence.rows(data), probe)]
        inputs = F.linear(data, *from_input) + added
        probe, added = sequence.probe(from_state[0].shape[0])
        out_probe, out_added = sequence.probe(0 if projection is None else projection.shape[0])
        seen: dict[int, Tensor] = {}
        unprojected: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        for t in reversed(forward) if self._suffix.endswith("reverse") else forward:
            here, now = slice(starts[t], starts[t] + sizes[t]), [state[: sizes[t]] for state in self.states]
            seen[t] = now[0]
            new = self._step(inputs[here], F.linear(now[0], *from_state) + added[here], now)
            if projection is not None:
                unprojected[t] = new[0]
                new[0] = F.linear(new[0], projection) + out_added[here]
            hidden[t] = new[0]
            self.states = [torch.cat([n, s[sizes[t] :]]) for n, s in zip(new, self.states, strict=True)]
        together = [torch.cat([found[t] for t in forward]) for found in (seen, unprojected or seen, hidden)]
        self.products[f"weight_hh{self._suffix}"] = [(sequence.rows(together[0]), probe)]
        if projection is not None:
            self.products[f"weight_hr{self._suffix}"] = [(sequence.rows(together[1]), out_probe)]
        return together[2]

    def _weights(self, part: str) -> tuple[Tensor, Tensor | None]:
        bias = f"bias_{part}{self._suffix}"
        return getattr(self._module, f"weight_{part}{self._suffix}"), getattr(self._module, bias, None)

    def _step(self, x: Tensor, h: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The next states from the gates of input and state."""
        if isinstance(self._module, nn.LSTM):
            i, f, g, o = (x + h).chunk(4, dim=-1)
            cell = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
            return [torch.sigmoid(o) * torch.tanh(cell), cell]
        if isinstance(self._module, nn.GRU):
            (r, z, n), (r_h, z_h, n_h) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
            n, z = torch.tanh(n + torch.sigmoid(r + r_h) * n_h), torch.sigmoid(z + z_h)
            return [(1 - z) * n + z * states[0]]
        return [F.relu(x + h) if self._module.mode == "RNN_RELU" else torch.tanh(x + h)]
