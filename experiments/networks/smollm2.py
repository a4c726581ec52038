"""SmolLM2-135M on WikiText-2, judged by its perplexity; any other causal language model goes by ``--checkpoint``.

    perplexity = exp( mean over windows of −(1/(L − 1)) Σ_{t=2..L} log p(token t | tokens 1 … t − 1) )

Source: Allal et al., *SmolLM2*, 2025; Merity et al., *Pointer sentinel mixture models*, ICLR 2017 (WikiText).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt import Distill, FisherOptions
from experiments.datasets.text import WIKITEXT, Windows
from experiments.networks.criterion import METRICS, Criterion
from experiments.networks.experiment import SolverTable
from experiments.networks.layer_methods import comparisons
from experiments.networks.pretrained import PretrainedExperiment


def next_token_loss(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token, for windows of one length (there is no padding)."""
    logits = output.logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def perplexity(model: nn.Module, windows: Tensor, device: torch.device) -> float:
    """Perplexity of windows of tokens int64 ``(windows, length)``, one at a time; inf beyond what floats hold."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            batches = ({"input_ids": ids[None].to(device)} for ids in windows)
            losses = [float(next_token_loss(model(**batch), batch)) for batch in batches]
    finally:
        model.train(training)
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < 700.0 else math.inf


PERPLEXITY = Criterion(METRICS["perplexity"], next_token_loss, perplexity)


@dataclass(frozen=True, kw_only=True)
class LanguageModel(PretrainedExperiment):
    """A causal language model; ``windows`` says how the text is cut."""

    windows: Windows = Windows()
    auto: str = "AutoModelForCausalLM"
    criterion: Criterion = PERPLEXITY


SMOLLM2 = LanguageModel(
    name="smollm2-wikitext2",
    summary="SmolLM2-135M, WikiText-2, 106 M weights, judged by perplexity; needs the extra [llm]",
    dataset=WIKITEXT.name,
    checkpoint="SmolLM2-135M-Instruct.Q4_1.gguf",
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    # It shares its weights with the embedding.
    exclude=("lm_head",),
    sparsities=(0.5, 0.6, 0.7),
    fisher=FisherOptions(n_rows=32, batch_size=1, damping=1e-4, blocks="per_layer"),
    curvature="layer_inputs",
    least_samples=32,
    table=SolverTable(parts=comparisons(Distill(steps=64, lr=2e-4, batch_size=2)), reported=(0.5, 0.6, 0.7)),
)
