"""Gradients per sample or per mini-batch: the factor A of the empirical Fisher matrix.

Row i of A is ∇ℓ_i / √r, where ℓ_i is the mean loss over the i-th mini-batch (of one sample, usually) and r the number
of rows, so that AᵀA = (1/r) Σ ∇ℓ_i ∇ℓ_iᵀ. Three ways of computing the rows, which agree to rounding:

* ``outer``  one backward pass to the layers' outputs for many rows, then a product per layer (`outer_products`);
* ``vmap``   ``torch.func``: ``vmap(grad(loss))`` over many rows;
* ``loop``   a backward pass per row: slow, obviously right, the oracle of the tests.

``auto`` takes the first of them that applies, judged by comparing some rows with plain autograd, the first ones before
and random ones of every chunk after it was computed; where they differ it takes the next, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData, Index
from cbs_opt.data.forward import Forward
from cbs_opt.data.loss_checks import check_loss, explain_loss, typed_failures
from cbs_opt.data.trees import leaves
from cbs_opt.measure.gradient_methods import ENGINES, NAMES, Engine, GradientMethod, loop_rows, parse_method, vmap_rows
from cbs_opt.measure.outer_products import NotApplicableError
from cbs_opt.measure.subject import Rows, Subject
from cbs_opt.network.batch_norm import batch_statistics
from cbs_opt.network.layers import PrunableLayers
from cbs_opt.network.modes import evaluation_mode as evaluation_mode
from cbs_opt.network.modes import in_plain_state
from solvers.arguments import integer
from solvers.arrays import Array
from solvers.errors import DataError, ModelError, OptionError

Progress = Callable[[int, int], None]

#: Bytes of temporary memory by device type. On a CPU more does not make it faster: small chunks stay in the cache.
MEMORY_BUDGET = {"cpu": 64 << 20, "cuda": 2 << 30}
#: Most samples in a chunk of a network with convolutions by device type, from measurements; without convolutions a
#: chunk of 4,000 is four times as fast as one of 128 on a CPU.
_MOST_SAMPLES = {"cpu": 128, "cuda": 8192}
_MOST_WITHOUT_CONVOLUTIONS = 4096
#: Rows, drawn at random over all chunks, that are compared with plain autograd once they are there.
_CHECKED = 8
#: Largest relative difference from autograd that rounding explains, by dtype.
_AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True, eq=False)
class GradientSample:
    """Rows of gradients at some weights.

    Attributes
    ----------
    factor : (r, n) tensor, float32 or float64
        A: gradients divided by √r, on the device they were computed on; (0, n) where no rows were kept.
    mean : (n,) float64 tensor
        Mean gradient of the loss, g.
    loss : float
        Mean loss.
    n_rows : int
        Rows r.
    batch_size : int
        Samples per row, b.
    method : str
    seconds, seconds_per_row : float
        Wall time of all, and of each row once the method was chosen.
    notes : tuple of str
        Whatever was done otherwise than asked for, in words.
    """

    factor: Tensor
    mean: Tensor
    loss: float
    n_rows: int
    batch_size: int
    method: str
    seconds: float
    seconds_per_row: float = math.nan
    notes: tuple[str, ...] = ()

    @property
    def gradient(self) -> Tensor:
        """The gradient term that fits this factor: g / b, float64 (n,).

        For means over b samples E[ḡḡᵀ] ≈ H/b + ggᵀ, so the factor stands for H/b, and the linear term has to be scaled
        alike for a step to have the length that H and g themselves give it.
        """
        return self.mean / self.batch_size

    def silent(self, layers: PrunableLayers) -> list[str]:
        """Names of the layers whose gradients are all zero."""
        rows = self.factor if len(self.factor) else self.mean.unsqueeze(0)
        return [layer.name for layer in layers if not bool(rows[:, layer.slice].any())]


@in_plain_state
def sample_gradients(
    model: nn.Module,
    layers: PrunableLayers,
    data: CalibrationData,
    forward: Forward,
    index: Index,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    method: GradientMethod | str = GradientMethod.AUTO,
    memory_budget: int | None = None,
    batch_norm: str = "running",
    keep_rows: bool = True,
    out: Tensor | None = None,
    progress: Progress | None = None,
    scale: Array | None = None,
) -> GradientSample:
    """Gradients of the loss with respect to the prunable weights, a row per mini-batch.

    Parameters
    ----------
    model : nn.Module
        On `device`, without masks; run in eval mode, its training flags are restored afterwards.
    layers : PrunableLayers
    data : CalibrationData
    forward : Forward
    index : int64 (r, b)
        Sample numbers of each row.
    batch_norm : {"running", "batch"}
        Statistics that batch norms normalise by: their running ones, which stand still, or those of the row's batch,
        through which the gradient then flows. The second is the gradient of a network whose statistics follow its
        weights; it is defined for rows of several samples only, and taken by ``loop``.
    dtype : torch.float32 or torch.float64
        Of the factor; gradients are computed in the dtype of the network.
    method : GradientMethod or str
    memory_budget : int, optional
        Bytes of temporary memory beside the factor; by default `MEMORY_BUDGET`.
    keep_rows : bool
        Otherwise only the mean gradient is kept, and rows take the memory of one chunk.
    out : (r, n) tensor, optional
        Memory for the factor, e.g. that of an earlier one.
    progress : callable, optional
        Called with (rows done, rows in all) after each chunk.
    scale : float64 (r,), optional
        What each row is multiplied by; None is 1 / √r. Mean gradient and loss are weighted to match.

    Returns
    -------
    GradientSample

    Raises
    ------
    ModelError
        For train-mode batch norm, a network that is random in eval mode, a loss that is not a finite scalar, gradients
        that are not finite, or a method that does not apply.
    OptionError
        For an unknown dtype or budget, or a factor that does not fit into memory.
    """
    started = time.perf_counter()
    chosen = parse_method(method)
    by_batch = _by_batch(batch_norm, chosen, index.shape[1])
    if by_batch:
        chosen = GradientMethod.LOOP
    place = torch.device(device)
    subject = Subject(model, layers, data, forward, place)
    rows, size = index.shape
    factor = _allocate(rows if keep_rows else 0, layers.n, dtype, place, out)
    with evaluation_mode(model), _without_gradients(model), ExitStack() as stack:
        notes = list(check_loss(model, layers.parameters(model), data, forward, index, place))
        if by_batch:
            stack.enter_context(batch_statistics(model))
        for engine in _engines(chosen, subject, index, notes):
            chunk = _chunk_rows(subject, index, memory_budget, engine)
            memory = factor if keep_rows else _allocate(chunk, layers.n, dtype, place, None)
            begun = time.perf_counter()
            try:
                mean, total = _fill(memory, subject, index, engine, chunk, progress, scale)
                break
            except NotApplicableError as error:
                _refuse(chosen, NAMES[engine], str(error), notes)
    mean /= math.sqrt(rows)
    loss = float(total) / rows
    if not math.isfinite(loss) or not bool(torch.isfinite(mean).all()):
        _explain_infinite(layers, factor if keep_rows else mean.unsqueeze(0), loss)
    now = time.perf_counter()
    return GradientSample(
        factor, mean, loss, rows, size, NAMES[engine], now - started, (now - begun) / rows, tuple(notes)
    )


def _fill(
    memory: Tensor,
    subject: Subject,
    index: Index,
    engine: Engine,
    chunk: int,
    progress: Progress | None,
    scales: Array | None,
) -> tuple[Tensor, Tensor]:
    """(sum of the rows, sum of the losses), float64; rows go into `memory`, one over another where it is short.

    They are scaled by scales (r,), and the sums weighted alike.
    """
    rows, n = len(index), memory.shape[1]
    mean = torch.zeros(n, dtype=torch.float64, device=subject.device)
    total = torch.zeros((), dtype=torch.float64, device=subject.device)
    random, scale = np.random.default_rng(rows), 1.0 / math.sqrt(rows)
    for start in range(0, rows, chunk):
        part = index[start : start + chunk]
        target = memory[start : start + chunk] if len(memory) == rows else memory[: len(part)]
        samples = subject.rows(part)
        with typed_failures(*samples, part, passing=(NotApplicableError,)):
            losses = engine(subject, samples, target, scale)
        if not bool(torch.isfinite(losses).all()):
            row = int((~torch.isfinite(losses)).nonzero()[0])
            raise explain_loss(float(losses[row]), part[row], subject.data)
        if engine is not loop_rows:
            count = min(len(part), max(1, round(_CHECKED * len(part) / rows)))
            picked = np.sort(random.choice(len(part), count, replace=False))
            _check_rows(target[torch.from_numpy(picked)], subject, part[picked], scale)
        if scales is None:
            total += losses.double().sum()
            mean += target.sum(0, dtype=torch.float64)
        else:
            # Relative to 1 / √r, by which the engine has multiplied.
            weight = torch.from_numpy(scales[start : start + chunk] / scale).to(subject.device)
            target.mul_(weight.unsqueeze(1).to(target.dtype))
            total += weight.square() @ losses.double()
            mean += (weight.to(target.dtype) @ target).double()
        if progress is not None:
            progress(min(start + chunk, rows), rows)
    return mean, total


def _check_rows(found: Tensor, subject: Subject, index: Index, scale: float) -> None:
    """Compare rows with plain autograd, as a batch around them leaves them; raises NotApplicableError."""
    expected = torch.empty_like(found)
    loop_rows(subject, subject.rows(index), expected, scale)
    size, apart = expected.double().norm(dim=1), (found.double() - expected.double()).norm(dim=1)
    # Rows far below the others are rounding: gradients of samples the network is sure of.
    allowed = 1e-2 * torch.maximum(size, 0.1 * size.square().mean().sqrt())
    if bool((apart > allowed).any()):
        row = int((apart > allowed).nonzero()[0])
        numbers = ", ".join(map(str, index[row][:5].tolist()))
        raise NotApplicableError(
            f"the gradient of samples {numbers} differs from that of plain autograd: what the network does with a "
            "sample depends on those beside it"
        )


def _by_batch(batch_norm: str, method: GradientMethod, size: int) -> bool:
    """Whether batch norms use the statistics of the batch; raises OptionError where that makes no sense."""
    if batch_norm not in ("running", "batch"):
        raise OptionError(f"batch_norm must be 'running' or 'batch', not {batch_norm!r}")
    if batch_norm == "running":
        return False
    if size < 2:
        raise OptionError("one sample has no batch statistics; use rows of several samples, or batch_norm='running'")
    if method not in (GradientMethod.AUTO, GradientMethod.LOOP):
        raise OptionError(f"gradients under batch statistics are taken by 'loop', not {method.value!r}")
    return True


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient: what is differentiated is said explicitly."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _engines(method: GradientMethod, subject: Subject, index: Index, notes: list[str]) -> Iterator[Engine]:
    """The method asked for, or those that apply, the quickest first; compared with autograd on three rows.

    Three, because a recurrent network of two layers returns states whose first dimension is two.
    """
    if method is GradientMethod.LOOP:
        yield loop_rows
        return
    few = index[np.arange(3) % len(index)]
    dtype = subject.layers.parameters(subject.model)[0].dtype
    expected = torch.empty(len(few), subject.layers.n, dtype=dtype, device=subject.device)
    rows = subject.rows(few)
    with typed_failures(*rows, few):
        loop_rows(subject, rows, expected, 1.0)
    for candidate in [GradientMethod.OUTER, GradientMethod.VMAP] if method is GradientMethod.AUTO else [method]:
        # Fresh rows each time: a network may normalise its inputs in place.
        problem = _compare(candidate, subject, subject.rows(few), expected)
        if problem is None:
            yield ENGINES[candidate]
        else:
            _refuse(method, candidate.value, problem, notes)
    yield loop_rows


def _refuse(method: GradientMethod, name: str, problem: str, notes: list[str]) -> None:
    """Write down why a method does not apply, or raise ModelError where it was asked for."""
    if method is not GradientMethod.AUTO:
        raise ModelError(
            f"gradient method {name!r} does not apply to this network: {problem}; use method='auto', which takes "
            "one that does, at the latest 'loop'"
        )
    notes.append(f"gradient method {name!r} does not apply: {problem}")


def _compare(method: GradientMethod, subject: Subject, rows: Rows, expected: Tensor) -> str | None:
    """Why a method does not apply, or None if its rows are those of autograd."""
    found = torch.empty_like(expected)
    try:
        ENGINES[method](subject, rows, found, 1.0)
    except NotApplicableError as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # The same rows went through plain autograd just before, so it is the method and not the network that fails.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    tolerance = _AGREEMENT.get(expected.dtype, 5e-2)
    for layer in subject.layers:
        one, other = found[:, layer.slice].double(), expected[:, layer.slice].double()
        size = float(other.norm())
        if float((one - other).norm()) > tolerance * max(size, 1e-6 * float(expected.double().norm())):
            return f"the gradients of layer {layer.name!r} differ from those of autograd"
    return None


def _allocate(rows: int, n: int, dtype: torch.dtype, device: torch.device, out: Tensor | None) -> Tensor:
    """Memory for the factor."""
    if dtype not in (torch.float32, torch.float64):
        raise OptionError(f"the factor is float32 or float64, not {dtype}")
    if out is not None:
        if out.shape != (rows, n) or out.dtype != dtype or out.device.type != device.type:
            raise OptionError(
                f"out has shape {tuple(out.shape)}, {out.dtype} on {out.device}; "
                f"the factor is ({rows}, {n}), {dtype} on {device}"
            )
        return out
    try:
        return torch.empty(rows, n, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        size = rows * n * dtype.itemsize / 1e9
        raise OptionError(
            f"the gradients of {rows} rows for {n} weights take {size:.2f} GB on {device}, more than there is; "
            "use fewer rows or fewer layers"
        ) from error


def _chunk_rows(subject: Subject, index: Index, budget: int | None, engine: Engine) -> int:
    """Rows per chunk so that activations and temporary gradients stay within the budget."""
    model, layers, kind = subject.model, subject.layers, subject.device.type
    budget = MEMORY_BUDGET.get(kind, MEMORY_BUDGET["cpu"]) if budget is None else integer("memory_budget", budget)
    if engine is loop_rows:
        return max(1, min(64, len(index)))
    elements = 0
    patches = 0

    def count(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal elements, patches
        elements += sum(t.numel() for _, t in leaves(output))
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and isinstance(output, Tensor):
            kernel = int(np.prod(module.kernel_size)) * module.in_channels
            patches = max(patches, kernel * output[0, 0].numel())

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    try:
        inputs, targets = subject.data.batch(index[0, :1], subject.device)
        with torch.no_grad():
            subject.forward.output(model, inputs, targets)
    finally:
        for handle in handles:
            handle.remove()
    width: int = layers.parameters(model)[0].element_size()
    largest = layers.n if engine is vmap_rows else max(layer.n for layer in layers)
    size = index.shape[1]
    per_row = width * (size * (3 * elements + 2 * patches) + 2 * largest)
    most = _MOST_SAMPLES.get(kind, _MOST_SAMPLES["cpu"])
    if not patches:
        most = max(most, _MOST_WITHOUT_CONVOLUTIONS)
    return int(max(1, min(budget // max(1, per_row), max(1, most // size), len(index))))


def _explain_infinite(layers: PrunableLayers, factor: Tensor, loss: float) -> None:
    """Raise ModelError naming the first row and layer that is not finite."""
    for row in range(len(factor)):
        if bool(torch.isfinite(factor[row]).all()):
            continue
        column = int((~torch.isfinite(factor[row])).nonzero()[0])
        layer = next(layer for layer in layers if layer.start <= column < layer.stop)
        raise ModelError(
            f"the gradient of row {row} is not finite in layer {layer.name!r}; the loss may overflow "
            f"(mean loss {loss}): look at the data, or use a network in float32"
        )
    raise DataError(f"the mean calibration loss is {loss}; look for targets out of range")
