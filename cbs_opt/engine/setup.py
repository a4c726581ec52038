"""The model side of a pruning: which layers, which data, what is measured and where.

Every argument of `cbs_opt.prune` and `cbs_opt.prepare` that is about the network is a field of `Setup`, and everything
below them is handed the whole object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cbs_opt.data.calibration import CalibrationOptions
from cbs_opt.data.losses import MOST_SAMPLES
from cbs_opt.measure.fisher import FisherOptions
from cbs_opt.measure.layer_inputs import LayerInputOptions
from cbs_opt.network.finding import check_patterns
from solvers.arguments import instance, integer, one_of, seed_of
from solvers.errors import OptionError

#: Kinds of curvature that can be measured, and those of them that are measured layer by layer.
CURVATURES = ("fisher", "layer_inputs", "kfac", "none")
LAYERWISE = ("layer_inputs", "kfac")


@dataclass(frozen=True)
class Setup:
    """How a network is made ready to be pruned.

    Attributes
    ----------
    fisher : FisherOptions, optional
        Rows, batch size, damping and blocks of the quadratic model; None takes rows of one sample, in stages of 16.
    curvature : {"fisher", "layer_inputs", "kfac", "none"}
        What is measured. With ``none`` only solvers and updates that need no more than the weights can be used;
        with ``fisher``, `cbs_opt.prune` still measures no more than solver and update need. The other two are
        layer-wise, see `cbs_opt.engine.layerwise`.
    layer_inputs : LayerInputOptions, optional
        How layer-wise curvature is measured.
    calibration : CalibrationOptions, optional
        Which samples of the data are used; None takes all.
    include, exclude : patterns
        Which layers; see `cbs_opt.find_layers`.
    device : {"auto", "cpu", "cuda"} or torch.device
    seed : int
        Of rows, calibration samples and solvers, unless they have their own.
    loss_samples : int
        Calibration losses, by which solvers pick among masks, are taken over at most this many samples.

    Raises
    ------
    OptionError, UnknownNameError
    """

    fisher: FisherOptions | None = None
    curvature: str = "fisher"
    calibration: CalibrationOptions | None = None
    include: Sequence[str] | str = ("*",)
    exclude: Sequence[str] | str = ()
    device: torch.device | str = "auto"
    seed: int = 0
    loss_samples: int = MOST_SAMPLES
    layer_inputs: LayerInputOptions | None = None

    def __post_init__(self) -> None:
        one_of("curvature", self.curvature, CURVATURES)
        object.__setattr__(self, "seed", seed_of(self.seed))
        object.__setattr__(self, "loss_samples", integer("loss_samples", self.loss_samples))
        if self.fisher is not None:
            instance("fisher", self.fisher, FisherOptions)
        if self.layer_inputs is not None:
            instance("layer_inputs", self.layer_inputs, LayerInputOptions)
        other, given = ("fisher", self.fisher) if self.layerwise else ("layer_inputs", self.layer_inputs)
        if given is not None:
            raise OptionError(f"curvature={self.curvature!r} does not look at {other}=...; leave it out")
        if self.calibration is not None:
            instance("calibration", self.calibration, CalibrationOptions)
        for name in ("include", "exclude"):
            check_patterns(name, getattr(self, name))
        object.__setattr__(self, "device", resolve_device(self.device))

    @property
    def options(self) -> FisherOptions:
        """`fisher`, or its defaults."""
        return self.fisher or FisherOptions()

    @property
    def layerwise(self) -> bool:
        """Whether the curvature is measured layer by layer."""
        return self.curvature in LAYERWISE

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def samples(self) -> CalibrationOptions:
        """`calibration`, or its defaults."""
        return self.calibration or CalibrationOptions(seed=self.seed)

    def with_fisher(self, fisher: FisherOptions) -> Setup:
        """The same with other options of the quadratic model."""
        return replace(self, fisher=fisher)


def resolve_device(device: torch.device | str = "auto") -> torch.device:
    """``"auto"`` is the CUDA device where there is one, else the CPU.

    Raises
    ------
    OptionError
        For a device that does not exist.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except Exception as error:
        raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', not {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', not {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {device!r} is asked for, but no CUDA device is available; use 'auto' or 'cpu'")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise OptionError(f"there is no CUDA device {chosen.index}; there are {torch.cuda.device_count()}")
    return chosen
