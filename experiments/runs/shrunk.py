"""What the smaller network of a row costs: operations and milliseconds of a call, beside the dense one's."""

from __future__ import annotations

from typing import Any

from torch import nn

import cbs_opt
from experiments.networks.load import Network

#: Samples of a call.
SAMPLES = 16


def shrunk_figures(network: Network, model: nn.Module) -> dict[str, Any]:
    """Of a pruned network on its device, by `cbs_opt.shrink`; raises OptionError, ModelError as that does."""
    images, _ = network.dataset.calibration(SAMPLES, 0)
    _, report = cbs_opt.shrink(model, images.to(network.device))
    return {
        "operations_dense": report.flops_before,
        "operations_small": report.flops_after,
        "parameters_small": report.parameters_after,
        "milliseconds_dense": 1e3 * report.seconds_before,
        "milliseconds_small": 1e3 * report.seconds_after,
        "shrink_difference": report.difference,
    }
