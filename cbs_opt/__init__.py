"""Prune networks with the combinatorial brain surgeon.

import cbs_opt
result = cbs_opt.prune(model, data, loss_fn, sparsity=0.9, solver="greedy_ls", update="combinatorial")
result.model, result.masks
print(result.report)
"""

from __future__ import annotations

from cbs_opt.data.calibration import CalibrationData, CalibrationOptions
from cbs_opt.data.distillation import Distillation
from cbs_opt.data.forward import Forward
from cbs_opt.engine.choice import Choice
from cbs_opt.engine.estimate import Estimate
from cbs_opt.engine.plan import Plan, Polish, Prune
from cbs_opt.engine.setup import Setup
from cbs_opt.engine.stage_options import StageOptions
from cbs_opt.engine.update import Update, Updated, update_weights
from cbs_opt.engine.workspace import Workspace, open_workspace
from cbs_opt.measure.blocks import BlockSpec, Partition, Structure
from cbs_opt.measure.fisher import FisherBlocks, FisherOptions, build_blocks
from cbs_opt.measure.gradient_methods import GradientMethod
from cbs_opt.measure.gradients import GradientSample, sample_gradients
from cbs_opt.network.devices import resolve_device
from cbs_opt.network.layers import Layer, PrunableLayers, find_layers
from cbs_opt.network.mask_files import load_masks, save_masks
from cbs_opt.network.masks import (
    PruningMask,
    apply_masks,
    from_torch_prune,
    masks_from_zeros,
    read_masks,
    remove_masks,
    to_torch_prune,
)
from cbs_opt.prepared import Prepared, load_prepared, prepare
from cbs_opt.prune import prune
from cbs_opt.report.records import StageRecord
from cbs_opt.report.report import LayerReport, PruneReport
from cbs_opt.report.result import PruneResult
from solvers.errors import (
    BackendError,
    CapabilityError,
    CBSError,
    CheckpointError,
    DataError,
    ModelError,
    OptionError,
    OutputError,
    ProblemError,
    SingularHessianError,
    UnknownNameError,
)

__all__ = [
    "BackendError",
    "BlockSpec",
    "CBSError",
    "CalibrationData",
    "CalibrationOptions",
    "CapabilityError",
    "CheckpointError",
    "Choice",
    "DataError",
    "Distillation",
    "Estimate",
    "FisherBlocks",
    "FisherOptions",
    "Forward",
    "GradientMethod",
    "GradientSample",
    "Layer",
    "LayerReport",
    "ModelError",
    "OptionError",
    "OutputError",
    "Partition",
    "Plan",
    "Polish",
    "Prepared",
    "ProblemError",
    "PrunableLayers",
    "Prune",
    "PruneReport",
    "PruneResult",
    "PruningMask",
    "Setup",
    "SingularHessianError",
    "StageOptions",
    "StageRecord",
    "Structure",
    "UnknownNameError",
    "Update",
    "Updated",
    "Workspace",
    "apply_masks",
    "build_blocks",
    "find_layers",
    "from_torch_prune",
    "load_masks",
    "load_prepared",
    "masks_from_zeros",
    "open_workspace",
    "prepare",
    "prune",
    "read_masks",
    "remove_masks",
    "resolve_device",
    "sample_gradients",
    "save_masks",
    "to_torch_prune",
    "update_weights",
]
