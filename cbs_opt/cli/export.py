"""``cbs-opt export DIR``: a pruned network in another format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from torch import nn

from cbs_opt.cli import language, sources
from cbs_opt.cli.shell import print_json, wide_console
from cbs_opt.data.calibration import as_batch
from cbs_opt.data.forward import Forward
from cbs_opt.formats.export import FORMATS, export, export_state
from cbs_opt.network.state_files import PlainState, read_tensors
from cbs_opt.report import folders
from cbs_opt.report.result import load
from solvers.arguments import one_of
from solvers.errors import DataError, OptionError

_SUFFIX = {"dense": ".safetensors", "packed": ".packed.safetensors", "onnx": ".onnx", "torch": ".pt2"}
#: Tokens and windows that a language model is called with where no data are given.
_TOKENS, _WINDOWS = 16, 2


def command(
    folder: Annotated[Path, typer.Argument(help="That cbs-opt prune, or result.save, wrote.")],
    format: Annotated[str, typer.Option(help="dense, packed, onnx or torch.")] = "packed",
    output: Annotated[Path | None, typer.Option(help="The file; by default beside the weights in the folder.")] = None,
    model: Annotated[str | None, typer.Option(help="package.module:factory; for onnx and torch.")] = None,
    data: Annotated[str | None, typer.Option(help="package.module:loader; its first batch is the example.")] = None,
    dynamic_batch: Annotated[bool, typer.Option(help="Let the file take batches of any size.")] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Write a pruned network as dense or packed safetensors, ONNX or a torch.export program, checked."""
    one_of("--format", format, FORMATS)
    saved = folders.read(folder)
    path = output or folder / f"exported{_SUFFIX[format]}"
    if format in ("dense", "packed"):
        path.parent.mkdir(parents=True, exist_ok=True)
        ties = saved.header["network"]["ties"]
        found = export_state(PlainState(read_tensors(folder / folders.WEIGHTS), ties), path, format)
    else:
        network = _network(folder, model)
        load(folder, network)
        example = _language_example(network) if data is None else _first_inputs(network, sources.data(data))
        found = export(network, path, format, example=example, dynamic_batch=dynamic_batch)
    if json:
        print_json({key: value if value == value else None for key, value in asdict(found).items()})
    else:
        wide_console().print(Text(str(found)), soft_wrap=True)


def _network(folder: Path, name: str | None) -> nn.Module:
    if name is not None:
        return sources.network(name)
    if (folder / "config.json").exists():
        return language.load_network(folder)
    raise OptionError("which network? give --model package.module:factory, the one that was pruned")


def _language_example(network: nn.Module) -> dict[str, torch.Tensor]:
    if not hasattr(network, "get_input_embeddings"):
        raise OptionError("give --data package.module:loader; its first batch is what the network is called with")
    return {"input_ids": torch.arange(_WINDOWS * _TOKENS).reshape(_WINDOWS, _TOKENS) % 7}


def _first_inputs(network: nn.Module, data: Any) -> Any:
    """Of the first batch what the network is called with."""
    pair = isinstance(data, tuple) and len(data) == 2
    batch = (
        (data[0][:4], data[1][:4]) if pair else data[:4] if isinstance(data, torch.Tensor) else next(iter(data), None)
    )
    if batch is None:
        raise DataError("the data are empty; the example is their first batch")
    inputs, targets, _ = as_batch(batch, alone=True)
    if not isinstance(inputs, Mapping):
        return inputs if isinstance(inputs, torch.Tensor | Sequence) else (inputs,)
    names = Forward(network, lambda *_: torch.zeros(())).names
    return {key: value for key, value in inputs.items() if targets is not None or names is None or key in names}
