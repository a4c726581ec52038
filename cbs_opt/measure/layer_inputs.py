"""Layer-wise curvature: H = diag(s) ⊗ (C + λI) from what the layers of a network see.

A layer with R outputs y_p = W x_p at the positions p of its samples (tokens, patches, time steps) gets

    C = mean_p x_p x_pᵀ ,         s = 1                                      ``layer_inputs``
                                  s_r = mean over samples of Σ_p (∂ℓ/∂y_pr)²    ``kfac``

so that ½ (v − w)ᵀH(v − w) is half the mean squared error of the layer's output (SparseGPT, ALPS), or its part of the
loss (K-FAC, with positions taken as uncorrelated). Rows that see inputs of their own, as those of grouped convolutions
do, make a block for each group. λ is given relative to the mean of the diagonal of C, as in SparseGPT.

Moments of batches are products in the dtype of the network, at least float32, summed in float64. Where a dict batch
has a two-dimensional ``attention_mask``, positions under its zeros do not count.

Sources: Frantar and Alistarh, *SparseGPT*, ICML 2023; Martens and Grosse, *K-FAC*, ICML 2015; Grosse and Martens, *A
Kronecker-factored approximate Fisher matrix for convolution layers*, ICML 2016.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cbs_opt.data.forward import Forward
from cbs_opt.data.loss_checks import typed_failures
from cbs_opt.data.stream import BatchStream
from cbs_opt.data.trees import Tree, map_tree
from cbs_opt.network.adapters import Rows, adapter_of
from cbs_opt.network.layers import Layer, PrunableLayers
from solvers import QuadraticBlock
from solvers.arguments import flag, number
from solvers.curvature import Kronecker
from solvers.errors import DataError

#: (inputs, targets, number of samples) on the device.
Batch: TypeAlias = tuple[Tree, Tree | None, int]

#: Least row scale, relative to the largest of the layer: H must not vanish where no loss was seen.
_LEAST = 1e-8


@dataclass(frozen=True)
class LayerInputOptions:
    """How layer-wise curvature is measured.

    Attributes
    ----------
    damping : float ≥ 0
        λ, relative to the mean of the diagonal of C.
    segments : bool
        Measure each segment of the network with those before it already pruned; else all layers of the dense network.
    in_order : bool
        Inside a segment too measure each layer with those before it already pruned, which takes more passes.
    towards_dense : float in [0, 1]
        Share τ of the dense network's outputs in what layers are fitted to, see `InputMoment.towards`; beyond 0 each
        batch runs through the dense network too.

    Raises
    ------
    OptionError
    """

    damping: float = 0.01
    segments: bool = True
    in_order: bool = False
    towards_dense: float = 0.0

    def __post_init__(self) -> None:
        number("damping", self.damping, least=0, remedy="0.01 is usual")
        flag("segments", self.segments)
        flag("in_order", self.in_order)
        number("towards_dense", self.towards_dense, least=0, most=1.0, remedy="a share of the target in [0, 1]")


@dataclass(frozen=True, eq=False)
class Streamed:
    """A network in eval mode, its layers, its data batch by batch, and how it is called."""

    model: nn.Module
    layers: PrunableLayers
    stream: BatchStream
    forward: Forward
    device: torch.device

    def batches(self) -> Iterator[Batch]:
        """The batches of a pass, on the device."""
        for inputs, targets, size in self.stream:
            yield self.put(inputs), None if targets is None else self.put(targets), size

    def put(self, tree: Tree) -> Any:
        """A tree of tensors on the device."""
        return map_tree(lambda t: t.to(self.device), tree)

    def call(self, batch: Batch) -> Any:
        """The network's output for a batch; raises ModelError for what network and batch throw."""
        with typed_failures(batch[0], batch[1]):
            return self.forward.output(self.model, batch[0], batch[1])

    def modules(self, layers: Iterable[Layer]) -> dict[nn.Module, list[tuple[Layer, str]]]:
        """The modules that answer for some layers, each with (layer, attribute); but see `unlike`."""
        found: dict[nn.Module, list[tuple[Layer, str]]] = {}
        for layer in layers:
            for owner, attribute in layer.uses:
                if (owner, attribute) not in self.unlike(layer):
                    found.setdefault(self.model.get_submodule(owner), []).append((layer, attribute))
        return found

    def unlike(self, layer: Layer) -> list[tuple[str, str]]:
        """Uses of a layer as another matrix, as an embedding is to the head tied to it: there it is not measured."""
        uses = [(owner, attribute, self.model.get_submodule(owner)) for owner, attribute in layer.uses]
        adapters = [(owner, attribute, module, adapter_of(module)) for owner, attribute, module in uses]
        return [(o, a) for o, a, m, adapter in adapters if adapter is None or adapter.view(m, a) != layer.view]


class InputMoment:
    """C of a layer, summed up batch by batch.

    Attributes
    ----------
    total : float64 (groups, d, d)
        Σ_p x_p x_pᵀ.
    cross : float64 (groups, d, d), optional
        Σ_p x̂_p x_pᵀ with the inputs x̂ of the dense network, if it was given as many positions.
    calls : int
        Most calls of the layer in one pass of the network.
    """

    def __init__(self, layer: Layer, device: torch.device, *, paired: bool = False) -> None:
        self.layer, self.calls, self.unpaired = layer, 0, False
        groups, inputs = layer.view.groups, layer.view.inputs
        self.total = torch.zeros((groups, inputs, inputs), dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.total) if paired else None
        self._counts = torch.zeros(groups, dtype=torch.int64)

    @property
    def positions(self) -> int:
        """Positions of a group; the least of all groups."""
        return int(self._counts.min())

    def add(self, rows: Rows, counted: Callable[[Tensor], Tensor], dense: Rows | None = None) -> None:
        """Add rows; `counted` leaves out the positions that are padding. Raises ValueError if they are not finite.

        `dense` are those of the dense network in the same call.
        """
        start = 0
        if self.cross is not None and (dense is None or [t.shape for t in dense] != [t.shape for t in rows]):
            # Another way was taken there, as by tokens that go to other experts.
            self.cross, self.unpaired = None, True
        for at, tensor in enumerate(rows):
            x = _single(counted(tensor))
            moment = torch.bmm(x.mT, x)
            if not bool(torch.isfinite(moment.diagonal(dim1=1, dim2=2).sum())):
                raise ValueError
            stop = start + len(x)
            self.total[start:stop] += moment
            if self.cross is not None and dense is not None:
                self.cross[start:stop] += torch.bmm(_single(counted(dense[at])).mT, x)
            self._counts[start:stop] += x.shape[1]
            start = stop

    @cached_property
    def matrices(self) -> Tensor:
        """C of each group, float64 (groups, d, d); zero where nothing was seen."""
        # Products of batches are symmetric to their own rounding only.
        means: Tensor = self.total / (2 * self._counts.clamp_min(1)).to(self.total.device).reshape(-1, 1, 1)
        return means + means.mT

    def towards(self, weights: Tensor, damping: float, share: float) -> Tensor:
        """The weights that layers are pruned from where they are fitted to the outputs of the dense network, (R·d,).

            W' = argmin_V  mean_p ‖V x_p − W ((1 − τ) x_p + τ x̂_p)‖² + λ ‖V − W‖²  =  W + τ W (D − C) (C + λI)⁻¹

        with D = mean_p x̂_p x_pᵀ: the same objective is, up to a constant, that of V around W'. Arguments as for
        `blocks`. Source: Li et al., *GPTAQ: efficient finetuning-free quantization for asymmetric calibration*, 2025.
        """
        if self.cross is None or share == 0.0:
            return weights
        groups, inputs = self.layer.view.groups, self.layer.view.inputs
        moments, w = self.matrices, weights.reshape(groups, -1, inputs)
        cross = self.cross / self._counts.clamp_min(1).to(self.cross.device).reshape(-1, 1, 1)
        means = moments.diagonal(dim1=1, dim2=2).mean(1)
        # A group that has seen nothing but zeros stays as it is.
        ridge = torch.where(means > 0.0, damping * means, 1.0)
        damped = moments + ridge.reshape(-1, 1, 1) * torch.eye(inputs, dtype=moments.dtype, device=moments.device)
        wanted = (w @ (cross - moments)).mT
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed.any()):
            # Without damping the moments need not have full rank: the least step.
            step: Tensor = torch.linalg.pinv(damped, hermitian=True) @ wanted
        else:
            step = torch.cholesky_solve(wanted, factor)
        return w.add(step.mT, alpha=share).reshape(-1)

    def blocks(self, weights: Tensor, damping: float, scale: Tensor | None = None) -> list[QuadraticBlock]:
        """One block per group.

        Parameters
        ----------
        weights : float64 (R·d,)
        damping : float
            Relative to the mean diagonal of C. A group that has seen nothing but zeros gets λ = 1: magnitudes decide.
        scale : float64 (R,), optional
            s; None is 1. All zero is taken as 1: no loss was seen through any row, and a constant changes no mask.
        """
        groups, rows = self.layer.view.groups, self.layer.n_rows
        scales = torch.ones(rows, dtype=torch.float64) if scale is None or not bool(scale.any()) else scale
        # Rows through which no loss was seen would have no H: they get the least that others have, far below it.
        scales = scales.clamp_min(_LEAST * float(scales.max())).to(self.total.device)
        blocks = []
        for group in range(groups):
            moment = self.matrices[group]
            mean = float(moment.diagonal().mean())
            part = slice(group * rows // groups, (group + 1) * rows // groups)
            inputs = slice(part.start * self.layer.view.inputs, part.stop * self.layer.view.inputs)
            name = self.layer.name if groups == 1 else f"{self.layer.name}[{part.start}:{part.stop}]"
            curvature = Kronecker(scales[part], moment, damping * mean if mean > 0.0 else 1.0)
            blocks.append(QuadraticBlock(weights[inputs], curvature=curvature, name=name))
        return blocks

    def notes(self, damping: float, scale: Tensor | None = None) -> list[str]:
        """What is not as one would expect, in words; arguments as for `blocks`."""
        name, inputs = self.layer.name, self.layer.view.inputs
        if self._counts.sum() == 0:
            return [f"layer {name!r} was never called by the calibration data: its weights go by magnitude"]
        notes = []
        if self.unpaired:
            notes.append(f"layer {name!r}: the dense network gave it other positions: it is fitted to its own output")
        dark = 0 if scale is None else int((scale <= _LEAST * scale.max()).sum())
        if dark == self.layer.n_rows:
            notes.append(f"layer {name!r}: no loss was seen through any output, so its row scales count as 1")
        elif dark:
            notes.append(f"layer {name!r}: no loss was seen through {dark} outputs, whose scale counts as {_LEAST:g} "
                         "of the largest")  # fmt: skip
        if self.calls > 1:
            notes.append(f"layer {name!r} is called {self.calls} times in a pass: its input moments are summed up")
        dead = int((self.total.diagonal(dim1=1, dim2=2) == 0.0).sum())
        if dead:
            where = f"{dead} of {self.total.shape[0] * inputs} inputs"
            notes.append(f"layer {name!r}: {where} are zero in all samples, so only the damping holds their weights")
        if self.positions < inputs:
            notes.append(
                f"layer {name!r} was seen at {self.positions} positions for {inputs} inputs: its input moment has not "
                f"full rank, which a damping of {damping:g} of its mean diagonal makes up for"
            )
        return notes


@contextmanager
def watched(
    network: Streamed, layers: Iterable[Layer], see: Callable[[nn.Module, list[tuple[Layer, str]], Any, Any, Any], None]
) -> Iterator[None]:
    """Call ``see(module, uses, args, kwargs, output)`` after every call of a module that holds one of the layers."""
    with ExitStack() as stack:
        for module, uses in network.modules(layers).items():

            def hook(
                module: nn.Module, args: Any, kwargs: Any, output: Any, uses: list[tuple[Layer, str]] = uses
            ) -> None:
                see(module, uses, args, kwargs, output)

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Caches off, and modules called as modules: torch's fused attention never calls the layers it is made of."""
    config = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if caching:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if caching:
            config.use_cache = caching  # type: ignore[union-attr]


class Recorded:
    """What some layers see in one call of a network."""

    def __init__(self, network: Streamed, layers: Iterable[Layer]) -> None:
        self._network, self._layers = network, tuple(layers)
        self._rows: dict[str, list[Rows]] = {layer.name: [] for layer in self._layers}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record."""

        def see(module: nn.Module, uses: list[tuple[Layer, str]], args: Any, kwargs: Any, _: Any) -> None:
            adapter = adapter_of(module)
            assert adapter is not None
            rows = adapter.input_rows(module, args, kwargs)
            for layer, attribute in uses:
                if attribute in rows:
                    # A copy: activations may be changed in place later on.
                    self._rows[layer.name].append([tensor.clone() for tensor in rows[attribute]])

        with watched(self._network, self._layers, see):
            yield

    def next(self, layer: Layer) -> Rows | None:
        """Those of the next call of a layer; None if there was none."""
        rows = self._rows[layer.name]
        return rows.pop(0) if rows else None


class Accumulator:
    """Input moments of some layers while a network runs; use `watching` around each call of it.

    Parameters
    ----------
    network : Streamed
    layers : sequence of Layer
    paired : bool
        Cross moments too.
    """

    def __init__(self, network: Streamed, layers: Iterable[Layer], *, paired: bool = False) -> None:
        self.network = network
        self.moments = {layer.name: InputMoment(layer, network.device, paired=paired) for layer in layers}

    @contextmanager
    def watching(self, batch: Batch, number: int, dense: Recorded | None = None) -> Iterator[None]:
        """Add what the layers see; raises DataError naming the sample whose inputs of a layer are not finite.

        `dense` is what they saw in the dense network.
        """
        counted = unpadded(batch)
        calls: Counter[str] = Counter()

        def see(module: nn.Module, uses: list[tuple[Layer, str]], args: Any, kwargs: Any, _: Any) -> None:
            adapter = adapter_of(module)
            assert adapter is not None
            rows = adapter.input_rows(module, args, kwargs)
            for layer, attribute in uses:
                if attribute not in rows:
                    continue
                calls[layer.name] += 1
                try:
                    partner = None if dense is None else dense.next(layer)
                    self.moments[layer.name].add(rows[attribute], counted, partner)
                except ValueError:
                    raise DataError(_not_finite(layer, rows[attribute], batch[2], number)) from None

        with watched(self.network, (moment.layer for moment in self.moments.values()), see):
            yield
        for name, count in calls.items():
            self.moments[name].calls = max(self.moments[name].calls, count)


def unpadded(batch: Batch) -> Callable[[Tensor], Tensor]:
    """Leaves out positions (groups, positions, d) of padding, where the batch says which they are."""
    mask = batch[0].get("attention_mask") if isinstance(batch[0], Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return lambda rows: rows
    real = mask.reshape(-1) != 0
    return lambda rows: rows[:, real] if rows.shape[1] == real.numel() else rows


def _single(x: Tensor) -> Tensor:
    """At least in single precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _not_finite(layer: Layer, rows: Rows, samples: int, number: int) -> str:
    """Which sample makes the moments of a layer overflow, in words."""
    size = torch.cat([tensor.detach().abs().nan_to_num(nan=torch.inf).amax((0, 2)) for tensor in rows])
    position = int(size.argmax()) % rows[0].shape[1]
    return (
        f"sample {position * samples // rows[0].shape[1]} of batch {number}: the inputs of layer {layer.name!r} are up "
        f"to {float(size.max()):.3g}, so that their moments are not finite; remove it, or look for NaN or infinite "
        "parameters in the layers before"
    )
