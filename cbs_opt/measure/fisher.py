"""From gradients to a selection problem: the empirical Fisher matrix H = AᵀA + λI in blocks.

The mean gradient g is part of the model where `FisherOptions.first_order` says so; it then enters as g / b, which is
the scale of a factor built from means over b samples (`GradientSample.gradient`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cbs_opt.data.calibration import CalibrationData
from cbs_opt.measure.blocks import BlockSpec, Partition, contiguous_partition, interaction_partition
from cbs_opt.measure.gradient_methods import GradientMethod, parse_method
from cbs_opt.measure.gradients import GradientSample
from cbs_opt.network.layers import PrunableLayers
from solvers import QuadraticBlock
from solvers.arguments import flag, integer, number, one_of, seed_of
from solvers.curvature import Unmeasured
from solvers.errors import DataError, ModelError, OptionError

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: Rows where none are asked for.
DEFAULT_ROWS = 1000
#: λ where none is asked for: relative to the mean diagonal of AᵀA in one shot, and that with which stages begin.
DEFAULT_RELATIVE_DAMPING, DEFAULT_DAMPING = 0.1, 1e-4


@dataclass(frozen=True)
class FisherOptions:
    """How the quadratic model is built.

    Attributes
    ----------
    n_rows : int, optional
        Rows r of the factor; None takes min(1000, samples // batch_size).
    batch_size : int
        Samples b whose gradients are averaged into a row.
    damping : float, optional
        λ ≥ 0.
    relative_damping : float, optional
        λ as a multiple of the mean diagonal entry of AᵀA over all prunable weights, instead of `damping`: the same
        number fits losses of any scale. Where neither is given it is 0.1 in one shot; stages, which search λ as they
        go, then start from λ = 1e-4.
    blocks : str
        ``one``, ``per_layer``, ``per_row``, ``fixed:SIZE``, ``components[:τ]`` or ``clusters:SIZE``.
    first_order : bool
        Whether the choice of weights sees the mean gradient; without it w counts as a stationary point. In one shot the
        update sees what the choice sees, in stages always the gradient.
    seed : int, optional
        Of the choice of rows; None takes the seed of the call.
    dtype : {"float32", "float64"}
        Of the factor.
    method : str
        How gradients are computed: ``auto``, ``outer``, ``vmap``, ``loop``.
    memory_budget : int, optional
        Bytes of temporary memory for gradients, beside the factor.

    row_sampling : {"importance", "uniform"}
        How samples become rows where there are more of them than rows of one sample: as likely as their loss gradients
        at the output are large, and weighted so that AᵀA stays unbiased, or all alike; see
        `cbs_opt.measure.row_sampling`. Rows of several samples, and stages, are drawn uniformly.

    Raises
    ------
    OptionError, UnknownNameError
    """

    n_rows: int | None = None
    batch_size: int = 1
    damping: float | None = None
    blocks: str = "one"
    first_order: bool = False
    seed: int | None = None
    dtype: str = "float32"
    method: str = "auto"
    memory_budget: int | None = None
    relative_damping: float | None = None
    row_sampling: str = "importance"

    def __post_init__(self) -> None:
        for name in ("n_rows", "batch_size", "memory_budget"):
            value = getattr(self, name)
            if value is not None or name == "batch_size":
                object.__setattr__(self, name, integer(name, value))
        for name in ("damping", "relative_damping"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(name, getattr(self, name), least=0))
        if self.seed is not None:
            object.__setattr__(self, "seed", seed_of(self.seed))
        flag("first_order", self.first_order)
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise OptionError(f"dtype must be 'float32' or 'float64', not {self.dtype!r}")
        one_of("row_sampling", self.row_sampling, ("importance", "uniform"))
        _ = self.spec, self.gradient_method

    @property
    def spec(self) -> BlockSpec:
        """The block structure."""
        return BlockSpec.parse(self.blocks)

    @property
    def gradient_method(self) -> GradientMethod:
        """How gradients are computed."""
        return parse_method(self.method)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the factor."""
        return _DTYPES[self.dtype]

    @property
    def ridge(self) -> float:
        """λ where it is a number already, else what stages start from."""
        return DEFAULT_DAMPING if self.damping is None else self.damping

    def resolved(self, sample: GradientSample) -> FisherOptions:
        """The same with λ as a number where it is relative to the gradients; raises ModelError if they vanish."""
        if not len(sample.factor) or (self.damping is not None and self.relative_damping is None):
            return self
        size = float(torch.linalg.vector_norm(sample.factor, dtype=torch.float64)) ** 2 / sample.factor.shape[1]
        if self.relative_damping is None:
            # Without any curvature the report says so, and λ decides no more than the size of the objective.
            return replace(self, damping=DEFAULT_RELATIVE_DAMPING * size or DEFAULT_DAMPING)
        if size == 0.0:
            raise ModelError(
                "every gradient is zero, so that no damping is relative to them; look for what cuts the layers off "
                "from the loss, or pass damping="
            )
        return replace(self, damping=self.relative_damping * size)

    def rows_for(self, data: CalibrationData) -> int:
        """Number of rows r; raises DataError if there are too few samples."""
        if self.n_rows is None:
            if data.n < self.batch_size:
                raise DataError(
                    f"a row takes {self.batch_size} samples, the calibration data hold {data.n}; pass more data"
                )
            return min(DEFAULT_ROWS, data.n // self.batch_size)
        if self.batch_size > data.n or (self.batch_size == 1 and self.n_rows > data.n):
            raise DataError(
                f"{self.n_rows} rows of {self.batch_size} samples are asked for, the calibration data hold {data.n} "
                "samples; ask for fewer or pass more data"
            )
        return int(self.n_rows)


@dataclass(frozen=True, eq=False)
class FisherBlocks:
    """The quadratic model of the loss.

    Attributes
    ----------
    blocks : tuple of QuadraticBlock
        In the order of `partition`.
    partition : Partition
        The map between the order of the blocks and that of the network.
    """

    blocks: tuple[QuadraticBlock, ...]
    partition: Partition


def build_blocks(
    sample: GradientSample,
    weights: npt.NDArray[np.float64] | Tensor,
    layers: PrunableLayers,
    options: FisherOptions,
    seed: int = 0,
) -> FisherBlocks:
    """Cut the factor into blocks.

    Parameters
    ----------
    sample : GradientSample
    weights : (n,) float64
        The weights the gradients were taken at.
    layers : PrunableLayers
    options : FisherOptions
    seed : int
        Of the clustering.

    Returns
    -------
    FisherBlocks
        Blocks of consecutive weights are views of ``sample.factor``.
    """
    spec = options.spec
    factor = sample.factor
    w = torch.as_tensor(weights).to(factor.device)
    gradient = sample.gradient.to(factor.device) if options.first_order else None
    partition = contiguous_partition(layers, spec) if spec.contiguous else interaction_partition(factor, w, spec, seed)
    order = None if partition.order is None else torch.from_numpy(partition.order).to(factor.device)
    blocks = []
    for name, where in zip(partition.names, partition.slices, strict=True):
        pick: slice | Tensor = where if order is None else order[where]
        blocks.append(
            QuadraticBlock(
                weights=w[pick],
                factor=factor[:, pick],
                damping=options.ridge,
                gradient=None if gradient is None else gradient[pick],
                name=name,
            )
        )
    return FisherBlocks(tuple(blocks), partition)


def weight_blocks(layers: PrunableLayers, model: nn.Module, sample: GradientSample | None) -> FisherBlocks:
    """Blocks without a curvature, one per layer: views of the parameters, and of the mean gradient where there is one.

    They are true as long as the weights of the network do not change.
    """
    blocks, weights = [], layers.parameters(model)
    mixed = len({weight.dtype for weight in weights}) > 1
    for layer, weight in zip(layers, weights, strict=True):
        flat = layer.view.flatten(weight.detach())
        # Magnitudes of several dtypes are compared as float64.
        flat = flat.double() if mixed else flat
        gradient = None if sample is None else sample.gradient[layer.slice]
        nothing = Unmeasured(layer.n, flat.device)
        blocks.append(QuadraticBlock(flat, curvature=nothing, gradient=gradient, name=layer.name))
    return FisherBlocks(tuple(blocks), Partition(layers.names, tuple(layer.n for layer in layers)))
