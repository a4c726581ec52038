"""Prune networks with the combinatorial brain surgeon.

import cbs_opt
result = cbs_opt.prune(model, data, loss_fn, sparsity=0.9, solver="greedy_ls", update="combinatorial")
result.model, result.masks
print(result.report)
"""

from __future__ import annotations

from cbs_opt.data.calibration import CalibrationData as CalibrationData
from cbs_opt.data.calibration import CalibrationOptions as CalibrationOptions
from cbs_opt.data.distillation import Distillation as Distillation
from cbs_opt.data.forward import Forward as Forward
from cbs_opt.engine.choice import Choice as Choice
from cbs_opt.engine.distill import Distill as Distill
from cbs_opt.engine.estimate import Estimate as Estimate
from cbs_opt.engine.fine_tune import FineTune as FineTune
from cbs_opt.engine.layerwise import sensitivity as sensitivity
from cbs_opt.engine.plan import Plan as Plan
from cbs_opt.engine.plan import Polish as Polish
from cbs_opt.engine.plan import Prune as Prune
from cbs_opt.engine.plan import Train as Train
from cbs_opt.engine.run import estimate as estimate
from cbs_opt.engine.setup import Setup as Setup
from cbs_opt.engine.setup import resolve_device as resolve_device
from cbs_opt.engine.stage_options import StageOptions as StageOptions
from cbs_opt.engine.update import Update as Update
from cbs_opt.engine.update import Updated as Updated
from cbs_opt.engine.update import update_weights as update_weights
from cbs_opt.engine.workspace import Workspace as Workspace
from cbs_opt.engine.workspace import open_workspace as open_workspace
from cbs_opt.formats.export import export as export
from cbs_opt.formats.export import semi_structured as semi_structured
from cbs_opt.formats.packed import load_packed as load_packed
from cbs_opt.formats.record import ExportReport as ExportReport
from cbs_opt.measure.blocks import BlockSpec as BlockSpec
from cbs_opt.measure.blocks import Partition as Partition
from cbs_opt.measure.blocks import Structure as Structure
from cbs_opt.measure.costs import Both as Both
from cbs_opt.measure.costs import Bytes as Bytes
from cbs_opt.measure.costs import CostBudget as CostBudget
from cbs_opt.measure.costs import Flops as Flops
from cbs_opt.measure.fisher import FisherBlocks as FisherBlocks
from cbs_opt.measure.fisher import FisherOptions as FisherOptions
from cbs_opt.measure.fisher import build_blocks as build_blocks
from cbs_opt.measure.gradient_methods import GradientMethod as GradientMethod
from cbs_opt.measure.gradients import GradientSample as GradientSample
from cbs_opt.measure.gradients import sample_gradients as sample_gradients
from cbs_opt.measure.latency import Latency as Latency
from cbs_opt.measure.latency import LatencyTable as LatencyTable
from cbs_opt.measure.latency import latency_table as latency_table
from cbs_opt.measure.layer_inputs import LayerInputOptions as LayerInputOptions
from cbs_opt.network.adapters import LayerAdapter as LayerAdapter
from cbs_opt.network.adapters import MatrixView as MatrixView
from cbs_opt.network.adapters import register_layer as register_layer
from cbs_opt.network.finding import find_layers as find_layers
from cbs_opt.network.layers import Layer as Layer
from cbs_opt.network.layers import PrunableLayers as PrunableLayers
from cbs_opt.network.layers import Skipped as Skipped
from cbs_opt.network.mask_files import load_masks as load_masks
from cbs_opt.network.mask_files import save_masks as save_masks
from cbs_opt.network.masks import PruningMask as PruningMask
from cbs_opt.network.masks import apply_masks as apply_masks
from cbs_opt.network.masks import masks_from_zeros as masks_from_zeros
from cbs_opt.network.masks import read_masks as read_masks
from cbs_opt.network.masks import remove_masks as remove_masks
from cbs_opt.network.torch_prune import from_torch_prune as from_torch_prune
from cbs_opt.network.torch_prune import to_torch_prune as to_torch_prune
from cbs_opt.network.zeros import ZeroCheck as ZeroCheck
from cbs_opt.network.zeros import check as check
from cbs_opt.prepared import Prepared as Prepared
from cbs_opt.prepared import load_prepared as load_prepared
from cbs_opt.prepared import prepare as prepare
from cbs_opt.prune import prune as prune
from cbs_opt.report.records import DistillRecord as DistillRecord
from cbs_opt.report.records import FineTuneRecord as FineTuneRecord
from cbs_opt.report.records import StageRecord as StageRecord
from cbs_opt.report.report import LayerReport as LayerReport
from cbs_opt.report.report import PruneReport as PruneReport
from cbs_opt.report.result import PruneResult as PruneResult
from cbs_opt.report.result import load as load
from cbs_opt.report.sensitivity import Candidate as Candidate
from cbs_opt.report.sensitivity import LayerCurve as LayerCurve
from cbs_opt.report.sensitivity import Sensitivity as Sensitivity
from cbs_opt.structured.shrink import ShrinkReport as ShrinkReport
from cbs_opt.structured.shrink import shrink as shrink
from solvers.errors import BackendError as BackendError
from solvers.errors import CapabilityError as CapabilityError
from solvers.errors import CBSError as CBSError
from solvers.errors import CheckpointError as CheckpointError
from solvers.errors import DataError as DataError
from solvers.errors import ModelError as ModelError
from solvers.errors import OptionError as OptionError
from solvers.errors import OutputError as OutputError
from solvers.errors import ProblemError as ProblemError
from solvers.errors import SingularHessianError as SingularHessianError
from solvers.errors import UnknownNameError as UnknownNameError


def __getattr__(name: str) -> str:
    """``cbs_opt.__version__``, looked up when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("cbs-opt")
    raise AttributeError(f"module 'cbs_opt' has no attribute {name!r}")
