"""The trained network of an experiment: found beside the data or in the cache, else trained, or asked for at the hub.

Which of these was used is always said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from cbs_opt import resolve_device
from experiments.datasets import load_dataset
from experiments.datasets.cache import cache_dir
from experiments.datasets.images import Dataset
from experiments.datasets.parquet import SOURCES
from experiments.datasets.sentences import SentenceSet
from experiments.datasets.text import WIKITEXT, TokenText, load_wikitext
from experiments.networks.batch_norm import fresh_statistics
from experiments.networks.checkpoints import load_checkpoint, save_checkpoint
from experiments.networks.experiment import Experiment, ImageExperiment
from experiments.networks.minilm import DenseEncoder, SentenceEncoder
from experiments.networks.pretrained import PretrainedExperiment, load_pretrained
from experiments.networks.smollm2 import LanguageModel
from experiments.networks.training import Epoch, train, train_to_file
from solvers.errors import CheckpointError, OptionError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Where data and trained weights come from."""

    data_dir: Annotated[
        Path | None, "Folder which holds mnist/, cifar10/ and wikitext/, or that of one data set; default: download."
    ] = None
    checkpoint: Annotated[
        Path | None,
        "Trained weights: safetensors, or of a language model a GGUF file, a folder or a name on the hub; default: "
        "beside the data, then the cache, then train or download.",
    ] = None
    device: Annotated[str, "auto, cpu or cuda."] = "auto"


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network in eval mode, its data and, in words, where its weights came from."""

    model: nn.Module
    origin: str
    experiment: Experiment
    dataset: Dataset | TokenText | SentenceSet
    device: torch.device

    def score(self, model: nn.Module) -> float:
        """The experiment's metric on test data, of a network made from this one, on its device."""
        return self.experiment.criterion.score(model, self.dataset.test, self.device)

    @cached_property
    def dense(self) -> float:
        """The metric of this network."""
        return self.score(self.model)


def open_network(experiment: Experiment, source: Source, say: Say = lambda message: None) -> Network:
    """Data and network of an experiment; see `load_dataset`, `load_network`, `load_wikitext`, `load_pretrained`."""
    if isinstance(experiment, PretrainedExperiment):
        return _pretrained(experiment, source, say)
    if not isinstance(experiment, ImageExperiment):
        raise OptionError(f"nobody knows how to open a {type(experiment).__name__}")
    if source.data_dir is None and experiment.dataset in SOURCES and SOURCES[experiment.dataset].repository:
        say(f"no --data-dir: asking the Hugging Face hub for {SOURCES[experiment.dataset].repository}")
    dataset = load_dataset(experiment.dataset, source.data_dir)
    say(f"data: {dataset.source}")
    return load_network(experiment, dataset, source, say)


def _pretrained(experiment: PretrainedExperiment, source: Source, say: Say) -> Network:
    device = resolve_device(source.device)
    if source.data_dir is None:
        say(f"no --data-dir: asking the Hugging Face hub for {WIKITEXT.repository}")
    corpus = load_wikitext(source.data_dir)
    say(f"data: {corpus.source}")
    place = source.checkpoint or find_checkpoint(experiment, source.data_dir)
    model, tokenizer, origin = load_pretrained(experiment, place)
    say(f"weights: {origin}")
    model = model.to(device)
    dataset: TokenText | SentenceSet
    if isinstance(experiment, LanguageModel):
        # The text is cut into windows afterwards, so its length is no reason to warn.
        dataset = TokenText.of(corpus, lambda text: tokenizer(text, verbose=False)["input_ids"], experiment.windows)
    elif isinstance(experiment, SentenceEncoder):
        dataset = SentenceSet.of(corpus, DenseEncoder(model, tokenizer, device), experiment.n_test)
    else:
        raise OptionError(f"nobody knows what a {type(experiment).__name__} reads")
    return Network(model, origin, experiment, dataset, device)


def cached_checkpoint(experiment: Experiment) -> Path:
    """Where the experiment's own training puts its weights."""
    return cache_dir() / "checkpoints" / experiment.checkpoint


def find_checkpoint(experiment: Experiment, data_dir: Path | None) -> Path | None:
    """The trained weights in a folder ``checkpoints`` beside the data's folder, else those in the cache, else None."""
    candidates = []
    if data_dir is not None:
        # `data_dir` may be the folder of all data sets or that of one.
        above = data_dir.expanduser().resolve()
        candidates = [folder / "checkpoints" / experiment.checkpoint for folder in (above.parent, above.parent.parent)]
    candidates.append(cached_checkpoint(experiment))
    return next((path for path in candidates if path.exists()), None)


def load_network(
    experiment: ImageExperiment,
    dataset: Dataset,
    source: Source = Source(),
    say: Say = lambda message: None,
) -> Network:
    """Load, or train, the network of an experiment; stale batch-norm statistics are estimated anew.

    Parameters
    ----------
    source
        Without a checkpoint, that beside the data or in the cache is taken, then one trained where that is quick.
    say
        Called with a line about whatever is done.

    Raises
    ------
    CheckpointError
        A file is unreadable or not this network's, or there is none and training takes too long to start unasked.
    """
    device = resolve_device(source.device)
    checkpoint = source.checkpoint or find_checkpoint(experiment, source.data_dir)
    if checkpoint is None and not experiment.train_on_demand:
        raise CheckpointError(
            f"no checkpoint of {experiment.name}: give --checkpoint FILE, or put {experiment.checkpoint} into a "
            f"folder checkpoints/ beside the data, or train one with "
            f"`python -m experiments.train {experiment.name} --data-dir DIR`"
        )
    torch.manual_seed(experiment.recipe.seed)
    model = experiment.model().to(device)
    if checkpoint is not None:
        vouched = load_checkpoint(model, checkpoint)
        origin = str(checkpoint)
        say(f"weights: {checkpoint}")
        if not vouched and experiment.sha256 not in ("", hashlib.sha256(checkpoint.read_bytes()).hexdigest()):
            say(
                f"warning: {checkpoint} is not the published file of {experiment.name} and carries no digest; unless "
                "you brought your own weights, it is damaged: copy it again"
            )
        if experiment.stale_batch_norm:
            _reestimated(model, dataset, checkpoint, device, say)
    else:
        origin = train_experiment(experiment, model, dataset, device=device, say=say)
    model.eval()
    return Network(model, origin, experiment, dataset, device)


def train_experiment(
    experiment: ImageExperiment,
    model: nn.Module,
    dataset: Dataset,
    *,
    path: Path | None = None,
    device: torch.device | str = "cpu",
    say: Say = lambda message: None,
) -> str:
    """Train an experiment's network into a file, the cache's by default; returns where the weights are, in words."""
    recipe = experiment.recipe
    target = path or cached_checkpoint(experiment)
    say(f"training {experiment.name} for {recipe.epochs} epochs into {target}")
    every = max(1, recipe.epochs // 10) if len(dataset.train) < 5_000 else 1

    def report(epoch: Epoch) -> None:
        if epoch.number % every == 0:
            say(f"epoch {epoch.number}/{epoch.total}: training loss {epoch.loss:.4f}, {epoch.seconds:.1f} s")

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        train_to_file(model, dataset.train, recipe, target, device=device, report=report)
    except CheckpointError:
        # An OSError too, but of a training cut off earlier, which must not be thrown away unasked.
        raise
    except OSError as error:
        if path is not None:
            raise
        say(f"cannot write {target} ({error}); training without keeping the weights")
        train(model, dataset.train, recipe, device=device, report=report)
        return "trained for this run"
    return str(target)


def _reestimated(model: nn.Module, dataset: Dataset, checkpoint: Path, device: torch.device | str, say: Say) -> None:
    """Batch-norm statistics estimated anew, kept in the cache under the checkpoint's and the data's contents."""
    stamp = hashlib.sha256(checkpoint.read_bytes())
    stamp.update(dataset.train.labels.numpy().tobytes())
    path = cache_dir() / "batchnorm" / f"{checkpoint.stem}-{stamp.hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            load_checkpoint(model, path)
        except CheckpointError as error:
            say(f"{error}; estimating the batch-norm statistics again")
        else:
            say(f"batch-norm statistics: estimated earlier, kept in {path}")
            return
    say("batch-norm statistics: estimating with one augmented pass over the training set")
    fresh_statistics(model, dataset.train, device=device)
    try:
        save_checkpoint(model, path, note="batch-norm statistics estimated anew")
    except OSError as error:
        say(f"cannot keep them in {path} ({error})")
