"""Turning scores into masks: the k smallest, ties to the lower index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from solvers.arrays import Array, Mask

#: Entries that are looked at together, and bits that are decided in one pass over them.
_CHUNK = 1 << 22
_DIGIT = 16


#: Up to this many scores are sorted: fewer calls than selecting by a threshold.
_FEW = 1 << 14


def prune_smallest(scores: Array, n_prune: int) -> Mask:
    """The mask that removes exactly the `n_prune` smallest scores; numpy bool (n,)."""
    pruned = np.zeros(scores.shape[0], dtype=bool)
    pruned[np.argsort(scores, kind="stable")[:n_prune]] = True
    return pruned


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The same on the device of `scores` (n,): bool (n,)."""
    if count in (0, scores.numel()):
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    if scores.numel() <= _FEW and scores.device.type == "cpu":
        return torch.from_numpy(prune_smallest(scores.numpy(), count))
    return smallest_of_rows(scores.unsqueeze(0), torch.tensor([count], device=scores.device)).squeeze(0)


def smallest_of_rows(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """In each row of `scores` (g, m) the `counts` (g,) smallest: bool (g, m); ties to the lower index."""
    limit, following = _around(scores, counts)
    chosen = scores <= limit.unsqueeze(1)
    crowded = (limit == following).nonzero().squeeze(1)
    if crowded.numel():
        some, edge = scores[crowded], limit[crowded].unsqueeze(1)
        below, ties = some < edge, some == edge
        wanted = counts[crowded] - below.sum(1)
        chosen[crowded] = below | (ties & (ties.cumsum(1) <= wanted.unsqueeze(1)))
    return chosen


def _around(scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the last of the `counts` (g,) smallest of each row (g, m), the first of the others), (g,) each.

    Of none the last is −inf, and after all comes inf.
    """
    first, last = int(counts.min()), int(counts.max())
    if scores.device.type == "cpu":
        # numpy partitions and sorts several times faster than torch.
        table = scores.numpy()
        if 0 < first == last < table.shape[1]:
            table = np.partition(table, first, axis=1)
            return torch.from_numpy(table[:, :first].max(1)), torch.from_numpy(table[:, first].copy())
        order = torch.from_numpy(np.sort(table, axis=1))
    else:
        order = scores.sort(dim=1).values
    ends = torch.nn.functional.pad(order, (1, 0), value=-torch.inf)
    ends = torch.nn.functional.pad(ends, (0, 1), value=torch.inf)
    limits = ends.gather(1, torch.stack([counts, counts + 1], dim=1))
    return limits[:, 0], limits[:, 1]


def prune_smallest_magnitudes(parts: Sequence[torch.Tensor], n_prune: int) -> Mask:
    """The mask that removes the `n_prune` smallest |w| over several vectors, numpy bool (n,), without a copy of them.

    For w ≥ 0 the bits of a floating number, read as an integer, are in the order of its value. The threshold is found
    digit by digit, counting over pieces, so that beside the mask the memory does not grow with n.

    Parameters
    ----------
    parts : sequence of float32 or float64 tensors, all of one dtype
    n_prune : int, 0 ≤ n_prune ≤ n
    """
    n = sum(part.numel() for part in parts)
    pruned = np.empty(n, dtype=bool)
    if n_prune in (0, n):
        pruned[:] = n_prune > 0
        return pruned
    width = 8 * parts[0].element_size()
    prefix, left = 0, n_prune
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for piece in _bits(parts):
            known = piece >> (shift + _DIGIT) if shift + _DIGIT < width else torch.zeros_like(piece)
            digit = (piece[known == prefix] >> shift) & ((1 << _DIGIT) - 1)
            counts += torch.bincount(digit, minlength=1 << _DIGIT).cpu()
        total = counts.cumsum(0)
        chosen = int(torch.searchsorted(total, left))
        left -= int(total[chosen] - counts[chosen])
        prefix = (prefix << _DIGIT) | chosen
    # All smaller ones go, and of those that equal the threshold the first `left`.
    start = 0
    for piece in _bits(parts):
        go, ties = piece < prefix, piece == prefix
        if left and bool(ties.any()):
            first = ties & (ties.cumsum(0) <= left)
            left -= int(first.sum())
            go |= first
        pruned[start : start + piece.numel()] = go.cpu().numpy()
        start += piece.numel()
    return pruned


def _bits(parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """|w| of every piece as integers."""
    for part in parts:
        whole = torch.int32 if part.element_size() == 4 else torch.int64
        for piece in torch.split(part.reshape(-1), _CHUNK):
            yield piece.abs().view(whole)
