"""Networks of the ``transformers`` package: from a GGUF file, a folder or the hub, with their tokeniser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.networks.experiment import Experiment
from solvers.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class PretrainedExperiment(Experiment):
    """A network that others have trained, on text.

    Attributes
    ----------
    repository, revision
        On the hub: what is downloaded where no file is given or found.
    auto
        Class of ``transformers`` that makes the network, which knows its architecture from its files.
    """

    repository: str
    revision: str
    auto: str


def load_pretrained(experiment: PretrainedExperiment, place: Path | None) -> tuple[nn.Module, Any, str]:
    """(network in eval mode and float32, its tokeniser, in words where they came from).

    Parameters
    ----------
    place
        A GGUF file, a folder, or, where neither exists, a name on the hub, ``owner/name``; None is the experiment's.

    Raises
    ------
    CheckpointError
        The package is missing, there is no such file, or it is not such a network.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{experiment.name} needs the `transformers` package ({error}); pip install 'cbs-opt[llm]'"
        ) from error
    where, options, origin = _place(experiment, place)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        network = getattr(transformers, experiment.auto).from_pretrained(where, dtype=torch.float32, **options)
    # The package raises whatever its many layers raise.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"cannot load {origin} ({type(error).__name__}: {reason}); give --checkpoint a GGUF file, a folder with "
            f"config.json, weights and tokeniser, or a name on the hub such as {experiment.repository}"
        ) from error
    # Keys and values of earlier tokens serve generation alone; a file's quantisation has been undone.
    network.config.use_cache = False
    network.config.quantization_config = None
    return network.eval(), tokenizer, origin


def _place(experiment: PretrainedExperiment, place: Path | None) -> tuple[str, dict[str, Any], str]:
    """(what ``from_pretrained`` is given, its options, the same in words)."""
    if place is None:
        name, revision = experiment.repository, experiment.revision
        return name, {"revision": revision}, f"{name} at {revision[:7]}, from the Hugging Face hub or its cache"
    path = place.expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1 or (path / "config.json").exists():
            return str(path), {"local_files_only": True}, str(path)
        path = files[0]
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a GGUF file; give one, or the folder of a network of transformers")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}, str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)):
        raise CheckpointError(f"no file or folder {place}; check the path, or leave --checkpoint out")
    return str(place), {}, f"{place}, from the Hugging Face hub or its cache"
