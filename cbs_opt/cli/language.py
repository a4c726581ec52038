"""A network in a folder as transformers saves them, and calibration text from a file. Nothing is downloaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solvers.errors import CheckpointError, DataError, OptionError


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; raises CheckpointError."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def load_network(folder: Path) -> nn.Module:
    """The network in a folder, of the class that its configuration names, in eval mode and float32.

    Raises
    ------
    OptionError
        If transformers is not installed.
    CheckpointError
        If the folder cannot be read.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError("--hf needs transformers; pip install 'cbs-opt[llm]'") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"--hf {folder}: there is no config.json; give a folder that save_pretrained wrote")
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
        kind = getattr(transformers, named[0], transformers.AutoModelForCausalLM)
        transformers.utils.logging.disable_progress_bar()
        model = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except Exception as error:
        raise CheckpointError(f"--hf {folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    assert isinstance(model, nn.Module)
    return model.eval()


def is_causal(model: nn.Module) -> bool:
    """Whether the network's loss is that of the next token."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def head_of(model: nn.Module) -> str:
    """Name of what makes logits of the last hidden state, or nothing. It is left dense unless patterns say otherwise.

    Often it is one weight with the embedding, and it is the layer that pruning harms most.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""


def windows(path: Path, tokenizer: Any, model: nn.Module, n: int, length: int) -> list[dict[str, Tensor]]:
    """The first tokens of a text in windows, one a batch; with labels where the network's loss is the next token's.

    Parameters
    ----------
    path : Path
    tokenizer, model
    n : int
        Windows at most.
    length : int
        Tokens in each.

    Raises
    ------
    DataError
        If the text cannot be read or is shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the text {path}: {error}") from error
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    most = int(getattr(model.config, "max_position_embeddings", length) or length)
    if length > most:
        raise DataError(f"--sequence-length {length} is more than the network's {most} positions")
    found = min(n, len(tokens) // length)
    if found == 0:
        raise DataError(f"{path} has {len(tokens)} tokens, and a window takes {length}; give a lower --sequence-length")
    rows = tokens[: found * length].reshape(found, 1, length)
    takes = inspect.signature(model.forward).parameters
    labelled = is_causal(model) and "labels" in takes
    return [{"input_ids": row, **({"labels": row} if labelled else {})} for row in rows]
