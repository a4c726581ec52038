"""``python -m experiments.train``: train the network of an experiment; a training which was cut off is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from cbs_opt import resolve_device
from experiments.datasets import load_dataset
from experiments.networks import DEFAULT, ImageExperiment, get_experiment
from experiments.networks.evaluation import evaluate
from experiments.networks.load import cached_checkpoint, train_experiment
from solvers.errors import CBSError, OptionError, OutputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    experiment: Annotated[str, typer.Argument(help="Name of the experiment.")] = DEFAULT,
    data_dir: Annotated[Path | None, typer.Option(help="Folder which holds mnist/ and cifar10/.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Checkpoint to write; default: the cache folder.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Train although the checkpoint exists.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train the network of an experiment and write its weights as safetensors."""
    console = Console()
    chosen = get_experiment(experiment)
    if not isinstance(chosen, ImageExperiment):
        raise OptionError(f"{experiment} is trained by others; give it to experiments.run as it is")
    if epochs is not None:
        chosen = replace(chosen, recipe=replace(chosen.recipe, epochs=epochs))
    target = output or cached_checkpoint(chosen)
    if target.exists() and not overwrite:
        console.print(f"{target} is there already; --overwrite trains it anew", soft_wrap=True)
        return
    where = resolve_device(device)
    dataset = load_dataset(chosen.dataset, data_dir)
    torch.manual_seed(chosen.recipe.seed)
    model = chosen.model().to(where)
    try:
        train_experiment(
            chosen,
            model,
            dataset,
            path=target,
            device=where,
            say=lambda message: console.print(message, soft_wrap=True, highlight=False),
        )
    except CBSError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    result = evaluate(model, dataset.test, device=where)
    console.print(
        f"{target}: test accuracy {result.accuracy:.2f} %, test loss {result.loss:.4f}", soft_wrap=True, highlight=False
    )
