"""Seconds and memory of magnitude pruning without an update on a network of 100 million weights.

    python tests/benchmarks/magnitude_memory.py [MILLIONS]

Prints what `cbs_opt.prune` takes beside the network: the peak, while it runs, and what its result holds, each as a
multiple of the weights' own bytes. Nothing of the quadratic model is computed, so both stay below two.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt


def peak_bytes() -> int:
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def network(millions: float, width: int = 2048) -> nn.Module:
    """A perceptron of about that many weights in layers of width × width."""
    depth = max(1, round(millions * 1e6 / width**2))
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).eval()


def main(millions: float) -> None:
    """Prune small networks first, so that what is loaded once is not counted; then the large one."""
    for size in (millions / 100, millions):
        model = network(size)
        data = torch.randn(64, 2048), torch.randint(0, 2048, (64,))
        weights = sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            model(data[0])
        before, started = peak_bytes(), time.perf_counter()
        result = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5, solver="magnitude", update="none")
        seconds = time.perf_counter() - started
        assert result.report.n_kept == weights // 2
        peak = (peak_bytes() - before) / (4 * weights)
        print(f"{weights:,} weights: {seconds:.1f} s, {peak:.2f} times the weights' bytes at the peak")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 100.0)
