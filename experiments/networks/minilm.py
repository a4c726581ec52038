"""all-MiniLM-L6-v2, an encoder of sentences, judged by how far its similarities are those of the dense network.

    e(x) = mean over the tokens of sentence x of the last hidden states, divided by its norm
    loss = 1 − mean over sentences of ⟨e(x), ē(x)⟩,     ē: of the dense network
    agreement = Spearman's rank correlation of ⟨e(x), e(y)⟩ and ⟨ē(x), ē(y)⟩ over all pairs of held-out sentences

What embeddings are for is to rank by similarity, and it is ranks that are compared, as benchmarks of sentence
similarity do with the judgements of people. Any other encoder whose embeddings are such means goes by ``--checkpoint``.

Source: Reimers and Gurevych, *Sentence-BERT*, EMNLP 2019; Wang et al., *MiniLM*, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt import Distill, FisherOptions
from experiments.datasets.text import WIKITEXT
from experiments.networks.criterion import METRICS, Criterion
from experiments.networks.experiment import SolverTable
from experiments.networks.layer_methods import comparisons
from experiments.networks.pretrained import PretrainedExperiment

#: Sentences of a batch; tokens of a sentence, at most.
_BATCH, _LENGTH = 16, 128
_MASK, _DENSE = "attention_mask", "dense"


def embeddings(output: Any, mask: Tensor) -> Tensor:
    """Unit vectors ``(sentences, width)`` of a network's output; padding does not count."""
    states = output.last_hidden_state
    counted = mask[..., None].to(states.dtype)
    return F.normalize((states * counted).sum(1) / counted.sum(1), dim=-1)


def distance_from_dense(output: Any, targets: Mapping[str, Tensor]) -> Tensor:
    """The loss."""
    return 1.0 - (embeddings(output, targets[_MASK]) * targets[_DENSE]).sum(-1).mean()


def agreement(model: nn.Module, batches: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]], device: Any) -> float:
    """The figure in per cent; 0 where all embeddings are the same."""
    ours = _embedded(model, [inputs for inputs, _ in batches], device)
    dense = torch.cat([targets[_DENSE] for _, targets in batches])
    above, beside = torch.triu_indices(len(dense), len(dense), 1)
    pairs = [(found @ found.T)[above, beside].double().numpy() for found in (ours.cpu(), dense.cpu())]
    if not all(bool(torch.isfinite(torch.from_numpy(values)).all()) for values in pairs) or pairs[0].std() == 0.0:
        return 0.0
    return 100.0 * float(spearmanr(*pairs).statistic)


@torch.inference_mode()
def _embedded(model: nn.Module, batches: Sequence[dict[str, Tensor]], device: Any) -> Tensor:
    training = model.training
    model.eval()
    try:
        placed = ({name: tensor.to(device) for name, tensor in inputs.items()} for inputs in batches)
        return torch.cat([embeddings(model(**inputs), inputs[_MASK]) for inputs in placed])
    finally:
        model.train(training)


@dataclass(frozen=True, eq=False)
class DenseEncoder:
    """Batches of sentences: tokens, and as targets the embeddings by a network as it is."""

    model: nn.Module
    tokenizer: Any
    device: torch.device

    def __call__(self, sentences: Sequence[str]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """In their order."""
        found = []
        for start in range(0, len(sentences), _BATCH):
            part = list(sentences[start : start + _BATCH])
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=_LENGTH, return_tensors="pt")
            inputs = {name: tokens[name] for name in ("input_ids", _MASK)}
            dense = _embedded(self.model, [inputs], self.device).cpu().clone()
            found.append((inputs, {_MASK: inputs[_MASK], _DENSE: dense}))
        return found


AGREEMENT = Criterion(METRICS["agreement"], distance_from_dense, agreement)


@dataclass(frozen=True, kw_only=True)
class SentenceEncoder(PretrainedExperiment):
    """An encoder of sentences; ``n_test`` held-out ones judge it."""

    n_test: int = 512
    auto: str = "AutoModel"
    criterion: Criterion = AGREEMENT


MINILM = SentenceEncoder(
    name="minilm-sentences",
    summary="all-MiniLM-L6-v2, sentences of WikiText-2, 11 M weights, judged by similarities; needs the extra [llm]",
    dataset=WIKITEXT.name,
    checkpoint="all-MiniLM-L6-v2",
    repository="sentence-transformers/all-MiniLM-L6-v2",
    revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
    # Embeddings are means of hidden states, which the pooler does not see.
    exclude=("pooler*",),
    sparsities=(0.5, 0.6, 0.7),
    fisher=FisherOptions(n_rows=256, batch_size=1, damping=1e-4, blocks="per_layer"),
    curvature="layer_inputs",
    least_samples=256,
    table=SolverTable(
        # The dense network is where the loss is least: its gradients, by which one threshold goes, are zero.
        parts=comparisons(Distill(steps=64, lr=2e-4, loss="given", batch_size=2 * _BATCH), "uniform,measured"),
        reported=(0.5, 0.6, 0.7),
    ),
)
