"""Prune a small language model, then train it with the Trainer of transformers: the masks come with the network."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import cbs_opt


def text(n: int = 64, length: int = 16) -> list[dict[str, Tensor]]:
    """Rows of numbers that count up, each a sample of input_ids and labels."""
    starts = torch.randint(0, 32, (n, 1), generator=torch.Generator().manual_seed(1))
    rows = (starts + torch.arange(length)) % 32
    return [{"input_ids": row, "labels": row} for row in rows]


def main(steps: int = 30) -> cbs_opt.PruneResult:
    """Prune, train on, save and load; returns the result, whose network has its masks still."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model, samples = LlamaForCausalLM(config).eval(), text()
    batches = [
        {name: torch.stack([s[name] for s in samples[i : i + 8]]) for name in samples[0]}
        for i in range(0, len(samples), 8)
    ]
    result = cbs_opt.prune(
        model,
        batches,
        lambda output, batch: output.loss,
        sparsity=0.5,
        curvature="layer_inputs",
        solver="sweep",
        exclude="lm_head",
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            weight_decay=0.01,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=result.model, args=arguments, train_dataset=samples).train()
        result.model.eval()
        # The folder of `save` is one of `from_pretrained` too.
        result.save(f"{folder}/pruned")
        again = LlamaForCausalLM.from_pretrained(f"{folder}/pruned").eval()
    with torch.no_grad():
        loss, reloaded = (float(network(**batches[0]).loss) for network in (result.model, again))
    print(f"pruned: loss {result.report.loss_pruned:.3f}; trained on: {loss:.3f}; as loaded again: {reloaded:.3f}")
    print(cbs_opt.check(result.model, result.masks))
    return result


if __name__ == "__main__":
    main()
